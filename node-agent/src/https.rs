//! Links to a master's front end: TLS, perhaps through an HTTP proxy, and a request that changes to another protocol.
//!
//! The credential that is shown there only opens the door. It leaves this host once the front end's certificate has
//! been verified, in TLS, and is in no log or error. Both sides prove themselves once more inside, by SSH.

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
};
use proto_config::{Section, secret_file};
use proto_net::tls::ClientTls;
use rustls::pki_types::ServerName;
use tokio::{
    io::{AsyncRead, AsyncWrite},
    net::TcpStream,
};
use tokio_rustls::TlsConnector;
use zeroize::Zeroizing;

use crate::{
    http_proxy::{Choice, Proxy},
    tcp,
};

/// Of the heads of a front end's and a proxy's answers.
const MAX_HEAD: usize = 16 * 1024;
const MAX_HEADERS: usize = 64;
/// Bytes of an answer that says why not.
const MAX_REASON: usize = 4096;
/// Characters of it that are shown.
const SHOWN: usize = 300;
/// Longer tokens are none.
const MAX_TOKEN: usize = 16 * 1024;

/// How front ends are reached. Its files are read again for every link.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct CallHomeHttps {
    /// Whom this node trusts to be a front end, and the certificate that it shows.
    pub tls: ClientTls,
    /// Holds a bearer token: a bootstrap token, or a service account's.
    pub token_file: Option<PathBuf>,
    /// The name in the front end's certificate, if it is another than the one that is dialled.
    pub server_name: Option<String>,
    pub proxy: Choice,
}

