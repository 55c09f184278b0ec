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
use serde::Serialize;
use tokio::task::spawn_blocking;
use tokio_util::sync::CancellationToken;

use super::{live::Live, response::TEXT, sessions::Sessions};
use crate::{
    activity::unix_milliseconds,
    compare::{
        html,
        report::{Overview, Report},
    },
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

/// A report that `compare` has handed over. It is rendered once, for all who will look at it.
pub(super) struct Comparison {
    /// The overview in JSON.
    pub summary: Bytes,
    /// The report as a page of its own.
    pub page: Bytes,
}

#[derive(Serialize)]
struct Summary<'a> {
    unix_milliseconds: u64,
    started: &'a str,
    seconds: f64,
    rounds: usize,
    #[serde(flatten)]
    overview: Overview,
}

impl Comparison {
    /// Reads and renders a report, which takes a while if it is large.
    fn read(report: &[u8], unix_milliseconds: u64) -> Result<Self, String> {
        let report: Report =
            serde_json::from_slice(report).map_err(|error| format!("no comparison: {error}\n"))?;
        if report.version != 1 {
            return Err(format!("a comparison of version {} is not known here\n", report.version));
        }
        let summary = serde_json::to_vec(&Summary {
            unix_milliseconds,
            started: &report.started,
            seconds: report.seconds,
            rounds: report.rounds,
            overview: report.overview(),
        });
        let summary = summary.map_err(|error| format!("the comparison can't be summarised: {error}\n"))?;
        Ok(Self { summary: summary.into(), page: html::page(&report).into() })
    }
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
        let now = unix_milliseconds(SystemTime::now());
        let comparison = match spawn_blocking(move || Comparison::read(&body, now)).await {
            Ok(Ok(comparison)) => comparison,
            Ok(Err(message)) => return (StatusCode::BAD_REQUEST, TEXT, message),
            Err(error) => return (StatusCode::INTERNAL_SERVER_ERROR, TEXT, format!("{error}\n")),
        };
        *self.comparison.lock().unwrap_or_else(PoisonError::into_inner) = Some(Arc::new(comparison));
        self.live.compared(now);
        (StatusCode::OK, TEXT, "ok\n".to_owned())
    }
}
