//! Answers requests on the admin address and on the admin socket.

pub mod config;

use std::sync::Arc;

use hyper::{Method, Request, StatusCode, body::Incoming};
use proto::NodeName;
use proto_net::{
    admin,
    dialer::Origin,
    drain,
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
    tunnels::{drains::Drains, explain::Explainer, registry::Registry},
};

const TEXT: &str = "text/plain";

/// Answers scrapers, viewers of the page, and the commands of this host.
pub struct Admin {
    pub registry: Arc<Registry>,
    pub explainer: Arc<Explainer>,
    pub drains: Arc<Drains>,
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
            (&Method::POST, path) => match admin_api::node_of_path(path)?.split_once('/')? {
                (node, "drain") => Some(self.drain(node, body).await),
                (node, "undrain") => Some(self.undrain(node).await),
                _ => None,
            },
            _ => None,
        }
    }

    async fn drain(&self, node: &str, body: Incoming) -> admin::Answer {
        let Some(within) = drain::read_request(body).await else {
            return (StatusCode::BAD_REQUEST, TEXT, "the body is not a number of milliseconds".to_owned());
        };
        let name = node.parse::<NodeName>().ok().filter(|name| self.registry.state(name).is_some());
        let Some(name) = name else {
            let message = format!("node {node} is not known: `master-agent node list` shows those that are");
            return (StatusCode::NOT_FOUND, TEXT, message);
        };
        match self.drains.begin(&name, within).await {
            Ok(()) => json(serde_json::to_string(&self.registry.detail(&name))),
            Err(error) => not_recorded(&error),
        }
    }

    async fn undrain(&self, node: &str) -> admin::Answer {
        let was_drained = match node.parse::<NodeName>() {
            Ok(name) => {
                self.drains.end(&name).await.map(|was_drained| (was_drained, self.registry.drain(&name)))
            }
            Err(_) => Ok((false, None)),
        };
        match was_drained {
            Ok((_, Some(_))) => {
                let message = format!("node {node} drains itself: run `node-agent undrain` on it");
                (StatusCode::CONFLICT, TEXT, message)
            }
            Ok((true, None)) => (StatusCode::OK, TEXT, format!("node {node} is no longer drained")),
            Ok((false, None)) => (StatusCode::NOT_FOUND, TEXT, format!("node {node} is not drained")),
            Err(error) => not_recorded(&error),
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
                    Err(error) => (StatusCode::INTERNAL_SERVER_ERROR, TEXT, error.to_string()),
                })
            }
            admin_api::EXPLAIN => {
                let target = admin_api::target_of_query(query);
                Some(match self.explainer.explain(&target, Origin("explain".to_owned())).await {
                    Ok(explanation) => json(serde_json::to_string(&explanation)),
                    Err(error) => (StatusCode::BAD_REQUEST, TEXT, error),
                })
            }
            path => {
                let name = admin_api::node_of_path(path)?.parse().ok()?;
                Some(json(serde_json::to_string(&self.registry.detail(&name)?)))
            }
        }
    }
}

fn not_recorded(error: &anyhow::Error) -> admin::Answer {
    (StatusCode::INTERNAL_SERVER_ERROR, TEXT, format!("the store can't be written: {error:#}"))
}

fn json(value: serde_json::Result<String>) -> admin::Answer {
    match value {
        Ok(text) => (StatusCode::OK, "application/json", text),
        Err(error) => (StatusCode::INTERNAL_SERVER_ERROR, TEXT, error.to_string()),
    }
}
