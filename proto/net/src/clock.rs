//! The wall clock by which certificates begin and end.

use std::time::{Duration, SystemTime};

use tokio::time::{Instant, sleep};

/// How often the clock is read again during a wait, since it can be set meanwhile.
const CHECK_INTERVAL: Duration = Duration::from_secs(30);

/// Tells the time.
#[derive(Clone, Copy, Debug)]
pub enum Clock {
    /// The clock of the system.
    System,
    /// A clock that showed `start` at `began` and goes as Tokio's time does, which tests can pause.
    Virtual { start: SystemTime, began: Instant },
}

impl Clock {
    /// A virtual clock that begins with the time of the system's clock.
    pub fn new_virtual() -> Self {
        Self::Virtual { start: SystemTime::now(), began: Instant::now() }
    }

    pub fn now(self) -> SystemTime {
        match self {
            Self::System => SystemTime::now(),
            Self::Virtual { start, began } => start + began.elapsed(),
        }
    }

    /// Waits until the clock has passed `at`, or for ever if that is `None`.
    pub async fn reached(self, at: Option<SystemTime>) {
        let Some(at) = at else { return std::future::pending().await };
        while let Ok(left) = at.duration_since(self.now())
            && !left.is_zero()
        {
            sleep(left.min(CHECK_INTERVAL)).await;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn a_time_is_reached_when_the_clock_passes_it() {
        let (clock, began) = (Clock::new_virtual(), Instant::now());
        clock.reached(Some(SystemTime::UNIX_EPOCH)).await;
        Clock::System.reached(Some(SystemTime::UNIX_EPOCH)).await;
        assert_eq!(began.elapsed(), Duration::ZERO);
        clock.reached(Some(clock.now() + Duration::from_secs(100))).await;
        assert_eq!(began.elapsed(), Duration::from_secs(100));
        let never = tokio::time::timeout(Duration::from_secs(3600), clock.reached(None)).await;
        assert!(never.is_err());
    }
}
