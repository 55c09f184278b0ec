//! What the agent answers on its admin address and its admin socket.

use std::{sync::Arc, time::SystemTime};

use hyper::{Method, Request, StatusCode, body::Incoming};
use proto_net::{
    admin, drain,
    handover::reload::{RELOAD, Reloads},
};
use serde::{Deserialize, Serialize};
use tokio_util::sync::CancellationToken;

use crate::{drain::Drain, metrics::Metrics, session::masters::ConnectedMasters};

/// The path to which `POST` drains this node within the milliseconds in the body. `POST` and `GET` are answered with
/// [`DrainStatus`].
pub(crate) const DRAIN: &str = "/drain";
/// The path to which `POST` undoes that. It is answered with a line of text.
pub(crate) const UNDRAIN: &str = "/undrain";

const TEXT: &str = "text/plain";

/// How far a drain of this node has come.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct DrainStatus {
    /// The deadline.
    pub(crate) until_unix_milliseconds: u64,
    /// The number of streams that masters and people have open here.
    pub(crate) streams: usize,
    /// The number of streams that were cut at the deadline, once all have ended.
    pub(crate) cut: Option<u64>,
    /// The masters that can't be told.
    pub(crate) masters_not_told: Vec<String>,
}

const NOT_DRAINED: &str = "this node is not drained";

/// Decides whether the agent is ready, and takes commands of this host.
pub(crate) struct Admin {
    /// Whether masters dial this node, so that it is ready before one has.
    pub(crate) listens: bool,
    /// Cancelled when the agent stops.
    pub(crate) leaving: CancellationToken,
    pub(crate) reloads: Reloads,
    pub(crate) drain: Arc<Drain>,
    pub(crate) masters: Arc<ConnectedMasters>,
    pub(crate) metrics: Arc<Metrics>,
}

impl admin::Admin for Admin {
    fn ready(&self) -> Result<Vec<String>, String> {
        if self.leaving.is_cancelled() {
            return Err("stopping".to_owned());
        }
        if !self.listens && self.metrics.sessions.masters.get() == 0 {
            return Err("no master is connected".to_owned());
        }
        Ok(Vec::new())
    }

    fn answer(
        self: Arc<Self>,
        request: Request<Incoming>,
        transport: admin::Transport,
    ) -> admin::AnswerFuture {
        Box::pin(async move {
            match transport {
                admin::Transport::Unix => self.command(request).await.map(admin::respond),
                admin::Transport::Tcp => None,
            }
        })
    }
}

impl Admin {
    /// Answers a command of this host.
    async fn command(&self, request: Request<Incoming>) -> Option<admin::Answer> {
        let (head, body) = request.into_parts();
        match (&head.method, head.uri.path()) {
            (&Method::POST, RELOAD) => Some(self.reloads.answer().await),
            (&Method::POST, DRAIN) => Some(self.begin_drain(body).await),
            (&Method::POST, UNDRAIN) => Some(self.end_drain().await),
            (&Method::GET, DRAIN) => Some(self.drain_status()),
            _ => None,
        }
    }

    async fn begin_drain(&self, body: Incoming) -> admin::Answer {
        let Some(within) = drain::read_request(body).await else {
            return (StatusCode::BAD_REQUEST, TEXT, "the body is not a number of milliseconds".to_owned());
        };
        match self.drain.begin(within).await {
            Ok(()) => self.drain_status(),
            Err(error) => failed(&error),
        }
    }

    async fn end_drain(&self) -> admin::Answer {
        match self.drain.end().await {
            Ok(true) => (StatusCode::OK, TEXT, "this node is no longer drained".to_owned()),
            Ok(false) => (StatusCode::NOT_FOUND, TEXT, NOT_DRAINED.to_owned()),
            Err(error) => failed(&error),
        }
    }

    fn drain_status(&self) -> admin::Answer {
        let Some(deadline) = self.drain.deadline() else {
            return (StatusCode::NOT_FOUND, TEXT, NOT_DRAINED.to_owned());
        };
        let streams = usize::try_from(self.metrics.streams.get()).unwrap_or_default();
        let until = deadline.until.duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
        let status = DrainStatus {
            until_unix_milliseconds: u64::try_from(until.as_millis()).unwrap_or(u64::MAX),
            streams,
            cut: (deadline.is_over() && streams == 0).then(|| self.drain.cut()),
            masters_not_told: self.masters.deaf_to_drains(),
        };
        match serde_json::to_string(&status) {
            Ok(text) => (StatusCode::OK, "application/json", text),
            Err(error) => failed(&error.into()),
        }
    }
}

fn failed(error: &anyhow::Error) -> admin::Answer {
    (StatusCode::INTERNAL_SERVER_ERROR, TEXT, format!("{error:#}"))
}

#[cfg(test)]
mod tests {
    use proto_net::admin::Admin as _;

    use super::*;
    use crate::testing::TempDir;

    #[test]
    fn a_node_that_only_calls_home_is_ready_with_a_master_and_none_is_while_it_drains() {
        let dir = TempDir::new();
        for listens in [true, false] {
            let drain = Arc::new(Drain::load(dir.path()).unwrap());
            let (leaving, (reloads, _requests)) = (CancellationToken::new(), Reloads::new());
            let (masters, metrics) = Default::default();
            let admin = Admin { listens, leaving, reloads, drain, masters, metrics };
            assert_eq!(admin.ready().is_ok(), listens);
            admin.metrics.sessions.masters.inc();
            assert!(admin.ready().is_ok());
            admin.leaving.cancel();
            assert_eq!(admin.ready(), Err("stopping".to_owned()));
        }
    }
}
