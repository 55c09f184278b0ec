//! Links to a master's front end: TLS, perhaps through an HTTP proxy, and a request that upgrades the connection.
//!
//! The credential that is presented there only opens the way to SSH, in which both sides prove themselves once more. It
//! leaves this host only within TLS, after the front end's certificate has been verified, and is in no log or error.

use std::{
    net::{IpAddr, SocketAddr},
    path::PathBuf,
    sync::Arc,
    time::Duration,
};

use bytes::Bytes;
use http_body_util::{BodyExt, Empty, Limited};
use hyper::{
    HeaderMap, Method, Request, Response, StatusCode,
    body::Incoming,
    client::conn::http1,
    header::{self, HeaderValue},
    upgrade::Upgraded,
};
use hyper_util::rt::TokioIo;
use proto::{
    NodeName, Target,
    call_home::{Purpose, UPGRADE, path},
    join::Admission,
    refusal::{LONGEST_WAIT, printable},
};
use proto_config::{Meanings, Section, secret_file};
use proto_net::{
    read_ahead::ReadAhead,
    tls::{ClientTls, FileError},
};
use rustls::pki_types::{InvalidDnsNameError, ServerName};
use tokio::io::{AsyncRead, AsyncWrite};
use tokio_rustls::TlsConnector;
use zeroize::Zeroizing;

use crate::{
    http_proxy::{CredentialsError, InvalidProxy, Proxy, ProxyChoice},
    tcp::{self, ConnectError},
};

/// The size of the head of a front end's or a proxy's answer.
const MAX_HEAD: usize = 16 * 1024;
const MAX_HEADERS: usize = 64;
/// Bytes that are read of an answer that refuses.
const MAX_REASON: usize = 4096;
const MAX_TOKEN: usize = 16 * 1024;

