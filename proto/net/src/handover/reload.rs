//! Requests to the running process to hand over to its next one, which `reload` makes over the admin socket.

use hyper::StatusCode;
use serde::{Deserialize, Serialize};
use tokio::sync::{mpsc, oneshot};

use crate::admin::Answer;

/// The path to which `POST` has the running process hand over. The answer is [`Reloaded`], or why it goes on.
pub const RELOAD: &str = "/reload";

/// The process that serves after a reload, and the one before.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Reloaded {
    pub pid: u32,
    pub version: String,
    pub former_pid: u32,
    /// The number of callers, or on a node of streams, that the former process still carries.
    pub former_callers: u64,
}

/// The result of a reload, or why the running process goes on.
pub type ReloadResult = Result<Reloaded, String>;

/// Takes requests. Cheap to clone.
#[derive(Clone, Debug)]
pub struct Reloads(mpsc::Sender<oneshot::Sender<ReloadResult>>);

/// Receives requests, each of which is to be answered.
pub type ReloadRequests = mpsc::Receiver<oneshot::Sender<ReloadResult>>;

impl Reloads {
    pub fn new() -> (Self, ReloadRequests) {
        let (requests, received) = mpsc::channel(1);
        (Self(requests), received)
    }

    /// Has the running process hand over, and answers the request once the next one serves, or with the reason why it does
    /// not.
    pub async fn answer(&self) -> Answer {
        let reloaded = self.reload().await;
        let text = reloaded.and_then(|done| serde_json::to_string(&done).map_err(|error| error.to_string()));
        match text {
            Ok(text) => (StatusCode::OK, "application/json", text),
            Err(why) => (StatusCode::SERVICE_UNAVAILABLE, "text/plain", why),
        }
    }

    /// Has the running process hand over. Returns once the next one serves, or with the reason why it does not.
    pub async fn reload(&self) -> ReloadResult {
        let (answer, answered) = oneshot::channel();
        if self.0.try_send(answer).is_err() {
            return Err("another reload is waiting, or this process is being replaced".to_owned());
        }
        answered.await.unwrap_or_else(|_| Err("this process is stopping".to_owned()))
    }
}
