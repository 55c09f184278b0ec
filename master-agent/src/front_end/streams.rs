//! The tasks of HTTP/2 streams, which end when their caller stops reading the response.

use std::{sync::Arc, time::Duration};

use proto_net::tasks::Tasks;
use tokio_util::sync::CancellationToken;

use super::answer::Progress;

tokio::task_local! {
    static PROGRESS: Arc<Progress>;
}

/// Returns the progress of the current task's response.
pub(super) fn progress() -> Arc<Progress> {
    PROGRESS.try_with(Arc::clone).unwrap_or_default()
}

/// Runs the streams of one connection.
#[derive(Clone)]
pub(super) struct Streams {
    pub tasks: Tasks,
    /// How long a caller may read nothing of a response.
    pub stall_timeout: Duration,
    /// Cancelled when the connection has to end, because hyper holds pieces of a response that nobody reads.
    pub ending: CancellationToken,
}

impl<F> hyper::rt::Executor<F> for Streams
where
    F: Future<Output = ()> + Send + 'static,
{
    fn execute(&self, stream: F) {
        let Self { tasks, stall_timeout, ending } = self.clone();
        tasks.spawn(async move {
            let progress = Arc::<Progress>::default();
            let served = PROGRESS.scope(progress.clone(), stream);
            // Dropping the stream resets it and ends everything that its request has begun.
            tokio::select! {
                () = served => {}
                () = progress.stalled(stall_timeout) => {}
            }
            tokio::select! {
                biased;
                () = progress.sent() => {}
                () = progress.stalled(stall_timeout) => ending.cancel(),
            }
        });
    }
}
