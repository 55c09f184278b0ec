//! Requests to the running process to hand over to its next one.

use tokio::sync::{mpsc, oneshot};

use crate::admin_api::Reloaded;

/// The result of a reload, or why the running process goes on.
pub type Answer = Result<Reloaded, String>;

/// Takes requests. Cheap to clone.
#[derive(Clone, Debug)]
pub struct Reloads(mpsc::Sender<oneshot::Sender<Answer>>);

/// Receives requests, each of which is to be answered.
pub type ReloadRequests = mpsc::Receiver<oneshot::Sender<Answer>>;

impl Reloads {
    pub fn new() -> (Self, ReloadRequests) {
        let (requests, received) = mpsc::channel(1);
        (Self(requests), received)
    }

    /// Has the running process hand over. Returns once the next one serves, or with the reason why it does not.
    pub async fn reload(&self) -> Answer {
        let (answer, answered) = oneshot::channel();
        if self.0.try_send(answer).is_err() {
            return Err("another reload is waiting, or this process is being replaced".to_owned());
        }
        answered.await.unwrap_or_else(|_| Err("this process is stopping".to_owned()))
    }
}
