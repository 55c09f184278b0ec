//! The `front_end` section of the configuration.

use std::net::SocketAddr;

use access::{authn::AuthnConfig, authz::config::AuthzConfig};
use proto_config::Section;

use super::{audit::AuditConfig, limits::LimitsConfig, tls::ServingCertificate, upstream::UpstreamConfig};
use crate::fields::{NO_LISTENER, UnixConfig, any, listen_loopback};

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct FrontEndConfig {
    pub listen: SocketAddr,
    /// The first one also serves names that none is for.
    pub certificates: Vec<ServingCertificate>,
    pub authn: AuthnConfig,
    pub authz: AuthzConfig,
    /// Authorizes also what goes to kube-apiserver, which authorizes it again.
    pub authorize_everything: bool,
    /// Answers proxy URLs of nodes, pods and services here, through tunnels, rather than let kube-apiserver answer them.
    pub serve_proxy_urls: bool,
    /// Answers the page here.
    pub serve_page: bool,
    /// Serves callers that come through their node's tunnel.
    pub through_tunnels: bool,
    /// Lets nodes call home and hosts join over this port. `None` does so if they may over a port of their own.
    pub call_home: Option<bool>,
    pub upstream: UpstreamConfig,
    /// The plain port, if there is to be one.
    pub local: Option<LocalConfig>,
    pub limits: LimitsConfig,
    pub audit: AuditConfig,
}

impl FrontEndConfig {
    pub fn read(s: &Section<'_>) -> Option<Self> {
        let listen = s.listen("listen", Some(any(6443)));
        let certificates: Vec<_> =
            s.items("certificates").iter().filter_map(|at| at.section(ServingCertificate::read)).collect();
        if certificates.is_empty() {
            s.error("certificates", "needs at least one {cert: FILE, key: FILE}");
        }
        let upstream = s.section("upstream", UpstreamConfig::read);
        if s.at("upstream").is_none() {
            s.error("upstream", "is required: where kube-apiserver is");
        }
        let config = Self {
            listen: listen?,
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

/// The plain port.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LocalConfig {
    pub unix: Option<UnixConfig>,
    /// A loopback address.
    pub tcp: Option<SocketAddr>,
    /// The user that all callers are.
    pub user: String,
    pub groups: Vec<String>,
}

impl LocalConfig {
    fn read(s: &Section<'_>) -> Option<Self> {
        let unix = s.section("unix", |s| Some(UnixConfig::read(s, "/run/master-agent-local/apiserver.sock")));
        let tcp = s.section("tcp", |s| Some(listen_loopback(s, 8080)));
        if s.at("unix").is_none() && s.at("tcp").is_none() {
            s.section_error(NO_LISTENER);
        }
        let user: Option<String> = s.required("user");
        if user.as_deref().is_some_and(str::is_empty) {
            s.error("user", "is empty: who are the callers of the plain port to kube-apiserver?");
        }
        Some(Self { unix, tcp, user: user?, groups: s.list("groups") })
    }
}
