//! Limits how often a frequent event is logged.

use std::{
    sync::{Mutex, PoisonError},
    time::Duration,
};

use tokio::time::Instant;

/// How long a burst of log lines counts.
const INTERVAL: Duration = Duration::from_secs(10);

/// Counts events between two log lines. By default, there is at most one line in ten seconds.
pub struct LogThrottle {
    burst: u32,
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    unlogged: u64,
    /// When the current interval began, and the number of lines since then.
    interval: Option<(Instant, u32)>,
}

impl Default for LogThrottle {
    fn default() -> Self {
        Self::with_burst(1)
    }
}

impl LogThrottle {
    /// Allows `burst` lines in ten seconds, for events whose lines differ.
    pub fn with_burst(burst: u32) -> Self {
        Self { burst, state: Mutex::default() }
    }

    /// Adds events. If a line is due, returns how many events it stands for.
    pub fn count(&self, events: u64) -> Option<u64> {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        state.unlogged += events;
        let now = Instant::now();
        let current = state.interval.filter(|(began, _)| now.duration_since(*began) < INTERVAL);
        let (began, lines) = current.unwrap_or((now, 0));
        state.interval = Some((began, (lines + 1).min(self.burst)));
        (lines < self.burst).then(|| std::mem::take(&mut state.unlogged))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn the_first_event_is_logged_at_once_and_later_ones_together() {
        let throttle = LogThrottle::default();
        assert_eq!([throttle.count(1), throttle.count(2), throttle.count(3)], [Some(1), None, None]);
        tokio::time::advance(INTERVAL).await;
        assert_eq!([throttle.count(1), throttle.count(1)], [Some(6), None]);
    }

    #[tokio::test(start_paused = true)]
    async fn a_burst_is_logged_line_by_line() {
        let throttle = LogThrottle::with_burst(2);
        assert_eq!([throttle.count(1), throttle.count(1), throttle.count(1)], [Some(1), Some(1), None]);
        tokio::time::advance(INTERVAL).await;
        assert_eq!([throttle.count(1), throttle.count(1), throttle.count(1)], [Some(2), Some(1), None]);
    }
}
