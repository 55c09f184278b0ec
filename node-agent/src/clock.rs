//! The wall clock by which certificates begin and end.

use std::{
    fmt,
    sync::Arc,
    time::{Duration, SystemTime},
};

/// The clock can be set while a wait is under way, so it is read again this often.
const CHECK_INTERVAL: Duration = Duration::from_secs(30);

/// Tells the time. Tests substitute a clock that follows Tokio's paused time.
#[derive(Clone)]
pub struct Clock(Arc<dyn Fn() -> SystemTime + Send + Sync>);

impl Clock {
    pub fn system() -> Self {
        Self::from_fn(SystemTime::now)
    }

    pub fn from_fn(now: impl Fn() -> SystemTime + Send + Sync + 'static) -> Self {
        Self(Arc::new(now))
    }

    pub fn now(&self) -> SystemTime {
        (self.0)()
    }

    /// Waits until the clock has passed `at`; without a time, for ever.
    pub async fn reached(&self, at: Option<SystemTime>) {
        let Some(at) = at else { return std::future::pending().await };
        while let Ok(left) = at.duration_since(self.now())
            && !left.is_zero()
        {
            tokio::time::sleep(left.min(CHECK_INTERVAL)).await;
        }
    }
}

impl fmt::Debug for Clock {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Clock")
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::virtual_clock;

    #[tokio::test(start_paused = true)]
    async fn a_time_is_reached_when_the_clock_passes_it() {
        let clock = virtual_clock();
        let began = tokio::time::Instant::now();
        clock.reached(Some(SystemTime::UNIX_EPOCH)).await;
        assert_eq!(began.elapsed(), Duration::ZERO);
        clock.reached(Some(clock.now() + Duration::from_secs(100))).await;
        assert_eq!(began.elapsed(), Duration::from_secs(100));
        let never = tokio::time::timeout(Duration::from_secs(3600), clock.reached(None)).await;
        assert!(never.is_err());
    }
}
