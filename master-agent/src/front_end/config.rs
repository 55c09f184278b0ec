//! The `front_end` section of the configuration.

use std::net::SocketAddr;

use hyper::{Uri, header::HeaderName};
use proto::config::{At, Section};

use super::{
    audit::AuditConfig,
    authn::AuthnConfig,
    authz::config::AuthzConfig,
    headers::IdentityHeaders,
    https_client::ClientTls,
    limits::{LimitsConfig, seats::SeatLimits},
    local::LocalConfig,
    tls::ServingCertificate,
    upstream::UpstreamConfig,
};
use crate::config::{COUNT, NO_LISTENER, UnixConfig, WAIT, any, listen_loopback, secs};

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct FrontEndConfig {
    pub listen: SocketAddr,
    /// The first is also for names that none is for.
    pub certificates: Vec<ServingCertificate>,
    pub authn: AuthnConfig,
    pub authz: AuthzConfig,
    /// Also authorize what goes to kube-apiserver, which authorizes it again.
    pub authorize_everything: bool,
    /// Answer proxy URLs of nodes, pods and services here, through tunnels, rather than hand them on.
    pub serve_proxy_urls: bool,
    /// Answer the page here.
    pub serve_page: bool,
    /// Serve callers that come through their node's tunnel.
    pub through_tunnels: bool,
    /// Let nodes call home, and hosts join, over this port; `None` does where they may over a port of its own.
    pub call_home: Option<bool>,
    pub upstream: UpstreamConfig,
    /// `None` serves no plain port.
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

impl ServingCertificate {
    fn read(s: &Section<'_>) -> Option<Self> {
        let (cert, key) = (s.required_file("cert"), s.required_private_file("key"));
        Some(Self { cert: cert?, key: key? })
    }
}

impl UpstreamConfig {
    fn read(s: &Section<'_>) -> Option<Self> {
        let servers: Vec<Uri> = s.items("servers").iter().filter_map(server).collect();
        if s.items("servers").is_empty() {
            s.error("servers", "needs at least one https://HOST:PORT");
        }
        let (cert, key) = (s.file("cert"), s.private_file("key"));
        if cert.is_some() != key.is_some() {
            s.section_error("cert and key go together: give both or none");
        }
        let tls = ClientTls { ca: s.file("ca"), identity: cert.zip(key) };
        if tls.ca.is_none() && servers.iter().any(|server| server.scheme_str() == Some("https")) {
            s.error("ca", "is required for https:// servers: the CA of their certificates");
        }
        let identity = IdentityHeaders::read(s);
        let health_path = s.or("health_path", "/readyz".to_owned());
        if !health_path.starts_with('/') || health_path.parse::<Uri>().is_err() {
            s.error("health_path", "is no path");
        }
        Some(Self {
            servers,
            tls,
            identity,
            http2: s.or("http2", false),
            health_path,
            health_interval: s.duration("health_interval", secs(5), WAIT),
            connect_timeout: s.duration("connect_timeout", secs(5), WAIT),
            max_idle: s.number("max_idle", 256, COUNT),
            max_connections: s.number("max_connections", 8192, COUNT),
            max_age: s.duration("max_age", secs(600), WAIT),
        })
    }
}

impl IdentityHeaders {
    fn read(s: &Section<'_>) -> Self {
        let names = |field: &'static str, default: Vec<HeaderName>| {
            if s.at(field).is_none() {
                return default;
            }
            let names: Vec<_> = s.items(field).iter().filter_map(header_name).collect();
            if s.items(field).is_empty() {
                s.error(
                    field,
                    "names no header: leave it out, or give what kube-apiserver's flag of this name has",
                );
            }
            names
        };
        let default = Self::default();
        let this = Self {
            username: names("requestheader_username_headers", default.username),
            uid: names("requestheader_uid_headers", default.uid),
            group: names("requestheader_group_headers", default.group),
            extra_prefix: names("requestheader_extra_headers_prefix", default.extra_prefix),
        };
        if let Some(confusion) = this.confusion() {
            s.section_error(format!("{confusion}: kube-apiserver could not tell them apart"));
        }
        this
    }
}

fn header_name(at: &At<'_>) -> Option<HeaderName> {
    let text = at.text()?;
    match HeaderName::try_from(text) {
        Ok(name) if !IdentityHeaders::is_taken(&name) => return Some(name),
        Ok(_) => {
            at.error(format!("{text:?} has another meaning: give a header of its own, such as X-Remote-User"))
        }
        Err(_) => at.error(format!("{text:?} is no name of a header: expected one such as X-Remote-User")),
    }
    None
}

fn server(at: &At<'_>) -> Option<Uri> {
    let text = at.text()?;
    let uri = text.parse::<Uri>().ok().filter(|uri| uri.path() == "/" && uri.query().is_none());
    let Some(uri) = uri.filter(|uri| uri.host().is_some()) else {
        at.error(format!("{text:?}: expected https://HOST:PORT"));
        return None;
    };
    match uri.scheme_str() {
        Some("https") => Some(uri),
        Some("http") if super::upstream::is_loopback(uri.host().unwrap_or_default()) => Some(uri),
        _ => {
            at.error(format!("{text:?}: must be https://, as http:// is for loopback only"));
            None
        }
    }
}

