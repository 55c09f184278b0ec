//! Small JSON calls over verified HTTPS: webhooks, key sets, discovery.

use std::{
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use anyhow::{Context, bail};
use bytes::Bytes;
use http_body_util::{BodyExt, Full, Limited};
use hyper::{Method, Request, Uri, header};
use hyper_rustls::{HttpsConnector, HttpsConnectorBuilder};
use hyper_util::{
    client::legacy::{Client, connect::HttpConnector},
    rt::{TokioExecutor, TokioTimer},
};
use rustls::{
    ClientConfig, RootCertStore,
    pki_types::{CertificateDer, PrivateKeyDer, pem::PemObject},
};
use serde::{Serialize, de::DeserializeOwned};

/// Bytes of an answer that are read.
const MAX_ANSWER: usize = 1024 * 1024;

/// How a server is verified and what it is shown.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ClientTls {
    /// The CA of its certificate; `None` is those of the system.
    pub ca: Option<PathBuf>,
    /// A certificate and its key.
    pub identity: Option<(PathBuf, PathBuf)>,
}

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

impl ClientTls {
    /// Without protocols for ALPN.
    pub fn config(&self) -> anyhow::Result<ClientConfig> {
        let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
        let builder = ClientConfig::builder_with_provider(provider).with_safe_default_protocol_versions()?;
        let builder = match &self.ca {
            Some(ca) => builder.with_root_certificates(roots(ca)?),
            None => {
                let mut roots = RootCertStore::empty();
                roots.add_parsable_certificates(rustls_native_certs::load_native_certs().certs);
                builder.with_root_certificates(roots)
            }
        };
        Ok(match &self.identity {
            Some((cert, key)) => builder
                .with_client_auth_cert(chain(cert)?, private_key(key)?)
                .with_context(|| format!("{} and {} don't go together", cert.display(), key.display()))?,
            None => builder.with_no_client_auth(),
        })
    }

    /// The files that it is read from.
    pub fn files(&self) -> Vec<PathBuf> {
        let identity = self.identity.iter().flat_map(|(cert, key)| [cert.clone(), key.clone()]);
        self.ca.iter().cloned().chain(identity).collect()
    }
}

/// The certificates of a CA file.
pub fn roots(ca: &Path) -> anyhow::Result<RootCertStore> {
    let mut roots = RootCertStore::empty();
    for certificate in chain(ca)? {
        roots
            .add(certificate)
            .with_context(|| format!("{} has a certificate that is no CA", ca.display()))?;
    }
    Ok(roots)
}

/// At least one certificate.
pub fn chain(path: &Path) -> anyhow::Result<Vec<CertificateDer<'static>>> {
    let chain = CertificateDer::pem_file_iter(path)
        .and_then(Iterator::collect::<Result<Vec<_>, _>>)
        .with_context(|| format!("can't read certificates in {}", path.display()))?;
    if chain.is_empty() {
        bail!("{} has no certificate in PEM", path.display());
    }
    Ok(chain)
}

pub fn private_key(path: &Path) -> anyhow::Result<PrivateKeyDer<'static>> {
    PrivateKeyDer::from_pem_file(path)
        .with_context(|| format!("can't read a private key in {}", path.display()))
}
