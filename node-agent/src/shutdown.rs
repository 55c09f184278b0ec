//! The steps to the end of a process that parts of the agent wait for.

use tokio_util::{sync::CancellationToken, task::TaskTracker};

/// Tells the parts of a running agent how far its end has come. Cheap to clone.
#[derive(Clone, Debug, Default)]
pub struct Shutdown {
    /// Cancelled when this node makes no new links.
    pub leaving: CancellationToken,
    /// Cancelled when another process has taken this one's place, and masters are to use that.
    pub replaced: CancellationToken,
    /// Cancelled when no new streams are accepted any more.
    pub draining: CancellationToken,
    /// Cancelled when sessions have to say goodbye and end.
    pub stopping: CancellationToken,
    /// Has a token for each dial under way. A shutdown waits for these as it does for streams.
    pub dials: TaskTracker,
}
