//! What all parts of a running master-agent share.

use std::{
    collections::HashMap,
    sync::{Arc, PoisonError, RwLock},
    time::SystemTime,
};

use percent_encoding::percent_decode_str;
use proto::{
    NodeName, Target,
    io::{admin, handshake::Places, tasks::Tasks},
};
use tokio_util::sync::CancellationToken;

use crate::{
    config::Config,
    dialer::TunnelDialer,
    identity::{Authorities, UserIdentity},
    inventory::Inventory,
    metrics::{Metrics, Reason},
    registry::{Absent, NodeStatus, Registry},
    routing::Routes,
    store::Store,
};

/// Configuration, identity, registry and counters, and the owner of every session.
pub struct Agent {
    pub config: Config,
    pub metrics: Metrics,
    pub registry: Arc<Registry>,
    pub dialer: Arc<TunnelDialer>,
    pub store: Arc<dyn Store>,
    pub authorities: Authorities,
    /// Every SSH session, and what runs for it.
    pub sessions: Tasks,
    /// Set when no new tunnels are to be made.
    pub draining: CancellationToken,
    pub handshakes: Places,
    user: RwLock<Arc<UserIdentity>>,
    inventory: RwLock<Arc<Inventory>>,
}

impl Agent {
    pub fn new(
        config: Config,
        inventory: Inventory,
        store: Arc<dyn Store>,
        authorities: Authorities,
    ) -> anyhow::Result<Self> {
        let registry = Arc::new(Registry::new(config.tunnels.max_streams_per_node));
        let user = authorities.issue_user(SystemTime::now(), config.certificates.user_ttl)?;
        let agent = Self {
            metrics: Metrics::default(),
            dialer: Arc::new(TunnelDialer::new(registry.clone(), config.tunnels.dial_timeout)),
            registry,
            store,
            authorities,
            sessions: Tasks::new(),
            draining: CancellationToken::new(),
            handshakes: Places::new(config.call_home.as_ref().map_or(1, |c| c.max_handshakes)),
            user: RwLock::new(Arc::new(user)),
            inventory: RwLock::default(),
            config,
        };
        agent.set_inventory(inventory);
        Ok(agent)
    }

    /// The master's present SSH user key and certificate.
    pub fn user(&self) -> Arc<UserIdentity> {
        self.user.read().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Issues a new user certificate in time, for ever.
    pub async fn renew_user(self: Arc<Self>) {
        let ttl = self.config.certificates.user_ttl;
        loop {
            tokio::time::sleep(ttl / 3).await;
            match self.authorities.issue_user(SystemTime::now(), ttl) {
                Ok(user) => *self.user.write().unwrap_or_else(PoisonError::into_inner) = Arc::new(user),
                Err(error) => {
                    tracing::error!(%error, "can't issue a new user certificate; the present one stays")
                }
            }
        }
    }

    pub fn inventory(&self) -> Arc<Inventory> {
        self.inventory.read().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Takes a new inventory: routes and the set of expected nodes. Tunnels of nodes that are gone are closed.
    pub fn set_inventory(&self, inventory: Inventory) {
        self.dialer.set_routes(Routes::new(&inventory));
        let expected = inventory.nodes.iter().map(|node| {
            let absent = if node.dial.is_some() { Absent::New } else { Absent::WaitingForCallHome };
            (node.name.clone(), (node.connections, absent))
        });
        let gone = self.registry.expect(&expected.collect());
        *self.inventory.write().unwrap_or_else(PoisonError::into_inner) = Arc::new(inventory);
        for tunnel in gone {
            self.sessions.spawn(async move { tunnel.close("the node is no longer in the inventory").await });
        }
    }

    pub fn count_refused(&self, reason: &'static str) {
        self.metrics.refused.get_or_create(&Reason { reason }).inc();
    }

    fn explain(&self, target: &str) -> Result<Explanation, String> {
        let target: Target = target.parse().map_err(|e| format!("{target:?} is no target: {e}"))?;
        let routes = self.dialer.routes();
        let mut explanation = Explanation { target: target.to_string(), ..Explanation::default() };
        let route = match routes.find(&target) {
            Ok(route) => route,
            Err(e) => {
                explanation.verdict = e.to_string();
                return Ok(explanation);
            }
        };
        explanation.reason = route.reason.clone();
        let candidates = self.dialer.candidates(&route);
        let Some(node) = candidates.as_ref().ok().and_then(|nodes| nodes.first()).cloned() else {
            explanation.verdict = candidates.err().map(|e| e.to_string()).unwrap_or_default();
            return Ok(explanation);
        };
        explanation.node = Some(node.clone());
        explanation.verdict = match self.registry.pick(&node) {
            Ok((tunnel, _)) => {
                explanation.round_trip_microseconds =
                    tunnel.round_trip().map(|d| u64::try_from(d.as_micros()).unwrap_or(u64::MAX));
                "would be dialled through this node; the node's policy decides".to_owned()
            }
            Err(e) => e.to_string(),
        };
        let status: HashMap<NodeName, NodeStatus> =
            self.registry.status().into_iter().map(|s| (s.name.clone(), s)).collect();
        explanation.state = status.get(&node).map(|s| s.state.clone());
        Ok(explanation)
    }
}

/// What `explain` answers.
#[derive(Clone, Debug, Default, serde::Serialize, serde::Deserialize)]
pub struct Explanation {
    pub target: String,
    pub node: Option<NodeName>,
    pub reason: String,
    pub state: Option<String>,
    pub round_trip_microseconds: Option<u64>,
    pub verdict: String,
}

impl admin::Admin for Agent {
    fn ready(&self) -> Result<(), String> {
        if self.draining.is_cancelled() {
            return Err("stopping".to_owned());
        }
        match self.registry.count() {
            (0, known) if known > 0 => Err(format!("none of {known} nodes is connected")),
            _ => Ok(()),
        }
    }

    fn get(&self, path: &str, query: &str) -> Option<admin::Answer> {
        let json = |value: Result<String, serde_json::Error>| match value {
            Ok(text) => (hyper::StatusCode::OK, "application/json", text),
            Err(e) => (hyper::StatusCode::INTERNAL_SERVER_ERROR, "text/plain", e.to_string()),
        };
        match path {
            "/nodes" => Some(json(serde_json::to_string(&self.registry.status()))),
            "/explain" => Some(match self.explain(&percent_decode_str(query).decode_utf8_lossy()) {
                Ok(explanation) => json(serde_json::to_string(&explanation)),
                Err(error) => (hyper::StatusCode::BAD_REQUEST, "text/plain", error),
            }),
            _ => None,
        }
    }
}
