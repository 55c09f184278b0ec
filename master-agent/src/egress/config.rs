//! The sections of the configuration for the egress listeners: HTTP CONNECT, Konnectivity, SOCKS5 and proxy URLs.

use std::{net::SocketAddr, path::PathBuf, time::Duration};

use proto_config::{At, Section, Value};

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

impl HttpConnectConfig {
    pub(crate) fn read(s: &Section<'_>) -> Self {
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
    /// How long a caller may take to make its first gRPC call.
    pub head_timeout: Duration,
    /// The number of HTTP/2 connections at once on each of the two.
    pub max_connections: usize,
}

impl KonnectivityConfig {
    pub(crate) fn read(s: &Section<'_>) -> Self {
        Self {
            unix: s
                .section("unix", |s| Some(UnixConfig::read(s, "/run/master-agent-egress/konnectivity.sock"))),
            tls: s.section("tls", |s| TlsConfig::read(s, 8132)),
            head_timeout: s.duration("head_timeout", secs(10), WAIT),
            max_connections: s.number("max_connections", 16384, COUNT),
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

impl Socks5Config {
    pub(crate) fn read(s: &Section<'_>) -> Option<Self> {
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

impl Socks5TcpConfig {
    pub(crate) fn read(s: &Section<'_>) -> Self {
        let default = loopback(1080);
        let listen = s.listen("listen", Some(default)).unwrap_or(default);
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

impl ProxyUrlsConfig {
    pub(crate) fn read(s: &Section<'_>) -> Option<Self> {
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
    fn read(at: &At<'_>) -> Option<Self> {
        match at.text()? {
            "kubelet" => Some(Self::Kubelet),
            "targets" => Some(Self::Targets),
            other => at.complain(other, "expected kubelet or targets"),
        }
    }
}
