//! Answers requests on the admin address and on the admin socket.

pub mod config;

use std::sync::Arc;

use hyper::{Method, Request, StatusCode, body::Incoming};
use proto_net::{
    admin,
    dialer::Origin,
    handover::reload::{RELOAD, Reloads},
};
use tokio::task::spawn_blocking;
use tokio_util::sync::CancellationToken;

use crate::{
    admin_api,
    front_end::server::FrontEnd,
    identity::refresh::StoreHealth,
    kubernetes::Watches,
    page::{self, Page},
    tunnels::{explain::Explainer, registry::Registry},
};

/// Answers scrapers, viewers of the page, and the commands of this host.
pub struct Admin {
    pub registry: Arc<Registry>,
    pub explainer: Arc<Explainer>,
    /// The watches of the cluster. It is `None` if no cluster is configured.
    pub watches: Option<Arc<Watches>>,
    pub store: Arc<StoreHealth>,
    /// Whether errors begin with the name of kube-apiserver's own check, `SSH Tunnel Check`.
    pub legacy_names: bool,
    pub page: Arc<Page>,
    /// `None` if there is no front end.
    pub front_end: Option<Arc<FrontEnd>>,
    pub reloads: Reloads,
    /// Cancelled when the agent stops.
    pub leaving: CancellationToken,
}

impl admin::Admin for Admin {
    fn ready(&self) -> Result<Vec<String>, String> {
        if self.leaving.is_cancelled() {
            return Err("stopping".to_owned());
        }
        let name = |error| if self.legacy_names { format!("SSH Tunnel Check: {error}") } else { error };
        let mut warnings =
            self.watches.as_ref().map_or(Ok(Vec::new()), |watches| watches.ready()).map_err(name)?;
        warnings.extend(self.store.remark());
        if let Some((0, servers)) = self.front_end.as_ref().map(|front_end| front_end.upstreams()) {
            warnings.push(format!("front end: none of {servers} API servers works"));
        }
        match self.registry.count() {
            (0, known) if known > 0 => Err(format!("none of {known} nodes is connected")),
            _ => Ok(warnings),
        }
    }

    fn answer(
        self: Arc<Self>,
        request: Request<Incoming>,
        transport: admin::Transport,
    ) -> admin::AnswerFuture {
        Box::pin(async move {
            match transport {
                admin::Transport::Tcp => page::serve(&self.page, request).await,
                admin::Transport::Unix => self.command(request).await.map(admin::respond),
            }
        })
    }
}

impl Admin {
    /// Answers a command of this host.
    async fn command(&self, request: Request<Incoming>) -> Option<admin::Answer> {
        let (head, body) = request.into_parts();
        let (path, query) = (head.uri.path(), head.uri.query().unwrap_or_default());
        match (&head.method, path) {
            (&Method::GET, _) => self.query(path, query).await,
            (&Method::POST, admin_api::PAGE_TOKEN) => Some(page::token(&self.page)),
            (&Method::POST, RELOAD) => Some(self.reloads.answer().await),
            (&Method::PUT, admin_api::COMPARISON) => Some(self.page.take_comparison(body).await),
            _ => None,
        }
    }

    async fn query(&self, path: &str, query: &str) -> Option<admin::Answer> {
        match path {
            admin_api::WATCHES => Some(json(serde_json::to_string(
                &self.watches.as_ref().map(|watches| watches.status()).unwrap_or_default(),
            ))),
            admin_api::NODES => {
                let registry = self.registry.clone();
                // Many nodes take a while to serialise and must not block streams.
                let text = spawn_blocking(move || serde_json::to_string(&registry.status())).await;
                Some(match text {
                    Ok(text) => json(text),
                    Err(error) => (StatusCode::INTERNAL_SERVER_ERROR, "text/plain", error.to_string()),
                })
            }
            admin_api::EXPLAIN => {
                let target = admin_api::target_of_query(query);
                Some(match self.explainer.explain(&target, Origin("explain".to_owned())).await {
                    Ok(explanation) => json(serde_json::to_string(&explanation)),
                    Err(error) => (StatusCode::BAD_REQUEST, "text/plain", error),
                })
            }
            path => {
                let name = admin_api::node_of_path(path)?.parse().ok()?;
                Some(json(serde_json::to_string(&self.registry.detail(&name)?)))
            }
        }
    }
}

fn json(value: serde_json::Result<String>) -> admin::Answer {
    match value {
        Ok(text) => (StatusCode::OK, "application/json", text),
        Err(error) => (StatusCode::INTERNAL_SERVER_ERROR, "text/plain", error.to_string()),
    }
}
