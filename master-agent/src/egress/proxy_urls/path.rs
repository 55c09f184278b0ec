//! The paths of proxy URLs.
//!
//! The part up to `/proxy` decides where a request goes and is read strictly. The part behind it belongs to the target and
//! stays as it is, byte for byte, so no escape or `..` in it can lead to another target.

use std::borrow::Cow;

use hyper::StatusCode;
use percent_encoding::percent_decode_str;
use proto::NodeName;

use crate::http::status::StatusError;

/// A parsed path of this egress listener.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ProxyPath<'a> {
    pub subject: Subject,
    /// The scheme before the name, if there is one.
    pub scheme: Option<Scheme>,
    pub port: Port,
    /// The path up to and including `/proxy`, as the caller wrote it.
    pub prefix: &'a str,
    /// What is requested from the target: empty, or beginning with `/`.
    pub rest: &'a str,
}

/// What a request addresses.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Subject {
    Node(NodeName),
    Pod { namespace: String, name: String },
    Service { namespace: String, name: String },
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Scheme {
    Http,
    Https,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Port {
    Default,
    Number(u16),
    /// Only services have named ports.
    Name(String),
}

/// Why a path is not one of this egress listener.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum PathError {
    #[error("{0}")]
    Invalid(String),
    #[error(
        "no such path; this listener serves /api/v1/nodes/NAME/proxy/, /api/v1/namespaces/NAMESPACE/pods/NAME/proxy/ and /api/v1/namespaces/NAMESPACE/services/NAME/proxy/, where NAME may be NAME:PORT or SCHEME:NAME:PORT"
    )]
    Unknown,
}

impl From<PathError> for StatusError {
    fn from(error: PathError) -> Self {
        let code = match error {
            PathError::Invalid(_) => StatusCode::BAD_REQUEST,
            PathError::Unknown => StatusCode::NOT_FOUND,
        };
        Self::new(code, error.to_string())
    }
}

/// Parses the path of a request, without its query.
pub fn parse(path: &str) -> Result<ProxyPath<'_>, PathError> {
    let below = path.strip_prefix("/api/v1/").ok_or(PathError::Unknown)?;
    let mut segments = below.split('/');
    let mut next = || segments.next().ok_or(PathError::Unknown);
    let (kind, namespace, id) = match next()? {
        "nodes" => ("nodes", None, next()?),
        "namespaces" => {
            let namespace = next()?;
            (next()?, Some(namespace), next()?)
        }
        _ => return Err(PathError::Unknown),
    };
    if next()? != "proxy" {
        return Err(PathError::Unknown);
    }
    // What `segments` has left is the end of `path`.
    let used = segments.map(|s| s.len() + 1).sum();
    let (prefix, rest) = path.split_at_checked(path.len().saturating_sub(used)).ok_or(PathError::Unknown)?;
    let namespace = namespace.map(decode).transpose()?;
    let id = decode(id)?;
    let (scheme, name, port) = split(&id)?;
    let subject = match (kind, namespace) {
        ("nodes", None) => Subject::Node(name.parse().map_err(|_| bad("node name", name))?),
        ("pods", Some(namespace)) => {
            let name = name.parse::<NodeName>().map_err(|_| bad("pod name", name))?;
            Subject::Pod { namespace: label("namespace", &namespace)?, name: name.as_str().to_owned() }
        }
        ("services", Some(namespace)) => Subject::Service {
            namespace: label("namespace", &namespace)?,
            name: label("service name", name)?,
        },
        _ => return Err(PathError::Unknown),
    };
    let port = match (read_port(port)?, &subject) {
        (Port::Name(_), Subject::Node(_) | Subject::Pod { .. }) => {
            return Err(PathError::Invalid(format!(
                "{port:?} is not a port: give a number from 1 to 65535 (only services have ports with names)"
            )));
        }
        (port, _) => port,
    };
    Ok(ProxyPath { subject, scheme, port, prefix, rest })
}

/// Splits `NAME`, `NAME:PORT` or `SCHEME:NAME:PORT` as kube-apiserver does: the port may be empty, and with a scheme the
/// second colon is required.
fn split(id: &str) -> Result<(Option<Scheme>, &str, &str), PathError> {
    let mut parts = id.split(':');
    let (scheme, name, port) = match (parts.next(), parts.next(), parts.next(), parts.next()) {
        (Some(name), None, _, _) => ("", name, ""),
        (Some(name), Some(port), None, _) => ("", name, port),
        (Some(scheme), Some(name), Some(port), None) => (scheme, name, port),
        _ => return Err(bad("name of the form NAME, NAME:PORT or SCHEME:NAME:PORT", id)),
    };
    let scheme = match scheme {
        "" => None,
        "http" => Some(Scheme::Http),
        "https" => Some(Scheme::Https),
        other => return Err(bad("scheme (http or https)", other)),
    };
    Ok((scheme, name, port))
}

