//! The state of the page: its sessions, its live events and the last comparison.

use std::{
    net::SocketAddr,
    sync::{Arc, Mutex, PoisonError},
    time::SystemTime,
};

use bytes::Bytes;
use http_body_util::{BodyExt, Limited};
use hyper::{StatusCode, body::Body};
use proto_net::admin::Answer;
use tokio_util::sync::CancellationToken;

use super::{live::Live, response::TEXT, sessions::Sessions};
use crate::{
    activity::unix_milliseconds,
    compare::report::Report,
    tunnels::{explain::Explainer, registry::Registry},
};

/// The largest comparison, in bytes.
const MAX_COMPARISON: usize = 4 << 20;

/// The page of a running agent.
pub struct Page {
    pub(super) registry: Arc<Registry>,
    pub(super) explainer: Arc<Explainer>,
    /// Cancelled when the agent stops.
    pub(super) draining: CancellationToken,
    /// The admin address, if the page is served there.
    pub(super) admin: Option<SocketAddr>,
    pub(super) sessions: Sessions,
    pub(super) live: Arc<Live>,
    comparison: Mutex<Option<Arc<Comparison>>>,
}

/// A report that `compare` has handed over.
pub(super) struct Comparison {
    pub unix_milliseconds: u64,
    pub report: Report,
}

impl Page {
    /// Creates the page. `admin` is the admin address, if the page is served there.
    pub fn new(
        registry: Arc<Registry>,
        explainer: Arc<Explainer>,
        draining: CancellationToken,
        admin: Option<SocketAddr>,
    ) -> Self {
        Self {
            live: Live::new(registry.clone()),
            registry,
            explainer,
            draining,
            admin,
            sessions: Sessions::default(),
            comparison: Mutex::default(),
        }
    }

    pub(super) fn comparison(&self) -> Option<Arc<Comparison>> {
        self.comparison.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Takes the comparison that `PUT /comparison` on the admin socket brings.
    pub async fn take_comparison<B>(&self, body: B) -> Answer
    where
        B: Body<Data = Bytes>,
        B::Error: Into<Box<dyn std::error::Error + Send + Sync>>,
    {
        let body = match Limited::new(body, MAX_COMPARISON).collect().await {
            Ok(body) => body.to_bytes(),
            Err(error) => {
                let message = format!("no comparison of at most {MAX_COMPARISON} bytes: {error}\n");
                return (StatusCode::PAYLOAD_TOO_LARGE, TEXT, message);
            }
        };
        let report = match serde_json::from_slice::<Report>(&body) {
            Ok(report) if report.version == 1 => report,
            Ok(Report { version, .. }) => {
                let message = format!("a comparison of version {version} is not known here\n");
                return (StatusCode::BAD_REQUEST, TEXT, message);
            }
            Err(error) => return (StatusCode::BAD_REQUEST, TEXT, format!("no comparison: {error}\n")),
        };
        let comparison = Comparison { unix_milliseconds: unix_milliseconds(SystemTime::now()), report };
        self.live.compared(comparison.unix_milliseconds);
        *self.comparison.lock().unwrap_or_else(PoisonError::into_inner) = Some(Arc::new(comparison));
        (StatusCode::OK, TEXT, "ok\n".to_owned())
    }
}
