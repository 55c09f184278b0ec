//! Small JSON calls over verified HTTPS: webhooks, key sets, discovery.

use std::time::Duration;

use anyhow::{Context, bail};
use bytes::Bytes;
use http_body_util::{BodyExt, Full, Limited};
use hyper::{Method, Request, Uri, header};
use hyper_rustls::{HttpsConnector, HttpsConnectorBuilder};
use hyper_util::{
    client::legacy::{Client, connect::HttpConnector},
    rt::{TokioExecutor, TokioTimer},
};
pub use proto_net::tls::{ClientTls, chain, private_key, roots};
use serde::{Serialize, de::DeserializeOwned};

/// Bytes of an answer that are read.
const MAX_ANSWER: usize = 1024 * 1024;

/// A client of one server or of several with the same trust.
#[derive(Clone)]
pub struct JsonClient {
    client: Client<HttpsConnector<HttpConnector>, Full<Bytes>>,
    timeout: Duration,
}

impl JsonClient {
    /// `timeout` is for a whole call.
    pub fn new(tls: &ClientTls, timeout: Duration) -> anyhow::Result<Self> {
        let connector =
            HttpsConnectorBuilder::new().with_tls_config(tls.config()?).https_only().enable_http1().build();
        let client = Client::builder(TokioExecutor::new())
            .timer(TokioTimer::new())
            .pool_timer(TokioTimer::new())
            .pool_idle_timeout(Duration::from_secs(60))
            .build(connector);
        Ok(Self { client, timeout })
    }

    pub async fn get<A: DeserializeOwned>(&self, uri: &Uri) -> anyhow::Result<A> {
        self.call(Method::GET, uri, Bytes::new()).await
    }

    pub async fn post<A: DeserializeOwned>(&self, uri: &Uri, body: &impl Serialize) -> anyhow::Result<A> {
        self.call(Method::POST, uri, Bytes::from(serde_json::to_vec(body)?)).await
    }

    /// Neither what is sent nor what comes back is part of an error: both may hold secrets.
    async fn call<A: DeserializeOwned>(&self, method: Method, uri: &Uri, body: Bytes) -> anyhow::Result<A> {
        let request = Request::builder()
            .method(method)
            .uri(uri)
            .header(header::ACCEPT, "application/json")
            .header(header::CONTENT_TYPE, "application/json")
            .body(Full::new(body))?;
        let exchange = async {
            let response =
                self.client.request(request).await.with_context(|| format!("{uri} can't be asked"))?;
            let status = response.status();
            if !status.is_success() {
                bail!("{uri} answers {status}");
            }
            let body = Limited::new(response.into_body(), MAX_ANSWER).collect().await;
            let body = body.map_err(|e| anyhow::anyhow!("{uri}: its answer broke off: {e}"))?.to_bytes();
            serde_json::from_slice(&body)
                .map_err(|e| anyhow::anyhow!("{uri}: its answer is not as expected: {:?}", e.classify()))
        };
        tokio::time::timeout(self.timeout, exchange).await.unwrap_or_else(|_| {
            bail!("{uri} did not answer within {}", humantime::format_duration(self.timeout))
        })
    }
}