/// Parses a port number or a port's name (RFC 6335 §5.1, as Kubernetes reads it).
fn read_port(port: &str) -> Result<Port, PathError> {
    if port.is_empty() {
        return Ok(Port::Default);
    }
    if port.bytes().all(|b| b.is_ascii_digit()) {
        let number = port.parse().ok().filter(|n| *n != 0 && port.len() <= 5);
        return number.map(Port::Number).ok_or_else(|| bad("port from 1 to 65535", port));
    }
    let named = port.len() <= 15
        && port.bytes().all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'-')
        && !port.starts_with('-')
        && !port.ends_with('-');
    if named { Ok(Port::Name(port.to_owned())) } else { Err(bad("port", port)) }
}

/// Parses a DNS label (RFC 1123), which the names of namespaces and services are.
fn label(what: &str, text: &str) -> Result<String, PathError> {
    match text.parse::<NodeName>() {
        Ok(_) if !text.contains('.') => Ok(text.to_owned()),
        Ok(_) | Err(_) => Err(bad(what, text)),
    }
}

fn decode(segment: &str) -> Result<Cow<'_, str>, PathError> {
    percent_decode_str(segment).decode_utf8().map_err(|_| bad("UTF-8 text", segment))
}

fn bad(what: &str, text: &str) -> PathError {
    let shown: String = text.chars().take(80).collect();
    PathError::Invalid(format!("{shown:?} is not a {what}"))
}

#[cfg(test)]
mod tests {
    use rand::{RngExt, SeedableRng, rngs::StdRng};

    use super::*;

    /// A parsed path in short: subject, scheme, port, rest.
    fn shown(path: &str) -> Result<String, PathError> {
        let found = parse(path)?;
        assert_eq!(format!("{}{}", found.prefix, found.rest), path);
        assert!(found.prefix.ends_with("/proxy"), "{found:?}");
        let subject = match found.subject {
            Subject::Node(name) => format!("node {name}"),
            Subject::Pod { namespace, name } => format!("pod {namespace}/{name}"),
            Subject::Service { namespace, name } => format!("service {namespace}/{name}"),
        };
        let scheme = found.scheme.map_or("-", |s| if s == Scheme::Https { "https" } else { "http" });
        let port = match found.port {
            Port::Default => "-".to_owned(),
            Port::Number(n) => n.to_string(),
            Port::Name(name) => name,
        };
        Ok(format!("{subject} {scheme} {port} {}", found.rest))
    }

    #[test]
    fn every_form_is_parsed() {
        let (pods, services) = ("/api/v1/namespaces/default/pods", "/api/v1/namespaces/kube-system/services");
        for (path, expected) in [
            ("/api/v1/nodes/n1/proxy".to_owned(), "node n1 - - "),
            ("/api/v1/nodes/n1/proxy/".to_owned(), "node n1 - - /"),
            ("/api/v1/nodes/n1:10250/proxy/pods".to_owned(), "node n1 - 10250 /pods"),
            ("/api/v1/nodes/n1:/proxy/pods".to_owned(), "node n1 - - /pods"),
            ("/api/v1/nodes/https:n1:/proxy/x".to_owned(), "node n1 https - /x"),
            ("/api/v1/nodes/http:n1:9100/proxy/metrics".to_owned(), "node n1 http 9100 /metrics"),
            ("/api/v1/nodes/ip-10-0-0-1.eu.internal/proxy/".to_owned(), "node ip-10-0-0-1.eu.internal - - /"),
            ("/api/v1/nodes/https%3An1%3A1/proxy/".to_owned(), "node n1 https 1 /"),
            (format!("{pods}/web-0/proxy/"), "pod default/web-0 - - /"),
            (format!("{pods}/web.0:8080/proxy/"), "pod default/web.0 - 8080 /"),
            (format!("{pods}/https:web-0:8443/proxy/a"), "pod default/web-0 https 8443 /a"),
            (format!("{services}/web/proxy"), "service kube-system/web - - "),
            (format!("{services}/web:http/proxy/"), "service kube-system/web - http /"),
            (
                format!("{services}/https:dash-board:/proxy/#/x"),
                "service kube-system/dash-board https - /#/x",
            ),
            (format!("{services}/:web:80/proxy/"), "service kube-system/web - 80 /"),
            (format!("{services}/http:web:web-1/proxy/"), "service kube-system/web http web-1 /"),
        ] {
            assert_eq!(shown(&path).as_deref(), Ok(expected), "{path}");
        }
    }

