//! Answers requests on the admin address and on the admin socket.

pub mod config;

use std::sync::Arc;

use hyper::{Method, Request, body::Incoming};
use proto_net::{admin, dialer::Origin};

use crate::{
    admin_api,
    agent::Agent,
    front_end::server::FrontEnd,
    page::{self, Page},
    tunnels::explain::explain,
};

/// Answers scrapers, viewers of the page, and the commands of this host.
pub struct Admin {
    pub agent: Arc<Agent>,
    pub page: Arc<Page>,
    /// `None` if there is no front end.
    pub front_end: Option<Arc<FrontEnd>>,
}

impl admin::Admin for Admin {
    fn ready(&self) -> Result<Vec<String>, String> {
        let agent = &self.agent;
        if agent.draining.is_cancelled() {
            return Err("stopping".to_owned());
        }
        let legacy = agent.config.kubernetes.as_ref().is_some_and(|config| config.legacy_names);
        let name = |error| if legacy { format!("SSH Tunnel Check: {error}") } else { error };
        let mut amiss =
            agent.watches.as_ref().map_or(Ok(Vec::new()), |watches| watches.ready()).map_err(name)?;
        if let Some((0, servers)) = self.front_end.as_ref().map(|front_end| front_end.upstreams()) {
            amiss.push(format!("front end: none of {servers} API servers works"));
        }
        match agent.registry.count() {
            (0, known) if known > 0 => Err(format!("none of {known} nodes is connected")),
            _ => Ok(amiss),
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
            (&Method::PUT, admin_api::COMPARISON) => Some(self.page.take_comparison(body).await),
            _ => None,
        }
    }

    async fn query(&self, path: &str, query: &str) -> Option<admin::Answer> {
        let json = |value: Result<String, serde_json::Error>| match value {
            Ok(text) => (hyper::StatusCode::OK, "application/json", text),
            Err(e) => (hyper::StatusCode::INTERNAL_SERVER_ERROR, "text/plain", e.to_string()),
        };
        match path {
            admin_api::WATCHES => Some(json(serde_json::to_string(
                &self.agent.watches.as_ref().map(|watches| watches.status()).unwrap_or_default(),
            ))),
            admin_api::NODES => Some(json(serde_json::to_string(&self.agent.registry.status()))),
            admin_api::EXPLAIN => {
                let target = admin_api::target_of_query(query);
                Some(match explain(&self.agent, &target, Origin("explain".to_owned())).await {
                    Ok(explanation) => json(serde_json::to_string(&explanation)),
                    Err(error) => (hyper::StatusCode::BAD_REQUEST, "text/plain", error),
                })
            }
            path => {
                let name = admin_api::node_of_path(path)?.parse().ok()?;
                Some(json(serde_json::to_string(&self.agent.registry.detail(&name)?)))
            }
        }
    }
}
