//! Small JSON calls over verified HTTPS: webhooks, key sets, discovery.
//!
//! An error names the URL and what went wrong. It contains neither what was sent nor what came back, since both may hold
//! secrets.

use std::time::Duration;

use bytes::Bytes;
use http_body_util::{BodyExt, Full, Limited};
use hyper::{Method, Request, StatusCode, Uri, header};
use hyper_rustls::{HttpsConnector, HttpsConnectorBuilder};
use hyper_util::{
    client::legacy::{Client, connect::HttpConnector},
    rt::{TokioExecutor, TokioTimer},
};
use serde::{Serialize, de::DeserializeOwned};

use crate::{
    causes::causes,
    tls::{ClientTls, FileError},
};

/// The longest answer that is read, in bytes.
const MAX_ANSWER: usize = 1024 * 1024;

/// Calls servers that have the same trust.
#[derive(Clone)]
pub struct JsonClient {
    client: Client<HttpsConnector<HttpConnector>, Full<Bytes>>,
    timeout: Duration,
}

/// Why a call has no result.
#[derive(Debug, thiserror::Error)]
pub enum CallError {
    #[error("{uri}: the request can't be built: {reason}")]
    Request { uri: Uri, reason: String },
    #[error("{uri} can't be asked: {reason}")]
    Unreachable { uri: Uri, reason: String },
    #[error("{uri} answers {status}")]
    Status { uri: Uri, status: StatusCode },
    #[error("{uri}: its answer broke off: {reason}")]
    Truncated { uri: Uri, reason: String },
    #[error("{uri}: its answer is not as expected: {category:?}")]
    Malformed { uri: Uri, category: serde_json::error::Category },
    #[error("{uri} did not answer within {}", humantime::format_duration(*.timeout))]
    TimedOut { uri: Uri, timeout: Duration },
}

impl JsonClient {
    /// Reads the TLS files. `timeout` is for a whole call.
    pub fn new(tls: &ClientTls, timeout: Duration) -> Result<Self, FileError> {
        let connector =
            HttpsConnectorBuilder::new().with_tls_config(tls.config()?).https_only().enable_http1().build();
        let client = Client::builder(TokioExecutor::new())
            .timer(TokioTimer::new())
            .pool_timer(TokioTimer::new())
            .pool_idle_timeout(Duration::from_secs(60))
            .build(connector);
        Ok(Self { client, timeout })
    }

    pub async fn get<A: DeserializeOwned>(&self, uri: &Uri) -> Result<A, CallError> {
        self.call(Method::GET, uri, Bytes::new()).await
    }

    pub async fn post<A: DeserializeOwned>(&self, uri: &Uri, body: &impl Serialize) -> Result<A, CallError> {
        let body = serde_json::to_vec(body)
            .map_err(|error| CallError::Request { uri: uri.clone(), reason: error.to_string() })?;
        self.call(Method::POST, uri, body.into()).await
    }

    async fn call<A: DeserializeOwned>(
        &self,
        method: Method,
        uri: &Uri,
        body: Bytes,
    ) -> Result<A, CallError> {
        let exchange = tokio::time::timeout(self.timeout, self.exchange(method, uri, body));
        let body = exchange
            .await
            .unwrap_or_else(|_| Err(CallError::TimedOut { uri: uri.clone(), timeout: self.timeout }))?;
        serde_json::from_slice(&body)
            .map_err(|error| CallError::Malformed { uri: uri.clone(), category: error.classify() })
    }

    async fn exchange(&self, method: Method, uri: &Uri, body: Bytes) -> Result<Bytes, CallError> {
        let request = Request::builder()
            .method(method)
            .uri(uri)
            .header(header::ACCEPT, "application/json")
            .header(header::CONTENT_TYPE, "application/json")
            .body(Full::new(body))
            .map_err(|error| CallError::Request { uri: uri.clone(), reason: error.to_string() })?;
        let response = self.client.request(request).await;
        let response =
            response.map_err(|error| CallError::Unreachable { uri: uri.clone(), reason: causes(&error) })?;
        let status = response.status();
        if !status.is_success() {
            return Err(CallError::Status { uri: uri.clone(), status });
        }
        let body = Limited::new(response.into_body(), MAX_ANSWER).collect().await;
        let body =
            body.map_err(|error| CallError::Truncated { uri: uri.clone(), reason: error.to_string() })?;
        Ok(body.to_bytes())
    }
}
