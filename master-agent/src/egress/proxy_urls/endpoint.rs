//! Where a proxy URL leads: the target, and what its certificate must prove.

use std::net::IpAddr;

use proto::{Host, Target};
use rustls::pki_types::ServerName;

use super::{
    path::{Port, ProxyPath, Scheme, Subject},
    tls::Expected,
};
use crate::{directory::Directory, http::status::StatusError};

/// A target, and how to connect to it.
#[derive(Clone, Debug)]
pub(super) struct Endpoint {
    pub target: Target,
    /// A description for errors and logs.
    pub who: String,
    /// `None` for plain HTTP.
    pub tls: Option<Expected>,
}

/// Looks up the subject of a path.
pub(super) fn resolve(path: &ProxyPath<'_>, directory: &dyn Directory) -> Result<Endpoint, StatusError> {
    let unknown = |error| StatusError::unknown(&error);
    let https = path.scheme == Some(Scheme::Https);
    match &path.subject {
        Subject::Node(node) => {
            let name = node.as_str();
            let kubelet_port = directory.kubelet_port(name).map_err(unknown)?;
            let port = number(&path.port).unwrap_or(kubelet_port);
            // As with kube-apiserver, a kubelet is always asked over HTTPS.
            let kubelet = port == kubelet_port;
            let tls = (kubelet || https)
                .then(|| Expected { kubelet, names: names(name.to_owned(), directory.node_addresses(name)) });
            let who = if kubelet { format!("the kubelet of node {name}") } else { format!("node {name}") };
            Ok(Endpoint { target: Target::new(Host::Name(name.to_owned()), port), who, tls })
        }
        Subject::Pod { namespace, name } => {
            let pod = directory.pod(namespace, name).map_err(unknown)?;
            let port = number(&path.port).or(pod.first_port).unwrap_or(if https { 443 } else { 80 });
            let tls = https.then(|| Expected {
                kubelet: false,
                names: names(format!("{name}.{namespace}.pod"), vec![pod.address]),
            });
            let target = Target::new(Host::Addr(pod.address.to_canonical()), port);
            Ok(Endpoint { target, who: format!("pod {namespace}/{name}"), tls })
        }
        Subject::Service { namespace, name } => {
            let port = match &path.port {
                Port::Default => String::new(),
                Port::Number(number) => number.to_string(),
                Port::Name(name) => name.clone(),
            };
            let port = directory.service_port(namespace, name, &port).map_err(unknown)?;
            let host = format!("{name}.{namespace}.svc");
            let tls = https.then(|| Expected { kubelet: false, names: names(host.clone(), Vec::new()) });
            Ok(Endpoint {
                target: Target::new(Host::Name(host), port),
                who: format!("service {namespace}/{name}"),
                tls,
            })
        }
    }
}

fn number(port: &Port) -> Option<u16> {
    match port {
        Port::Number(number) => Some(*number),
        Port::Default | Port::Name(_) => None,
    }
}

/// The names that a certificate may be for. A name that is too long for a certificate is left out.
fn names(name: String, addresses: Vec<IpAddr>) -> Vec<ServerName<'static>> {
    let name = ServerName::try_from(name).ok();
    let addresses = addresses.into_iter().map(|a| ServerName::IpAddress(a.to_canonical().into()));
    name.into_iter().chain(addresses).collect()
}

#[cfg(test)]
mod tests {
    use proto::DialError;

    use super::*;
    use crate::{directory::PodLocation, egress::proxy_urls::path};

    /// Node n1, pod `web`, pod `bare` without a declared port, and service `web` with ports 80 (`http`) and 443.
    struct Fake;

    impl Directory for Fake {
        fn kubelet_port(&self, node: &str) -> Result<u16, DialError> {
            if node == "n1" { Ok(10250) } else { Err(DialError::NoRoute(node.to_owned())) }
        }

        fn node_addresses(&self, _node: &str) -> Vec<IpAddr> {
            vec!["10.0.0.1".parse().unwrap(), "fd00::1".parse().unwrap()]
        }

