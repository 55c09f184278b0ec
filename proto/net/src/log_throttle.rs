//! Limits how often a frequent event is logged.

use std::{
    sync::{Mutex, PoisonError},
    time::Duration,
};

use tokio::time::Instant;

/// The shortest time between two log lines.
const INTERVAL: Duration = Duration::from_secs(10);

/// Counts events between two log lines.
#[derive(Default)]
pub struct LogThrottle(Mutex<State>);

#[derive(Default)]
struct State {
    unlogged: u64,
    logged: Option<Instant>,
}

impl LogThrottle {
    /// Adds events. If a line is due, returns how many events it stands for.
    pub fn count(&self, events: u64) -> Option<u64> {
        let mut state = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        state.unlogged += events;
        if state.logged.is_some_and(|logged| logged.elapsed() < INTERVAL) {
            return None;
        }
        state.logged = Some(Instant::now());
        Some(std::mem::take(&mut state.unlogged))
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
}
