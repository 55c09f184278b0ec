//! What happens often and is said seldom.

use std::{
    sync::{Mutex, PoisonError},
    time::Duration,
};

use tokio::time::Instant;

/// Between two times that it is said.
const INTERVAL: Duration = Duration::from_secs(10);

/// Counts events for the log.
#[derive(Default)]
pub(super) struct Seldom(Mutex<State>);

#[derive(Default)]
struct State {
    unsaid: u64,
    said: Option<Instant>,
}

impl Seldom {
    /// How many to speak of, where it is time to.
    pub(super) fn count(&self, events: u64) -> Option<u64> {
        let mut state = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        state.unsaid += events;
        if state.said.is_some_and(|said| said.elapsed() < INTERVAL) {
            return None;
        }
        state.said = Some(Instant::now());
        Some(std::mem::take(&mut state.unsaid))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn the_first_is_said_at_once_and_those_after_it_together() {
        let seldom = Seldom::default();
        assert_eq!([seldom.count(1), seldom.count(2), seldom.count(3)], [Some(1), None, None]);
        tokio::time::advance(INTERVAL).await;
        assert_eq!([seldom.count(1), seldom.count(1)], [Some(6), None]);
    }
}