impl LimitsConfig {
    fn read(s: &Section<'_>) -> Self {
        let rate = |name, default| u32::try_from(s.number(name, default, COUNT)).unwrap_or(u32::MAX);
        Self {
            max_connections: s.number("max_connections", 16_384, COUNT),
            max_connections_per_address: s.number("max_connections_per_address", 4096, COUNT),
            max_connections_per_node: s.number("max_connections_per_node", 1024, COUNT),
            head_timeout: s.duration("head_timeout", secs(10), WAIT),
            idle_timeout: s.duration("idle_timeout", secs(180), WAIT),
            request_timeout: s.duration("request_timeout", secs(60), WAIT),
            body_timeout: s.duration("body_timeout", secs(30), WAIT),
            max_body: s.number("max_body", 16 << 20, 1..=1 << 40) as u64,
            seats: SeatLimits {
                total: s.number("max_in_flight", 400, COUNT),
                per_user: s.number("max_in_flight_per_user", 100, COUNT),
                queue: s.number("queue_per_user", 100, COUNT),
                wait: s.duration("queue_timeout", secs(5), WAIT),
            },
            max_long_running: s.number("max_long_running", 50_000, COUNT),
            long_running_per_user: s.number("long_running_per_user", 1000, COUNT),
            requests_per_second_per_user: rate("requests_per_second_per_user", 1000),
            requests_per_second_per_address: rate("requests_per_second_per_address", 5000),
            failures_per_second_per_address: rate("failures_per_second_per_address", 10),
            half_closed_timeout: s.duration("half_closed_timeout", secs(600), WAIT),
            max_streams: rate("max_streams", 250),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use proto::config::{Source, parse};

    use super::*;

    fn read(fields: &str) -> Result<IdentityHeaders, String> {
        let text = format!("servers: ['http://127.0.0.1']\n{fields}\n");
        let source = Source { origin: "test", base_dir: Path::new("/"), check_files: false };
        let config = parse(&text, source, UpstreamConfig::read);
        config.map(|config| config.identity).map_err(|error| error.to_string())
    }

    #[test]
    fn identity_headers_are_named_as_kube_apiserver_is_told_to_read_them() {
        assert_eq!(read("").unwrap(), IdentityHeaders::default());
        let read_all = read(
            "requestheader_username_headers: [X-Kube-User, X-Old-User]\nrequestheader_uid_headers: [X-Kube-Uid]\n\
             requestheader_group_headers: [X_Kube_Group]\nrequestheader_extra_headers_prefix: [X-Kube-Extra-]",
        );
        let names = |names: &[&'static str]| names.iter().map(|name| HeaderName::from_static(name)).collect();
        let expected = IdentityHeaders {
            username: names(&["x-kube-user", "x-old-user"]),
            uid: names(&["x-kube-uid"]),
            group: names(&["x_kube_group"]),
            extra_prefix: names(&["x-kube-extra-"]),
        };
        assert_eq!(read_all.unwrap(), expected);
        for (fields, expected) in [
            ("requestheader_username_headers: []", "requestheader_username_headers: names no header"),
            (
                "requestheader_username_headers: ['']",
                "requestheader_username_headers[0]: \"\" is no name of a header",
            ),
            ("requestheader_username_headers: [a b]", "\"a b\" is no name of a header"),
            ("requestheader_uid_headers: ['X-Uid:']", "is no name of a header"),
            ("requestheader_uid_headers: [X-Us\u{e9}r]", "is no name of a header"),
            (
                "requestheader_group_headers: [X-Group, Connection]",
                "requestheader_group_headers[1]: \"Connection\" has another meaning",
            ),
            ("requestheader_username_headers: [authorization]", "has another meaning"),
            ("requestheader_username_headers: [Content_Length]", "has another meaning"),
            ("requestheader_username_headers: [X-Forwarded-For]", "has another meaning"),
            ("requestheader_username_headers: [Impersonate-User]", "has another meaning"),
            ("requestheader_extra_headers_prefix: [impersonate-extra-]", "has another meaning"),
            ("requestheader_extra_headers_prefix: ['']", "is no name of a header"),
            ("requestheader_extra_headers_prefix: [X-]", "begins with the prefix x- of extra headers"),
            (
                "requestheader_extra_headers_prefix: [X-Remote-]",
                "begins with the prefix x-remote- of extra headers",
            ),
            ("requestheader_extra_headers_prefix: [a]", "begins with the prefix a of extra headers"),
            ("requestheader_group_headers: [X-Remote-User]", "header x-remote-user has two meanings"),
            ("requestheader_group_headers: [x_remote_uid]", "header x-remote-uid has two meanings"),
            ("requestheader_user_headers: [X-User]", "unknown field"),
        ] {
            let error = read(fields).expect_err(fields);
            assert!(error.contains(expected), "{fields}: {error}");
        }
    }
}
