//! The steps of a shutdown that parts of the agent wait for.

use tokio_util::{sync::CancellationToken, task::TaskTracker};

/// Tells the parts of a running agent how far its shutdown has come. Cheap to clone.
#[derive(Clone, Debug, Default)]
pub struct Shutdown {
    /// Cancelled when no new streams are accepted any more.
    pub draining: CancellationToken,
    /// Cancelled when sessions have to say goodbye and end.
    pub stopping: CancellationToken,
    /// Has a token for each dial under way. A shutdown waits for these as it does for streams.
    pub dials: TaskTracker,
}