/// Why there is no link.
#[derive(Debug, thiserror::Error)]
pub enum HttpsError {
    #[error("https://{front_end} did not answer within {}", humantime::format_duration(*limit))]
    TimedOut { front_end: Target, limit: Duration },
    #[error(transparent)]
    ProxyAddress(#[from] InvalidProxy),
    #[error(transparent)]
    ProxyCredentials(#[from] CredentialsError),
    #[error(transparent)]
    TlsFile(#[from] FileError),
    #[error("can't read the token: {0}")]
    TokenFile(std::io::Error),
    #[error("{} holds no token", .0.display())]
    NoToken(PathBuf),
    #[error("the task that reads files failed: {0}")]
    Task(tokio::task::JoinError),
    #[error("a credential can't be sent")]
    UnsendableCredential,
    #[error(transparent)]
    Connect(#[from] ConnectError),
    #[error("{name}: {error}")]
    ServerName { name: String, error: InvalidDnsNameError },
    #[error("no TLS with https://{front_end}, and no credential was sent: {error}")]
    Tls { front_end: Target, error: std::io::Error },
    #[error("the proxy http://{proxy} {fault}")]
    Proxy { proxy: Target, fault: AnswerFault },
    #[error("https://{front_end} {fault}")]
    FrontEnd { front_end: Target, fault: AnswerFault },
}

/// What is wrong with the answer of a front end or a proxy.
#[derive(Debug, thiserror::Error)]
pub enum AnswerFault {
    #[error("can't be asked: {0}")]
    Request(#[from] hyper::http::Error),
    #[error("answers with an endless head")]
    EndlessHead,
    #[error("does not answer in HTTP/1.1")]
    NotHttp,
    #[error("broke off: {0}")]
    Broken(hyper::Error),
    #[error("was lost")]
    Lost,
    #[error("sends something of its own behind its answer")]
    BytesAfterAnswer,
    #[error("wants other credentials (407): see `call_home_https.proxy` and `.proxy_password_file`")]
    ProxyAuthentication,
    #[error("does not connect to {authority}: it answers {status}")]
    NotConnected { authority: String, status: StatusCode },
    #[error("changes to another protocol")]
    OtherProtocol,
    #[error("does not recognise this node's credential (401); its log says why")]
    Unauthorized,
    #[error("does not take calls home from here: it answers {status} {reason}")]
    Refused {
        status: StatusCode,
        reason: String,
        /// After what time to call again, if the answer says so.
        retry_after: Option<Duration>,
    },
    #[error("answers {0}")]
    Unexpected(StatusCode),
}

impl HttpsError {
    /// After what time the front end wants to be called again, if it says so.
    pub fn retry_after(&self) -> Option<Duration> {
        let Self::FrontEnd { fault: AnswerFault::Refused { retry_after, .. }, .. } = self else {
            return None;
        };
        *retry_after
    }

    /// Whether the master itself has not answered. Something before it may have, such as a proxy or a balancer.
    pub fn is_without_answer(&self) -> bool {
        match self {
            Self::TimedOut { .. } | Self::Connect(_) | Self::Tls { .. } | Self::Proxy { .. } => true,
            Self::FrontEnd { fault, .. } => fault.is_without_answer(),
            Self::ProxyAddress(_)
            | Self::ProxyCredentials(_)
            | Self::TlsFile(_)
            | Self::TokenFile(_)
            | Self::NoToken(_)
            | Self::Task(_)
            | Self::UnsendableCredential
            | Self::ServerName { .. } => false,
        }
    }
}

impl AnswerFault {
    fn is_without_answer(&self) -> bool {
        match self {
            Self::Broken(_) | Self::Lost => true,
            // A master says when to call again.
            Self::Refused { status, retry_after: None, .. } => matches!(
                *status,
                StatusCode::BAD_GATEWAY | StatusCode::SERVICE_UNAVAILABLE | StatusCode::GATEWAY_TIMEOUT
            ),
            Self::Refused { .. }
            | Self::Request(_)
            | Self::EndlessHead
            | Self::NotHttp
            | Self::BytesAfterAnswer
            | Self::ProxyAuthentication
            | Self::NotConnected { .. }
            | Self::OtherProtocol
            | Self::Unauthorized
            | Self::Unexpected(_) => false,
        }
    }
}

/// How front ends are reached. Its files are read again for every link.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct CallHomeHttps {
    /// The CA that this node trusts, and the certificate that it shows.
    pub tls: ClientTls,
    /// The file of a bearer token, which is a bootstrap token or a service account's.
    pub token_file: Option<PathBuf>,
    /// The name in the front end's certificate, if it differs from the one that is dialled.
    pub server_name: Option<String>,
    pub proxy: ProxyChoice,
}

const FIELDS: Meanings = &[
    ("ca", "The CA of the front ends' certificates. By default, the CAs of the system."),
    (
        "cert",
        "A client certificate, for the user system:node:NAME in the group system:nodes. This or token_file \
         is required for https://.",
    ),
    ("key", "The key of cert, with mode 0600 or 0640."),
    ("token_file", "A file with a bearer token: a bootstrap token, or a service account's."),
    ("server_name", "The name in the front end's certificate. By default, the name that is dialled."),
    (
        "proxy",
        "The HTTP proxy: environment (HTTPS_PROXY and NO_PROXY), none, or \
         http://[USER[:PASSWORD]@]HOST:PORT.",
    ),
    (
        "proxy_password_file",
        "A file whose only line is the password of the user in proxy. Its mode is 0600 or 0640.",
    ),
];

impl CallHomeHttps {
    pub fn read(s: &Section<'_>) -> Option<Self> {
        s.document(FIELDS);
        let (cert, key) = (s.file("cert"), s.private_file("key"));
        if cert.is_some() != key.is_some() {
            s.section_error("cert and key go together: give both or none");
        }
        let server_name: Option<String> = s.optional("server_name");
        if server_name.as_ref().is_some_and(|name| ServerName::try_from(name.as_str()).is_err()) {
            s.error("server_name", "is neither a DNS name nor an address");
        }
        let mut proxy = s.or("proxy", ProxyChoice::Environment);
        if let Some(file) = s.private_file("proxy_password_file") {
            proxy = proxy.with_password_file(file).unwrap_or_else(|| {
                s.error("proxy_password_file", "needs `proxy: http://USER@HOST:PORT`, without a password");
                ProxyChoice::None
            });
        }
        Some(Self {
            tls: ClientTls { ca: s.file("ca"), identity: cert.zip(key) },
            token_file: s.file("token_file"),
            server_name,
            proxy,
        })
    }

    pub fn has_credential(&self) -> bool {
        self.tls.identity.is_some() || self.token_file.is_some()
    }

    /// Reads the token to present.
    fn token(&self) -> Result<Option<String>, HttpsError> {
        let Some(file) = &self.token_file else { return Ok(None) };
        // Kubelet writes service accounts' tokens for everybody to read unless the pod has an `fsGroup`.
        let text = secret_file::read_public(file).map_err(HttpsError::TokenFile)?;
        let token = text.trim();
        if token.is_empty() || token.len() > MAX_TOKEN || !token.bytes().all(|b| b.is_ascii_graphic()) {
            return Err(HttpsError::NoToken(file.clone()));
        }
        Ok(Some(token.to_owned()))
    }
}

/// What is asked of a front end.
#[derive(Clone, Copy)]
pub struct LinkRequest<'a> {
    pub front_end: &'a Target,
    /// The node on whose behalf the link is made.
    pub node: Option<&'a NodeName>,
    pub purpose: Purpose,
    /// The token that is presented if the configuration has no credential.
    pub admission: Option<&'a Admission>,
}

/// A connection that has become a link.
pub struct HttpsLink {
    pub stream: TokioIo<Upgraded>,
    /// The master's address; `None` behind a proxy.
    pub peer: Option<SocketAddr>,
    /// This host's own address towards it.
    pub local: Option<IpAddr>,
}

/// Connects to a front end, and makes the connection a link.
pub async fn connect(
    config: &CallHomeHttps,
    request: LinkRequest<'_>,
    timeout: Duration,
) -> Result<HttpsLink, HttpsError> {
    tokio::time::timeout(timeout, connect_within(config, request, timeout)).await.unwrap_or_else(|_| {
        Err(HttpsError::TimedOut { front_end: request.front_end.clone(), limit: timeout })
    })
}

async fn connect_within(
    config: &CallHomeHttps,
    request: LinkRequest<'_>,
    timeout: Duration,
) -> Result<HttpsLink, HttpsError> {
    let front_end = request.front_end;
    let proxy = config.proxy.towards(front_end)?;
    let (files, login) = (config.clone(), proxy.clone());
    // The system's own CA certificates alone are more than a hundred files.
    let read = tokio::task::spawn_blocking(move || {
        let tls = files.tls.config()?;
        let authorization = login.map_or(Ok(None), |proxy| proxy.authorization())?;
        Ok::<_, HttpsError>((tls, files.token()?, authorization))
    });
    let (mut tls, configured, authorization) = read.await.map_err(HttpsError::Task)??;
    let token = match configured {
        Some(token) => Some(token),
        None if config.tls.identity.is_none() => request.admission.map(Admission::to_string),
        None => None,
    };
    tls.alpn_protocols = vec![b"http/1.1".to_vec()];

    let socket = tcp::connect(proxy.as_ref().map_or(front_end, |proxy| &proxy.address), timeout).await?;
    let local = socket.local_addr().ok().map(|address| address.ip());
    let (socket, peer) = match &proxy {
        Some(proxy) => (tunnel(proxy, authorization, front_end, socket).await?, None),
        None => {
            let peer = socket.peer_addr().ok();
            (socket, peer)
        }
    };
    let name = config.server_name.clone().unwrap_or_else(|| front_end.host.to_string());
    let name = ServerName::try_from(name.clone()).map_err(|error| HttpsError::ServerName { name, error })?;
    let tls = TlsConnector::from(Arc::new(tls)).connect(name, ReadAhead::new(socket)).await;
    let tls = tls.map_err(|error| HttpsError::Tls { front_end: front_end.clone(), error })?;
    let stream = upgrade(tls, request, token).await?;
    Ok(HttpsLink { stream, peer, local })
}

/// Has a proxy connect to the front end (RFC 9110 §9.3.6).
pub async fn tunnel<S>(
    proxy: &Proxy,
    authorization: Option<Zeroizing<String>>,
    front_end: &Target,
    socket: S,
) -> Result<S, HttpsError>
where
    S: AsyncRead + AsyncWrite + Unpin + Send + 'static,
{
    let failed = |fault| HttpsError::Proxy { proxy: proxy.address.clone(), fault };
    let authority = front_end.to_string();
    let mut request =
        Request::builder().method(Method::CONNECT).uri(&authority).header(header::HOST, &authority);
    if let Some(authorization) = authorization {
        request = request.header(header::PROXY_AUTHORIZATION, secret(&authorization)?);
    }
    let request = request.body(Empty::new()).map_err(|e| failed(e.into()))?;
    match exchange(socket, request).await.map_err(failed)? {
        (head, Outcome::Upgraded(upgraded)) if head.status.is_success() => {
            let parts = upgraded.downcast::<TokioIo<S>>().map_err(|_| failed(AnswerFault::Lost))?;
            // This side speaks first in TLS.
            if !parts.read_buf.is_empty() {
                return Err(failed(AnswerFault::BytesAfterAnswer));
            }
            Ok(parts.io.into_inner())
        }
        (head, _) if head.status == StatusCode::PROXY_AUTHENTICATION_REQUIRED => {
            Err(failed(AnswerFault::ProxyAuthentication))
        }
        (head, _) => Err(failed(AnswerFault::NotConnected { authority, status: head.status })),
    }
}

/// Upgrades a connection to a link (RFC 9110 §7.8).
pub async fn upgrade<S>(
    socket: S,
    request: LinkRequest<'_>,
    token: Option<String>,
) -> Result<TokioIo<Upgraded>, HttpsError>
where
    S: AsyncRead + AsyncWrite + Unpin + Send + 'static,
{
    let LinkRequest { front_end, node, purpose, admission: _ } = request;
    let failed = |fault| HttpsError::FrontEnd { front_end: front_end.clone(), fault };
    let mut request = Request::builder()
        .method(Method::POST)
        .uri(path(node, purpose))
        .header(header::HOST, front_end.to_string())
        .header(header::CONNECTION, "Upgrade")
        .header(header::UPGRADE, UPGRADE);
    if let Some(token) = &token {
        request = request.header(header::AUTHORIZATION, secret(&format!("Bearer {token}"))?);
    }
    let request = request.body(Empty::new()).map_err(|e| failed(e.into()))?;
    let (head, outcome) = exchange(socket, request).await.map_err(failed)?;
    let protocol = head.headers.get(header::UPGRADE).map(HeaderValue::as_bytes);
    match (head.status, outcome) {
        (StatusCode::SWITCHING_PROTOCOLS, Outcome::Upgraded(upgraded))
            if protocol.is_some_and(|protocol| protocol.eq_ignore_ascii_case(UPGRADE.as_bytes())) =>
        {
            Ok(TokioIo::new(upgraded))
        }
        (StatusCode::SWITCHING_PROTOCOLS, _) => Err(failed(AnswerFault::OtherProtocol)),
        (StatusCode::UNAUTHORIZED, _) => Err(failed(AnswerFault::Unauthorized)),
        (status, Outcome::Answered(reason)) => {
            let reason = match &token {
                Some(token) => reason.replace(token.as_str(), "***"),
                None => reason,
            };
            Err(failed(AnswerFault::Refused { status, reason, retry_after: retry_after(&head.headers) }))
        }
        (status, Outcome::Upgraded(_)) => Err(failed(AnswerFault::Unexpected(status))),
    }
}

fn secret(text: &str) -> Result<HeaderValue, HttpsError> {
    let mut value = HeaderValue::from_str(text).map_err(|_| HttpsError::UnsendableCredential)?;
    value.set_sensitive(true);
    Ok(value)
}

struct Head {
    status: StatusCode,
    headers: HeaderMap,
}

enum Outcome {
    Upgraded(Upgraded),
    /// An answer, with the reason that it gives if it is a Kubernetes Status.
    Answered(String),
}

/// Sends one request, and returns what came of it.
async fn exchange<S>(socket: S, request: Request<Empty<Bytes>>) -> Result<(Head, Outcome), AnswerFault>
where
    S: AsyncRead + AsyncWrite + Unpin + Send + 'static,
{
    let connect = request.method() == Method::CONNECT;
    let mut builder = http1::Builder::new();
    builder.max_buf_size(MAX_HEAD).max_headers(MAX_HEADERS);
    let (mut sender, connection) = builder.handshake(TokioIo::new(socket)).await.map_err(broken)?;
    let answered = async {
        let mut response = sender.send_request(request).await.map_err(broken)?;
        let head = Head { status: response.status(), headers: std::mem::take(response.headers_mut()) };
        let upgraded = head.status == StatusCode::SWITCHING_PROTOCOLS || connect && head.status.is_success();
        let outcome = if upgraded {
            Outcome::Upgraded(hyper::upgrade::on(response).await.map_err(broken)?)
        } else {
            Outcome::Answered(reason(response).await)
        };
        Ok((head, outcome))
    };
    let connection = connection.with_upgrades();
    tokio::pin!(answered);
    tokio::select! {
        answered = &mut answered => answered,
        _ = connection => answered.await,
    }
}

fn broken(error: hyper::Error) -> AnswerFault {
    if error.is_parse_too_large() {
        return AnswerFault::EndlessHead;
    }
    if error.is_parse() {
        return AnswerFault::NotHttp;
    }
    AnswerFault::Broken(error)
}

/// The seconds of a Retry-After (RFC 9110 §10.2.3). A date, which depends on this host's clock, counts as none.
fn retry_after(headers: &HeaderMap) -> Option<Duration> {
    let seconds = headers.get(header::RETRY_AFTER)?.to_str().ok()?.trim().parse().ok()?;
    Some(Duration::from_secs(seconds).min(LONGEST_WAIT))
}

async fn reason(response: Response<Incoming>) -> String {
    let body = Limited::new(response.into_body(), MAX_REASON).collect().await;
    let body = body.map(http_body_util::Collected::to_bytes).unwrap_or_default();
    let status: Option<serde_json::Value> = serde_json::from_slice(&body).ok();
    let message = status.as_ref().and_then(|status| status.get("message")?.as_str()).unwrap_or_default();
    printable(message)
}
