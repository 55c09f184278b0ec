//! The tasks of HTTP/2 streams, which end when their caller stops taking the response.

use std::{sync::Arc, time::Duration};

use proto_net::tasks::Tasks;
use tokio_util::sync::CancellationToken;

use super::answer::Progress;

tokio::task_local! {
    static PROGRESS: Arc<Progress>;
}

/// The progress of the response that the current task makes.
pub(super) fn progress() -> Arc<Progress> {
    PROGRESS.try_with(Arc::clone).unwrap_or_default()
}

/// Runs the streams of one connection.
#[derive(Clone)]
pub(super) struct Streams {
    pub tasks: Tasks,
    /// How long a caller may take nothing of a response.
    pub patience: Duration,
    /// Cancelled when the connection has to end, because hyper holds parts of a response that nobody takes.
    pub ending: CancellationToken,
}

impl<F> hyper::rt::Executor<F> for Streams
where
    F: Future<Output = ()> + Send + 'static,
{
    fn execute(&self, stream: F) {
        let Self { tasks, patience, ending } = self.clone();
        tasks.spawn(async move {
            let progress = Arc::<Progress>::default();
            let served = PROGRESS.scope(progress.clone(), stream);
            // Dropping the stream resets it, and ends whatever its request has begun.
            tokio::select! {
                () = served => {}
                () = progress.stalled(patience) => {}
            }
            tokio::select! {
                biased;
                () = progress.sent() => {}
                () = progress.stalled(patience) => ending.cancel(),
            }
        });
    }
}
