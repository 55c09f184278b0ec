//! The client that posts spans to a collector.

use std::{
    fmt,
    pin::Pin,
    sync::atomic::{AtomicBool, Ordering},
    time::Duration,
};

use anyhow::Context;
use bytes::Bytes;
use http_body_util::{BodyExt, Full, Limited};
use hyper::{Request, Response, Uri};
use hyper_rustls::{HttpsConnector, HttpsConnectorBuilder};
use hyper_util::{
    client::legacy::{Client, connect::HttpConnector},
    rt::{TokioExecutor, TokioTimer},
};
use opentelemetry_http::{HttpClient, HttpError};
use opentelemetry_otlp::{SpanExporter, WithExportConfig, WithHttpConfig};
use proto_net::{causes::causes, tasks::Tasks};
use tokio::runtime::Handle;

use super::config::TracesConfig;

/// Bytes of a response that are read.
const MAX_ANSWER: usize = 64 * 1024;

/// Returns the exporter, whose requests belong to `tasks`.
pub(super) fn exporter(config: &TracesConfig, tasks: Tasks) -> anyhow::Result<SpanExporter> {
    let connector = HttpsConnectorBuilder::new().with_tls_config(config.tls.config()?);
    let connector = match config.endpoint.scheme_str() {
        Some("http") => connector.https_or_http().enable_http1().build(),
        _ => connector.https_only().enable_http1().build(),
    };
    let client = Client::builder(TokioExecutor::new())
        .timer(TokioTimer::new())
        .pool_timer(TokioTimer::new())
        .pool_idle_timeout(Duration::from_secs(60))
        .build(connector);
    let collector = Collector {
        client,
        endpoint: config.endpoint.clone(),
        timeout: config.timeout,
        runtime: Handle::try_current().context("there is no tokio runtime")?,
        tasks,
        failing: AtomicBool::new(false),
    };
    SpanExporter::builder()
        .with_http()
        .with_http_client(collector)
        .with_endpoint(config.endpoint.to_string())
        .with_timeout(config.timeout)
        .with_headers(config.headers()?)
        .build()
        .context("traces")
}

struct Collector {
    client: Client<HttpsConnector<HttpConnector>, Full<Bytes>>,
    endpoint: Uri,
    timeout: Duration,
    runtime: Handle,
    tasks: Tasks,
    failing: AtomicBool,
}

impl fmt::Debug for Collector {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Collector({})", self.endpoint)
    }
}

impl Collector {
    /// Logs once that spans can't be sent, and once that they are sent again.
    fn log_change(&self, sent: &Result<Response<Bytes>, HttpError>) {
        let error = match sent {
            Ok(response) if response.status().is_success() => None,
            Ok(response) => Some(format!("the collector answers {}", response.status())),
            Err(error) => Some(causes(&**error)),
        };
        let failing = error.is_some();
        if self.failing.swap(failing, Ordering::Relaxed) == failing {
            return;
        }
        match error {
            Some(error) => {
                tracing::warn!(endpoint = %self.endpoint, error, "spans cannot be sent and are lost")
            }
            None => tracing::info!(endpoint = %self.endpoint, "spans are sent again"),
        }
    }
}

impl HttpClient for Collector {
    /// Called by the thread that batches spans, which does not belong to the runtime.
    fn send_bytes<'this, 'sent>(
        &'this self,
        request: Request<Bytes>,
    ) -> Pin<Box<dyn Future<Output = Result<Response<Bytes>, HttpError>> + Send + 'sent>>
    where
        'this: 'sent,
        Self: 'sent,
    {
        let (client, timeout) = (self.client.clone(), self.timeout);
        let exchange = async move {
            let response = client.request(request.map(Full::new)).await?;
            let (head, body) = response.into_parts();
            let body = Limited::new(body, MAX_ANSWER).collect().await?.to_bytes();
            Ok::<_, HttpError>(Response::from_parts(head, body))
        };
        let exchange = async move { tokio::time::timeout(timeout, exchange).await };
        let exchange = self.tasks.spawn_on(exchange, &self.runtime);
        Box::pin(async move {
            let sent = match exchange.await {
                Ok(Some(Ok(sent))) => sent,
                Ok(Some(Err(_))) => Err("the collector does not answer in time".into()),
                Ok(None) => Err("the agent has stopped".into()),
                Err(error) => Err(error.into()),
            };
            self.log_change(&sent);
            sent
        })
    }
}