        fn pod(&self, namespace: &str, name: &str) -> Result<PodLocation, DialError> {
            let (address, first_port) = match (namespace, name) {
                ("default", "web") => ("10.1.0.5", Some(8080)),
                ("default", "bare") => ("fd00:1::5", None),
                _ => return Err(DialError::NoRoute(format!("{namespace}/{name}"))),
            };
            Ok(PodLocation { address: address.parse().unwrap(), first_port })
        }

        fn service_port(&self, namespace: &str, name: &str, port: &str) -> Result<u16, DialError> {
            match (namespace, name, port) {
                ("default", "web", "" | "http" | "80") => Ok(80),
                ("default", "web", "443") => Ok(443),
                _ => Err(DialError::NoRoute(format!("{namespace}/{name}:{port}"))),
            }
        }
    }

    /// The target, then `plain`, or `kubelet` or `target` with the names that its certificate may be for.
    fn shown(path: &str) -> Result<String, StatusError> {
        let endpoint = resolve(&path::parse(path).unwrap(), &Fake)?;
        let tls = endpoint.tls.map_or("plain".to_owned(), |expected| {
            let names: Vec<_> = expected.names.iter().map(|n| n.to_str().into_owned()).collect();
            format!("{} {}", if expected.kubelet { "kubelet" } else { "target" }, names.join(" "))
        });
        Ok(format!("{} {tls}", endpoint.target))
    }

    #[test]
    fn paths_lead_to_endpoints() {
        let kubelet = "n1:10250 kubelet n1 10.0.0.1 fd00::1";
        let (pods, services) = ("/api/v1/namespaces/default/pods", "/api/v1/namespaces/default/services");
        for (path, expected) in [
            ("/api/v1/nodes/n1/proxy/".to_owned(), kubelet),
            ("/api/v1/nodes/n1:10250/proxy/".to_owned(), kubelet),
            ("/api/v1/nodes/http:n1:10250/proxy/".to_owned(), kubelet),
            ("/api/v1/nodes/https:n1:/proxy/".to_owned(), kubelet),
            ("/api/v1/nodes/n1:9100/proxy/".to_owned(), "n1:9100 plain"),
            ("/api/v1/nodes/https:n1:9100/proxy/".to_owned(), "n1:9100 target n1 10.0.0.1 fd00::1"),
            (format!("{pods}/web/proxy/"), "10.1.0.5:8080 plain"),
            (format!("{pods}/web:9/proxy/"), "10.1.0.5:9 plain"),
            (format!("{pods}/https:web:/proxy/"), "10.1.0.5:8080 target web.default.pod 10.1.0.5"),
            (format!("{pods}/bare/proxy/"), "[fd00:1::5]:80 plain"),
            (format!("{pods}/https:bare:/proxy/"), "[fd00:1::5]:443 target bare.default.pod fd00:1::5"),
            (format!("{services}/web/proxy/"), "web.default.svc:80 plain"),
            (format!("{services}/web:http/proxy/"), "web.default.svc:80 plain"),
            (format!("{services}/https:web:443/proxy/"), "web.default.svc:443 target web.default.svc"),
        ] {
            assert_eq!(shown(&path).as_deref(), Ok(expected), "{path}");
        }
        for path in [
            "/api/v1/nodes/n2/proxy/".to_owned(),
            format!("{pods}/gone/proxy/"),
            format!("{services}/web:gone/proxy/"),
        ] {
            assert_eq!(shown(&path).unwrap_err().code, 404, "{path}");
        }
    }

    #[test]
    fn a_name_too_long_for_a_certificate_leaves_the_address() {
        let name = ["a".repeat(63), "b".repeat(63), "c".repeat(63), "d".repeat(61)].join(".");
        let names = names(format!("{name}.default.pod"), vec!["10.1.0.5".parse().unwrap()]);
        assert_eq!(names, [ServerName::try_from("10.1.0.5").unwrap()]);
    }
}
