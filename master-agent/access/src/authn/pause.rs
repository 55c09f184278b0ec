//! The pause after a server has failed to answer, in which it is not asked again.

use std::{
    sync::{Mutex, PoisonError},
    time::{Duration, Instant},
};

use super::reason::FailureReason;

/// The time between a failure and the next question.
const PAUSE: Duration = Duration::from_secs(2);

/// The last failure of a server.
#[derive(Default)]
pub(super) struct Pause(Mutex<Option<(Instant, FailureReason)>>);

impl Pause {
    /// Begins a pause. `ended` is the time at which the question failed, which can be long after it was asked.
    pub(super) fn begin(&self, ended: Instant, reason: FailureReason) {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) = Some((ended, reason));
    }

    /// Returns why the server is not to be asked now, if it is not.
    pub(super) fn reason(&self, now: Instant) -> Option<FailureReason> {
        let last = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let (ended, reason) = last.as_ref()?;
        (now.saturating_duration_since(*ended) < PAUSE).then(|| reason.clone())
    }
}
