//! The `upstream` section of the configuration.

use std::time::Duration;

use hyper::Uri;
use proto_config::{At, Meanings, Section};
use proto_net::tls::ClientTls;

use crate::{
    fields::{COUNT, WAIT, secs, verified_or_loopback},
    front_end::headers::IdentityHeaders,
};

/// The `upstream` section.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct UpstreamConfig {
    /// `https://HOST:PORT`, or `http://` on loopback.
    pub servers: Vec<Uri>,
    pub tls: ClientTls,
    pub identity: IdentityHeaders,
    /// Whether short requests and watches share connections, with servers that support HTTP/2.
    pub http2: bool,
    /// The path of health checks.
    pub health_path: String,
    pub health_interval: Duration,
    pub connect_timeout: Duration,
    /// The maximum number of idle connections to each server.
    pub max_idle: usize,
    /// The maximum number of connections to each server.
    pub max_connections: usize,
    /// The age at which a connection stops taking requests.
    pub max_age: Duration,
}

const FIELDS: Meanings = &[
    ("servers", "The kube-apiservers: https://HOST:PORT, or http:// on loopback only."),
    ("ca", "The CA of the servers' certificates. It is required for https:// servers."),
    ("cert", "The front-proxy certificate, by kube-apiserver's --requestheader-client-ca-file."),
    ("key", "The key of cert, with mode 0600 or 0640."),
    (
        "requestheader_username_headers",
        "The headers that name the user, as in kube-apiserver's flag of this name. The first is sent, and no \
         caller's header of these names goes further.",
    ),
    ("requestheader_uid_headers", "The same for the user's UID."),
    ("requestheader_group_headers", "The same for the user's groups."),
    (
        "requestheader_extra_headers_prefix",
        "The same for extra fields of the user, whose headers begin with this.",
    ),
    (
        "http2",
        "Lets short requests and watches share connections to a server that supports HTTP/2: as many at once \
         on each as the server allows, and at most 250.",
    ),
    ("health_path", "What is asked for to see whether a server works."),
    ("health_interval", "How often a server's health is asked for."),
    ("connect_timeout", "Time to connect to a server."),
    (
        "max_connections",
        "Connections at once to each server. Each followed log, upgrade and proxied request has one of its \
         own, and without http2 every request has.",
    ),
    ("max_idle", "Idle connections to each server that are kept for the next request."),
    ("max_age", "A connection that is older takes no further requests."),
];

impl UpstreamConfig {
    pub fn read(s: &Section<'_>) -> Option<Self> {
        s.document(FIELDS);
        let servers: Vec<Uri> = s.items("servers").iter().filter_map(server).collect();
        s.states_required("servers");
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
            s.error("health_path", "is not a path");
        }
        Some(Self {
            servers,
            tls,
            identity,
            http2: s.or("http2", true),
            health_path,
            health_interval: s.duration("health_interval", secs(5), WAIT),
            connect_timeout: s.duration("connect_timeout", secs(5), WAIT),
            max_idle: s.number("max_idle", 256, COUNT),
            max_connections: s.number("max_connections", 8192, COUNT),
            max_age: s.duration("max_age", secs(600), WAIT),
        })
    }
}

fn server(at: &At<'_>) -> Option<Uri> {
    let text = at.text()?;
    let uri = text.parse::<Uri>().ok().filter(|uri| uri.path() == "/" && uri.query().is_none());
    let Some(uri) = uri.filter(|uri| uri.host().is_some()) else {
        at.error(format!("{text:?}: expected https://HOST:PORT"));
        return None;
    };
    verified_or_loopback(at, uri)
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use hyper::header::HeaderName;
    use proto_config::{Source, parse};

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
                "requestheader_username_headers[0]: \"\" is not the name of a header",
            ),
            ("requestheader_username_headers: [a b]", "\"a b\" is not the name of a header"),
            ("requestheader_uid_headers: ['X-Uid:']", "is not the name of a header"),
            ("requestheader_uid_headers: [X-Us\u{e9}r]", "is not the name of a header"),
            (
                "requestheader_group_headers: [X-Group, Connection]",
                "requestheader_group_headers[1]: \"Connection\" has another meaning",
            ),
            ("requestheader_username_headers: [authorization]", "has another meaning"),
            ("requestheader_username_headers: [Content_Length]", "has another meaning"),
            ("requestheader_username_headers: [X-Forwarded-For]", "has another meaning"),
            ("requestheader_username_headers: [Impersonate-User]", "has another meaning"),
            ("requestheader_extra_headers_prefix: [impersonate-extra-]", "has another meaning"),
            ("requestheader_extra_headers_prefix: ['']", "is not the name of a header"),
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
