//! What the front door of proxy URLs and the front end have in common as HTTP servers and proxies.

pub mod claims;
pub mod hop;
pub mod status;
pub mod watched;

use proto::io::tasks::Tasks;

/// Runs the tasks of an HTTP/2 connection where they are drained with the others.
#[derive(Clone)]
pub struct Executor(pub Tasks);

impl<F> hyper::rt::Executor<F> for Executor
where
    F: Future + Send + 'static,
    F::Output: Send + 'static,
{
    fn execute(&self, future: F) {
        self.0.spawn(future);
    }
}
