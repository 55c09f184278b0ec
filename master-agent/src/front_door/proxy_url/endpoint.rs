//! Where a proxy URL leads: what is dialled, and what it must prove.

use std::net::IpAddr;

use proto::{Host, Target};
use rustls::pki_types::ServerName;

use super::{
    path::{Port, ProxyPath, Scheme, Subject},
    status::Failure,
    tls::Expected,
};
use crate::directory::Directory;

/// A target, and how to speak with it.
#[derive(Clone, Debug)]
pub struct Endpoint {
    pub target: Target,
    /// For people.
    pub who: String,
    /// `None` is plain HTTP.
    pub tls: Option<Expected>,
}

/// Looks up what a path names.
pub fn resolve(path: &ProxyPath<'_>, directory: &dyn Directory) -> Result<Endpoint, Failure> {
    let unknown = |error| Failure::unknown(&error);
    let https = path.scheme == Some(Scheme::Https);
    match &path.subject {
        Subject::Node(node) => {
            let name = node.as_str();
            let kubelet_port = directory.kubelet_port(name).map_err(unknown)?;
            let port = number(&path.port).unwrap_or(kubelet_port);
            // A kubelet speaks HTTPS whatever scheme is written, as with kube-apiserver.
            let kubelet = port == kubelet_port;
            let tls = (kubelet || https).then(|| Expected {
                kubelet,
                names: names(Some(name.to_owned()), directory.node_addresses(name)),
            });
            let who = if kubelet { format!("the kubelet of node {name}") } else { format!("node {name}") };
            Ok(Endpoint { target: Target::new(Host::Name(name.to_owned()), port), who, tls })
        }
        Subject::Pod { namespace, name } => {
            let pod = directory.pod(namespace, name).map_err(unknown)?;
            let port = number(&path.port).or(pod.first_port).unwrap_or(if https { 443 } else { 80 });
            let tls = https.then(|| Expected {
                kubelet: false,
                names: names(Some(format!("{name}.{namespace}.pod")), vec![pod.address]),
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
            let tls =
                https.then(|| Expected { kubelet: false, names: names(Some(host.clone()), Vec::new()) });
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

/// What is too long for a name in a certificate is left out.
fn names(name: Option<String>, addresses: Vec<IpAddr>) -> Vec<ServerName<'static>> {
    let name = name.and_then(|name| ServerName::try_from(name).ok());
    let addresses = addresses.into_iter().map(|a| ServerName::IpAddress(a.to_canonical().into()));
    name.into_iter().chain(addresses).collect()
}
