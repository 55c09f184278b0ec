//! What the agent answers on its admin address and its admin socket.

use std::sync::Arc;

use hyper::{Method, Request, body::Incoming};
use proto_net::{
    admin,
    handover::reload::{RELOAD, Reloads},
};
use tokio_util::sync::CancellationToken;

use crate::metrics::Metrics;

/// Decides whether the agent is ready, and takes commands of this host.
pub(crate) struct Admin {
    /// Whether masters dial this node, so that it is ready before one has.
    pub(crate) listens: bool,
    /// Cancelled when the agent stops.
    pub(crate) leaving: CancellationToken,
    pub(crate) reloads: Reloads,
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
        let is_reload = (request.method(), request.uri().path()) == (&Method::POST, RELOAD);
        Box::pin(async move {
            match transport {
                admin::Transport::Unix if is_reload => Some(admin::respond(self.reloads.answer().await)),
                admin::Transport::Unix | admin::Transport::Tcp => None,
            }
        })
    }
}

#[cfg(test)]
mod tests {
    use proto_net::admin::Admin as _;

    use super::*;

    #[test]
    fn a_node_that_only_calls_home_is_ready_with_a_master_and_none_is_while_it_drains() {
        for listens in [true, false] {
            let (leaving, (reloads, _requests)) = (CancellationToken::new(), Reloads::new());
            let admin = Admin { listens, leaving, reloads, metrics: Arc::default() };
            assert_eq!(admin.ready().is_ok(), listens);
            admin.metrics.sessions.masters.inc();
            assert!(admin.ready().is_ok());
            admin.leaving.cancel();
            assert_eq!(admin.ready(), Err("stopping".to_owned()));
        }
    }
}