impl CallHomeHttps {
    pub fn read(s: &Section<'_>) -> Option<Self> {
        let (cert, key) = (s.file("cert"), s.private_file("key"));
        if cert.is_some() != key.is_some() {
            s.section_error("cert and key go together: give both or none");
        }
        let server_name: Option<String> = s.optional("server_name");
        if server_name.as_ref().is_some_and(|name| ServerName::try_from(name.as_str()).is_err()) {
            s.error("server_name", "is neither a DNS name nor an address");
        }
        let mut proxy = s.or("proxy", Choice::Environment);
        if let Some(file) = s.private_file("proxy_password_file") {
            proxy = proxy.with_password_file(file).unwrap_or_else(|| {
                s.error("proxy_password_file", "needs `proxy: http://USER@HOST:PORT`, without a password");
                Choice::None
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

    /// The token to present, read from its file.
    fn token(&self) -> Result<Option<String>, String> {
        let Some(file) = &self.token_file else { return Ok(None) };
        let shown = file.display();
        // Kubelet writes service accounts' tokens for everybody to read unless the pod has an `fsGroup`.
        let text = secret_file::read_public(file).map_err(|e| format!("can't read the token: {e}"))?;
        let token = text.trim();
        if token.is_empty() || token.len() > MAX_TOKEN || !token.bytes().all(|b| b.is_ascii_graphic()) {
            return Err(format!("{shown} holds no token"));
        }
        Ok(Some(token.to_owned()))
    }
}

/// A connection that has become a link.
pub struct Connected {
    pub stream: TokioIo<Upgraded>,
    /// The master's address; `None` behind a proxy.
    pub peer: Option<SocketAddr>,
    /// This host's own address towards it.
    pub local: Option<IpAddr>,
}

/// Connects to a front end on behalf of `node`. Without a credential that is configured, `token` is presented.
pub async fn connect(
    config: &CallHomeHttps,
    front_end: &Target,
    node: Option<&NodeName>,
    purpose: Purpose,
    token: Option<&str>,
    timeout: Duration,
) -> Result<Connected, String> {
    let connected = connect_within(config, front_end, node, purpose, token, timeout);
    tokio::time::timeout(timeout, connected).await.unwrap_or_else(|_| {
        Err(format!("https://{front_end} did not answer within {}", humantime::format_duration(timeout)))
    })
}

async fn connect_within(
    config: &CallHomeHttps,
    front_end: &Target,
    node: Option<&NodeName>,
    purpose: Purpose,
    token: Option<&str>,
    timeout: Duration,
) -> Result<Connected, String> {
    let proxy = config.proxy.towards(front_end).map_err(|e| e.to_string())?;
    let (files, login) = (config.clone(), proxy.clone());
    // As many as the system's own certificates.
    let read = tokio::task::spawn_blocking(move || {
        let tls = files.tls.config().map_err(|e| e.to_string())?;
        let authorization = login.map_or(Ok(None), |proxy| proxy.authorization())?;
        Ok::<_, String>((tls, files.token()?, authorization))
    });
    let (mut tls, configured, authorization) = read.await.map_err(|e| e.to_string())??;
    let token = match configured {
        Some(token) => Some(token),
        None if config.tls.identity.is_none() => token.map(str::to_owned),
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
    let name = ServerName::try_from(name).map_err(|e| format!("{}: {e}", front_end.host))?;
    let tls = TlsConnector::from(Arc::new(tls)).connect(name, socket).await;
    let tls = tls.map_err(|e| format!("no TLS with https://{front_end}, and no credential was sent: {e}"))?;
    let stream = upgrade(tls, front_end, node, purpose, token).await?;
    Ok(Connected { stream, peer, local })
}

/// Has a proxy connect to the front end (RFC 9110 §9.3.6).
async fn tunnel(
    proxy: &Proxy,
    authorization: Option<Zeroizing<String>>,
    front_end: &Target,
    socket: TcpStream,
) -> Result<TcpStream, String> {
    let failed = |what: &str| format!("the proxy {proxy} {what}");
    let authority = front_end.to_string();
    let mut request =
        Request::builder().method(Method::CONNECT).uri(&authority).header(header::HOST, &authority);
    if let Some(authorization) = authorization {
        request = request.header(header::PROXY_AUTHORIZATION, secret(&authorization)?);
    }
    let request = request.body(Empty::new()).map_err(|e| failed(&e.to_string()))?;
    match exchange(socket, request).await.map_err(|e| failed(&e))? {
        (head, Outcome::Changed(upgraded)) if head.status.is_success() => {
            let parts = upgraded.downcast::<TokioIo<TcpStream>>().map_err(|_| failed("was lost"))?;
            // TLS begins with this side.
            if !parts.read_buf.is_empty() {
                return Err(failed("sends something of its own behind its answer"));
            }
            Ok(parts.io.into_inner())
        }
        (head, _) if head.status == StatusCode::PROXY_AUTHENTICATION_REQUIRED => Err(failed(
            "wants other credentials (407): see `call_home_https.proxy` and `.proxy_password_file`",
        )),
        (head, _) => Err(failed(&format!("does not connect to {authority}: it answers {}", head.status))),
    }
}

async fn upgrade<S>(
    socket: S,
    front_end: &Target,
    node: Option<&NodeName>,
    purpose: Purpose,
    token: Option<String>,
) -> Result<TokioIo<Upgraded>, String>
where
    S: AsyncRead + AsyncWrite + Unpin + Send + 'static,
{
    let failed = |what: String| format!("https://{front_end} {what}");
    let mut request = Request::builder()
        .method(Method::POST)
        .uri(path(node, purpose))
        .header(header::HOST, front_end.to_string())
        .header(header::CONNECTION, "Upgrade")
        .header(header::UPGRADE, UPGRADE);
    if let Some(token) = &token {
        request = request.header(header::AUTHORIZATION, secret(&format!("Bearer {token}"))?);
    }
    let request = request.body(Empty::new()).map_err(|e| failed(e.to_string()))?;
    let (head, outcome) = exchange(socket, request).await.map_err(failed)?;
    let protocol = head.headers.get(header::UPGRADE).map(HeaderValue::as_bytes);
    match (head.status, outcome) {
        (StatusCode::SWITCHING_PROTOCOLS, Outcome::Changed(upgraded))
            if protocol.is_some_and(|protocol| protocol.eq_ignore_ascii_case(UPGRADE.as_bytes())) =>
        {
            Ok(TokioIo::new(upgraded))
        }
        (StatusCode::SWITCHING_PROTOCOLS, _) => Err(failed("changes to another protocol".to_owned())),
        (StatusCode::UNAUTHORIZED, _) => {
            Err(failed("does not recognise this node's credential (401); its log says why".to_owned()))
        }
        (status, Outcome::Answered(reason)) => {
            let reason = match &token {
                Some(token) => reason.replace(token.as_str(), "***"),
                None => reason,
            };
            Err(failed(format!("does not take calls home from here: it answers {status} {reason}")))
        }
        (status, Outcome::Changed(_)) => Err(failed(format!("answers {status}"))),
    }
}

fn secret(text: &str) -> Result<HeaderValue, String> {
    let mut value = HeaderValue::from_str(text).map_err(|_| "a credential can't be sent".to_owned())?;
    value.set_sensitive(true);
    Ok(value)
}

struct Head {
    status: StatusCode,
    headers: HeaderMap,
}

enum Outcome {
    Changed(Upgraded),
    /// With the reason that a Kubernetes Status gives.
    Answered(String),
}

/// Sends one request, and gives what came of it.
async fn exchange<S>(socket: S, request: Request<Empty<Bytes>>) -> Result<(Head, Outcome), String>
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
        let changed = head.status == StatusCode::SWITCHING_PROTOCOLS || connect && head.status.is_success();
        let outcome = if changed {
            Outcome::Changed(hyper::upgrade::on(response).await.map_err(broken)?)
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

fn broken(error: hyper::Error) -> String {
    if error.is_parse_too_large() {
        return "answers with an endless head".to_owned();
    }
    if error.is_parse() {
        return "does not answer in HTTP/1.1".to_owned();
    }
    format!("broke off: {error}")
}

async fn reason(response: Response<Incoming>) -> String {
    let body = Limited::new(response.into_body(), MAX_REASON).collect().await;
    let body = body.map(http_body_util::Collected::to_bytes).unwrap_or_default();
    let status: Option<serde_json::Value> = serde_json::from_slice(&body).ok();
    let message = status.as_ref().and_then(|status| status.get("message")?.as_str()).unwrap_or_default();
    message.chars().take(SHOWN).map(|c| if c.is_control() { ' ' } else { c }).collect()
}
