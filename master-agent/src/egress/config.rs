//! The sections of the configuration for the egress listeners: HTTP CONNECT, Konnectivity, SOCKS5 and proxy URLs.

use std::{net::SocketAddr, path::PathBuf, time::Duration};

use proto_config::{At, Meanings, Section, Shape, Value};

use crate::fields::{COUNT, NO_LISTENER, TlsConfig, UnixConfig, WAIT, listen_loopback, loopback, secs};

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct HttpConnectConfig {
    pub unix: Option<UnixConfig>,
    pub tls: Option<TlsConfig>,
    /// How long a caller may take to send the head of its request.
    pub head_timeout: Duration,
    /// How long one direction of a stream may be silent after the other has ended.
    pub half_closed_timeout: Duration,
    /// The number of callers at once on each of the two.
    pub max_connections: usize,
}

const HTTP_CONNECT_FIELDS: Meanings = &[
    ("unix", "The Unix socket to listen on."),
    ("tls", "The TCP address to listen on, with TLS that requires a certificate of every caller."),
    ("head_timeout", "Time for a caller to send its request, and for its TLS handshake."),
    ("half_closed_timeout", "How long a stream may be silent after one direction has ended."),
    ("max_connections", "Callers at once on each of the two listeners."),
];

impl HttpConnectConfig {
    pub(crate) fn read(s: &Section<'_>) -> Self {
        s.document(HTTP_CONNECT_FIELDS);
        Self {
            unix: s.section("unix", |s| Some(UnixConfig::read(s, "/run/master-agent-egress/connect.sock"))),
            tls: s.section("tls", |s| TlsConfig::read(s, 8131)),
            head_timeout: s.duration("head_timeout", secs(10), WAIT),
            half_closed_timeout: s.duration("half_closed_timeout", secs(600), WAIT),
            max_connections: s.number("max_connections", 16384, COUNT),
        }
    }
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct KonnectivityConfig {
    pub unix: Option<UnixConfig>,
    pub tls: Option<TlsConfig>,
    /// How long a caller may take for its TLS handshake, and then to make its first gRPC call.
    pub head_timeout: Duration,
    /// The number of HTTP/2 connections at once on each of the two.
    pub max_connections: usize,
    /// The number of dials and connections to targets at once on one HTTP/2 connection.
    pub max_dials: usize,
}

const KONNECTIVITY_FIELDS: Meanings = &[
    ("unix", "The Unix socket to listen on."),
    ("tls", "The TCP address to listen on, with TLS that requires a certificate of every caller."),
    ("head_timeout", "Time for a caller to make its first gRPC call, and for its TLS handshake."),
    ("max_connections", "HTTP/2 connections at once on each of the two listeners."),
    (
        "max_dials",
        "Dials and connections to targets at once on one HTTP/2 connection. Further dials fail with an error that says so.",
    ),
];

impl KonnectivityConfig {
    pub(crate) fn read(s: &Section<'_>) -> Self {
        s.document(KONNECTIVITY_FIELDS);
        Self {
            unix: s
                .section("unix", |s| Some(UnixConfig::read(s, "/run/master-agent-egress/konnectivity.sock"))),
            tls: s.section("tls", |s| TlsConfig::read(s, 8132)),
            head_timeout: s.duration("head_timeout", secs(10), WAIT),
            max_connections: s.number("max_connections", 16384, COUNT),
            max_dials: s.number("max_dials", 8192, COUNT),
        }
    }
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Socks5Config {
    pub unix: Option<UnixConfig>,
    pub tcp: Option<Socks5TcpConfig>,
    /// How long a caller may take for the handshake.
    pub head_timeout: Duration,
    pub half_closed_timeout: Duration,
    /// The number of callers at once on each of the two.
    pub max_connections: usize,
}

const SOCKS5_FIELDS: Meanings = &[
    ("unix", "The Unix socket to listen on."),
    ("tcp", "The TCP address to listen on."),
    ("head_timeout", "Time for a caller's handshake."),
    ("half_closed_timeout", "How long a stream may be silent after one direction has ended."),
    ("max_connections", "Callers at once on each of the two listeners."),
];

impl Socks5Config {
    pub(crate) fn read(s: &Section<'_>) -> Option<Self> {
        s.document(SOCKS5_FIELDS);
        let config = Self {
            unix: s.section("unix", |s| Some(UnixConfig::read(s, "/run/master-agent-people/socks5.sock"))),
            tcp: s.section("tcp", |s| Some(Socks5TcpConfig::read(s))),
            head_timeout: s.duration("head_timeout", secs(10), WAIT),
            half_closed_timeout: s.duration("half_closed_timeout", secs(600), WAIT),
            max_connections: s.number("max_connections", 4096, COUNT),
        };
        if config.unix.is_none() && config.tcp.is_none() {
            s.section_error(NO_LISTENER);
        }
        Some(config)
    }
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Socks5TcpConfig {
    /// A loopback address unless there is a users file.
    pub listen: SocketAddr,
    /// The file of [`super::socks5::users::Users`].
    pub users_file: Option<PathBuf>,
}

const SOCKS5_TCP_FIELDS: Meanings = &[
    ("listen", "The address to listen on. An address that is not loopback needs users_file."),
    (
        "users_file",
        "Lines that `master-agent hash-password NAME` prints, with mode 0600 or 0640. With this file, every \
         caller must log in. SOCKS5 sends passwords in the clear: use it beyond loopback only on networks \
         that you trust.",
    ),
];

impl Socks5TcpConfig {
    pub(crate) fn read(s: &Section<'_>) -> Self {
        s.document(SOCKS5_TCP_FIELDS);
        let listen = s.listen("listen", loopback(1080));
        let authenticated = s.at("users_file").is_some();
        if !authenticated && !listen.ip().to_canonical().is_loopback() {
            s.error(
                "listen",
                format!("{listen} must be a loopback address unless users_file says who may call"),
            );
        }
        Self { listen, users_file: s.private_file("users_file") }
    }
}

/// The egress listener for the proxy URLs of kube-apiserver.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ProxyUrlsConfig {
    pub unix: Option<UnixConfig>,
    /// A loopback address.
    pub tcp: Option<SocketAddr>,
    /// The CA of the serving certificates of kubelets.
    pub kubelet_ca: Option<PathBuf>,
    /// The certificate that kubelets are shown, and its key.
    pub kubelet_client: Option<(PathBuf, PathBuf)>,
    /// The CA of the certificates of pods, services and other ports of nodes.
    pub target_ca: Option<PathBuf>,
    pub insecure_skip_verify: Vec<Unverified>,
    /// How long a caller may take to send the head of a request.
    pub head_timeout: Duration,
    /// How long a connection may wait for its next request.
    pub idle_timeout: Duration,
    pub half_closed_timeout: Duration,
    /// The number of callers at once on each of the two.
    pub max_connections: usize,
}

const PROXY_URLS_FIELDS: Meanings = &[
    ("unix", "The Unix socket to listen on."),
    ("tcp", "The TCP address to listen on, which is a loopback address."),
    (
        "kubelet_ca",
        "The CA whose certificate kubelets must present, for the node's name or one of its addresses.",
    ),
    ("kubelet_client_cert", "The certificate that is presented to kubelets."),
    ("kubelet_client_key", "The key of kubelet_client_cert, with mode 0600 or 0640."),
    (
        "target_ca",
        "The CA of the certificates of pods (NAME.NAMESPACE.pod, or address) and services \
         (NAME.NAMESPACE.svc).",
    ),
    ("insecure_skip_verify", "Whose certificates are not verified."),
    ("head_timeout", "Time for a caller to send the head of a request."),
    (
        "idle_timeout",
        "Time for a connection to wait for its next request, and for the next bytes of a body before the \
         response.",
    ),
    ("half_closed_timeout", "How long an upgraded connection may be silent after one direction has ended."),
    ("max_connections", "Callers at once on each of the two listeners."),
];

impl ProxyUrlsConfig {
    pub(crate) fn read(s: &Section<'_>) -> Option<Self> {
        s.document(PROXY_URLS_FIELDS);
        let client_cert = s.file("kubelet_client_cert");
        let client_key = s.private_file("kubelet_client_key");
        if client_cert.is_some() != client_key.is_some() {
            s.section_error("kubelet_client_cert and kubelet_client_key go together: give both or none");
        }
        let config = Self {
            unix: s
                .section("unix", |s| Some(UnixConfig::read(s, "/run/master-agent-people/proxy-urls.sock"))),
            tcp: s.section("tcp", |s| Some(listen_loopback(s, 8130))),
            kubelet_ca: s.file("kubelet_ca"),
            kubelet_client: client_cert.zip(client_key),
            target_ca: s.file("target_ca"),
            insecure_skip_verify: s.list("insecure_skip_verify"),
            head_timeout: s.duration("head_timeout", secs(10), WAIT),
            idle_timeout: s.duration("idle_timeout", secs(120), WAIT),
            half_closed_timeout: s.duration("half_closed_timeout", secs(600), WAIT),
            max_connections: s.number("max_connections", 4096, COUNT),
        };
        Some(config)
    }
}

/// The kinds of targets whose certificates are not verified.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Unverified {
    Kubelet,
    Targets,
}

impl Value for Unverified {
    const SHAPE: Shape = Shape::Words(&["kubelet", "targets"]);

    fn read(at: &At<'_>) -> Option<Self> {
        match at.text()? {
            "kubelet" => Some(Self::Kubelet),
            "targets" => Some(Self::Targets),
            other => at.complain(other, "expected kubelet or targets"),
        }
    }
}
