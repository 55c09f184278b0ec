//! When the agent is ready, for `/readyz`.

use std::sync::Arc;

use hyper::{Request, body::Incoming};
use proto_net::admin;
use tokio_util::sync::CancellationToken;

use crate::metrics::Metrics;

/// Decides whether the agent is ready. It serves nothing else beside health and metrics.
pub(crate) struct Readiness {
    /// Whether masters dial this node, so that it is ready before one has.
    pub(crate) listens: bool,
    pub(crate) draining: CancellationToken,
    pub(crate) metrics: Arc<Metrics>,
}

impl admin::Admin for Readiness {
    fn ready(&self) -> Result<Vec<String>, String> {
        if self.draining.is_cancelled() {
            return Err("stopping".to_owned());
        }
        if !self.listens && self.metrics.sessions.masters.get() == 0 {
            return Err("no master is connected".to_owned());
        }
        Ok(Vec::new())
    }

    fn answer(self: Arc<Self>, _: Request<Incoming>, _: admin::Transport) -> admin::AnswerFuture {
        Box::pin(std::future::ready(None))
    }
}

#[cfg(test)]
mod tests {
    use proto_net::admin::Admin;

    use super::*;

    #[test]
    fn a_node_that_only_calls_home_is_ready_with_a_master_and_none_is_while_it_drains() {
        for listens in [true, false] {
            let readiness =
                Readiness { listens, draining: CancellationToken::new(), metrics: Arc::default() };
            assert_eq!(readiness.ready().is_ok(), listens);
            readiness.metrics.sessions.masters.inc();
            assert!(readiness.ready().is_ok());
            readiness.draining.cancel();
            assert_eq!(readiness.ready(), Err("stopping".to_owned()));
        }
    }
}
