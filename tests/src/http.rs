//! Sends requests over HTTP/1.1, plain or over TLS, each on a connection of its own.

use std::{path::Path, sync::Arc};

use anyhow::{Context, bail};
use hyper::{Request, Response, Uri, body::Incoming, header};
use hyper_util::rt::TokioIo;
use rustls::{ClientConfig, pki_types::ServerName};
use tokio::net::TcpStream;
use tokio_rustls::TlsConnector;

use crate::{client::Stream, pki::client_config};

/// Where requests go: `http://HOST:PORT/PREFIX` or `https://…`.
#[derive(Clone)]
pub struct Base {
    authority: String,
    host: String,
    prefix: String,
    tls: Option<Arc<ClientConfig>>,
}

impl Base {
    /// `ca` is for `https`.
    pub fn new(url: &str, ca: Option<&Path>) -> anyhow::Result<Self> {
        let uri: Uri = url.parse()?;
        let authority = uri.authority().with_context(|| format!("no host in {url}"))?;
        let tls = match (uri.scheme_str(), ca) {
            (Some("http"), None) => None,
            (Some("https"), Some(ca)) => Some(client_config(ca, None)?),
            _ => bail!("{url} is neither http nor https with a CA"),
        };
        Ok(Self {
            authority: authority.to_string(),
            host: authority.host().trim_matches(['[', ']']).to_owned(),
            prefix: uri.path().trim_end_matches('/').to_owned(),
            tls,
        })
    }

    /// Sends a request whose path is one below the base; gives the answer once its head has come. Upgrades work.
    pub async fn send<B>(&self, mut request: Request<B>) -> anyhow::Result<Response<Incoming>>
    where
        B: hyper::body::Body + Send + 'static,
        B::Data: Send,
        B::Error: Into<Box<dyn std::error::Error + Send + Sync>>,
    {
        let target = request.uri().path_and_query().map_or("/", |target| target.as_str());
        *request.uri_mut() = format!("{}{target}", self.prefix).parse()?;
        request.headers_mut().insert(header::HOST, self.authority.parse()?);
        let socket = TokioIo::new(self.connect().await?);
        let (mut sender, connection) = hyper::client::conn::http1::handshake(socket).await?;
        tokio::spawn(connection.with_upgrades());
        Ok(sender.send_request(request).await?)
    }

    async fn connect(&self) -> anyhow::Result<Stream> {
        let socket = TcpStream::connect(&self.authority).await?;
        socket.set_nodelay(true)?;
        Ok(match &self.tls {
            Some(config) => {
                let name = ServerName::try_from(self.host.clone())?;
                Box::new(TlsConnector::from(config.clone()).connect(name, socket).await?)
            }
            None => Box::new(socket),
        })
    }
}

/// The parameters of a query, decoded.
pub fn parameters(query: &str) -> Vec<(String, String)> {
    let decode = |text: &str| {
        let text = text.replace('+', " ");
        percent_encoding::percent_decode_str(&text).decode_utf8_lossy().into_owned()
    };
    let pairs = query.split('&').filter(|pair| !pair.is_empty());
    pairs
        .map(|pair| pair.split_once('=').unwrap_or((pair, "")))
        .map(|(k, v)| (decode(k), decode(v)))
        .collect()
}