    #[test]
    fn the_rest_stays_as_it_is() {
        for rest in [
            "//",
            "/..",
            "/../../../n2/proxy/",
            "/..%2f..%2fn2%2fproxy%2f",
            "/%2e%2e/%2E%2E/",
            "/a%2Fb%20c;d=e,f",
            "/proxy/proxy",
            "/%",
            "/%zz%00",
            "/\u{e4}",
            "/a//b/./c/",
        ] {
            assert_eq!(shown(&format!("/api/v1/nodes/n1/proxy{rest}")), Ok(format!("node n1 - - {rest}")));
        }
    }

    #[test]
    fn malformed_paths_are_refused() {
        let invalid = |path: &str| match parse(path) {
            Err(PathError::Invalid(message)) => message,
            other => panic!("{path}: {other:?}"),
        };
        for id in [
            "",
            ":",
            ":1",
            "n1:0",
            "n1:65536",
            "n1:+1",
            "n1:-1",
            "n1:99999999999",
            "n1: 1",
            "n1:http",
            "ftp:n1:21",
            "HTTPS:n1:1",
            "https:n1",
            "a:b:c:d",
            "n1:1:",
            "N1",
            "n_1",
            "-n1",
            "..",
            "%2e%2e",
            "..%2fn2",
            "n1%2f..%2fn2",
            "n1%00",
            "n1%",
            "n1%0d%0a",
            "10.0.0.1",
            "[::1]",
            "%ff",
            "n1%253A1",
        ] {
            let message = invalid(&format!("/api/v1/nodes/{id}/proxy/"));
            assert!(message.contains("is not a "), "{id}: {message}");
        }
        for path in [
            "/api/v1/namespaces/a.b/pods/p/proxy/",
            "/api/v1/namespaces//pods/p/proxy/",
            "/api/v1/namespaces/../pods/p/proxy/",
            "/api/v1/namespaces/ns/pods/p:http/proxy/",
            "/api/v1/namespaces/ns/pods/https:p/proxy/",
            "/api/v1/namespaces/ns/services/a.b/proxy/",
            "/api/v1/namespaces/ns/services/s:a_b/proxy/",
            "/api/v1/namespaces/ns/services/s:-a/proxy/",
            "/api/v1/namespaces/ns/services/s:0123456789abcdef/proxy/",
            "/api/v1/namespaces/ns/services/s:a%2fb/proxy/",
        ] {
            invalid(path);
        }
        for path in [
            "",
            "/",
            "*",
            "/api",
            "/api/v1/nodes",
            "/api/v1/nodes/n1",
            "/api/v1/nodes/n1/",
            "/api/v1/nodes/n1/proxyx/",
            "/api/v1/nodes/n1/Proxy/",
            "/api/v1/nodes/n1//proxy/",
            "/api/v1//nodes/n1/proxy/",
            "/api/v1/nodes/../nodes/n1/proxy/",
            "/api/v2/nodes/n1/proxy/",
            "//api/v1/nodes/n1/proxy/",
            "/%61pi/v1/nodes/n1/proxy/",
            "/api/v1/namespaces/ns/nodes/n1/proxy/",
            "/api/v1/namespaces/ns/secrets/s/proxy/",
            "/api/v1/namespaces/ns/pods/p/exec",
            "/api/v1/pods/p/proxy/",
        ] {
            assert_eq!(parse(path), Err(PathError::Unknown), "{path}");
        }
    }

    #[test]
    fn random_paths_cause_no_panic_and_stay_as_they_are() {
        let mut rng = StdRng::seed_from_u64(5);
        let valid = "/api/v1/namespaces/default/services/https:web:8443/proxy/a%2fb";
        for _ in 0..50_000 {
            let mut text: Vec<char> = valid.chars().collect();
            for _ in 0..rng.random_range(1..6) {
                let at = rng.random_range(0..text.len());
                match rng.random_range(0..3) {
                    0 => text[at] = rng.random(),
                    1 => text.insert(at, ['/', ':', '%', '.', 'a'][rng.random_range(0..5)]),
                    _ => drop(text.remove(at)),
                }
            }
            let path: String = text.into_iter().collect();
            if let Ok(found) = parse(&path) {
                assert_eq!(format!("{}{}", found.prefix, found.rest), path);
                assert!(found.rest.is_empty() || found.rest.starts_with('/'));
            }
        }
    }
}
