//! The `front_end` section of the configuration.

use std::net::SocketAddr;

use access::{authn::AuthnConfig, authz::config::AuthzConfig};
use proto_config::{Meanings, Section};

use super::{audit::AuditConfig, limits::LimitsConfig, tls::ServingCertificate, upstream::UpstreamConfig};
use crate::fields::{NO_LISTENER, UnixConfig, any, listen_loopback};

/// The `front_end` section.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct FrontEndConfig {
    pub listen: SocketAddr,
    /// The serving certificates. The first one also serves names that no certificate contains.
    pub certificates: Vec<ServingCertificate>,
    pub authn: AuthnConfig,
    pub authz: AuthzConfig,
    /// Whether to authorize also the requests that go to kube-apiserver, which authorizes them again.
    pub authorize_everything: bool,
    /// Whether to answer proxy URLs of nodes, pods and services through tunnels instead of passing them to
    /// kube-apiserver.
    pub serve_proxy_urls: bool,
    /// Whether to serve the agent's page.
    pub serve_page: bool,
    /// Whether to serve callers that come through their node's tunnel.
    pub through_tunnels: bool,
    /// Whether nodes call home and hosts join over this port. `None` means that they do if there is a call-home port.
    pub call_home: Option<bool>,
    pub upstream: UpstreamConfig,
    /// The plain port, if it is configured.
    pub local: Option<LocalConfig>,
    pub limits: LimitsConfig,
    pub audit: AuditConfig,
}

const FIELDS: Meanings = &[
    ("listen", "The address to listen on."),
    (
        "certificates",
        "The serving certificates, chosen by the name that a caller asks for. The first is also for all \
         other names.",
    ),
    (
        "authorization",
        "What callers may do: the authorizers, in the order in which they are asked. Without any, nothing is \
         allowed.",
    ),
    ("authorize_everything", "Also authorizes what goes to kube-apiserver, which authorizes it again."),
    (
        "call_home",
        "Nodes call home, and hosts join, over this port. Default: true if there is a section call_home.",
    ),
    ("serve_page", "Serves the page at /agent/page/, to callers whom the authorizers let in."),
    (
        "serve_proxy_urls",
        "Answers proxy URLs of nodes, pods and services through tunnels, as proxy_urls says, rather than \
         handing them on.",
    ),
    ("through_tunnels", "Serves callers of nodes' local endpoints, who come through their node's tunnel."),
    ("upstream", "Where kube-apiserver is, and how it is reached."),
    (
        "local",
        "A plain port for components on this host, without TLS and credentials. It needs unix, tcp or both.",
    ),
    ("limits", "What callers may use."),
    ("audit", "The audit log, with one JSON line for each request."),
];

impl FrontEndConfig {
    pub fn read(s: &Section<'_>) -> Option<Self> {
        s.document(FIELDS);
        let listen = s.listen("listen", any(6443));
        let certificates: Vec<_> =
            s.items("certificates").iter().filter_map(|at| at.section(ServingCertificate::read)).collect();
        s.states_required("certificates");
        if certificates.is_empty() {
            s.error("certificates", "needs at least one {cert: FILE, key: FILE}");
        }
        let upstream = s.section("upstream", UpstreamConfig::read);
        s.states_required("upstream");
        if s.at("upstream").is_none() {
            s.error("upstream", "is required: where kube-apiserver is");
        }
        let config = Self {
            listen,
            certificates,
            authn: AuthnConfig::read(s),
            authz: AuthzConfig::read(s, "authorization"),
            authorize_everything: s.or("authorize_everything", false),
            serve_proxy_urls: s.or("serve_proxy_urls", false),
            serve_page: s.or("serve_page", false),
            through_tunnels: s.or("through_tunnels", true),
            call_home: s.optional("call_home"),
            limits: s.section_or_default("limits", LimitsConfig::read),
            audit: s.section_or_default("audit", AuditConfig::read),
            local: s.section("local", LocalConfig::read),
            upstream: upstream?,
        };
        Some(config)
    }
}

/// The `local` section, which configures the plain port.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LocalConfig {
    pub unix: Option<UnixConfig>,
    /// A loopback address.
    pub tcp: Option<SocketAddr>,
    /// The user name of all callers.
    pub user: String,
    pub groups: Vec<String>,
}

const LOCAL_FIELDS: Meanings = &[
    ("unix", "The Unix socket to listen on."),
    ("tcp", "The TCP address to listen on, which is a loopback address."),
    ("user", "The user as which kube-apiserver sees all callers of the plain port."),
    ("groups", "The groups of that user."),
];

impl LocalConfig {
    fn read(s: &Section<'_>) -> Option<Self> {
        s.document(LOCAL_FIELDS);
        let unix = s.section("unix", |s| Some(UnixConfig::read(s, "/run/master-agent-local/apiserver.sock")));
        let tcp = s.section("tcp", |s| Some(listen_loopback(s, 8080)));
        if s.at("unix").is_none() && s.at("tcp").is_none() {
            s.section_error(NO_LISTENER);
        }
        let user: Option<String> = s.required("user");
        if user.as_deref().is_some_and(str::is_empty) {
            s.error("user", "is empty: who are the callers of the plain port to kube-apiserver?");
        }
        let groups = s.list("groups");
        Some(Self { unix, tcp, user: user?, groups })
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use proto_config::{Source, parse};

    use super::*;

    #[test]
    fn the_defaults_have_room_for_a_hundred_thousand_watches() {
        const WATCHES: usize = 100_000;
        // Some versions of kube-apiserver allow no more on one connection.
        const STREAMS: usize = 100;
        let text =
            "certificates: [{cert: tls.crt, key: tls.key}]\nupstream: {servers: ['http://127.0.0.1']}\n";
        let source = Source { origin: "test", base_dir: Path::new("/"), check_files: false };
        let FrontEndConfig { upstream, limits, .. } = parse(text, source, FrontEndConfig::read).unwrap();
        assert!(upstream.http2 && upstream.max_connections * STREAMS >= WATCHES);
        assert!(limits.max_long_running >= WATCHES);
        let streams = limits.max_streams as usize;
        assert!(limits.max_connections * streams >= WATCHES);
        assert!(limits.max_connections_per_address * streams >= WATCHES, "they may come through a balancer");
    }
}
