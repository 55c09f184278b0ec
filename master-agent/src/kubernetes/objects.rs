//! Converts the API's objects to what routing knows of them. Unusable parts, such as malformed addresses and ports of
//! other protocols, are left out; an object without any usable part becomes `None`.

use std::{collections::HashSet, hash::Hash, net::IpAddr};

use ipnet::IpNet;
use k8s_openapi::{
    api::{core::v1 as core, discovery::v1 as discovery},
    apimachinery::pkg::apis::meta::v1::ObjectMeta,
};

use crate::routing::cluster::{
    Endpoint, EndpointSlice, KUBELET_PORT, Key, Node, Object, Pod, Service, ServicePort,
};

/// The label that names the service of an EndpointSlice.
const SERVICE_NAME: &str = "kubernetes.io/service-name";

pub(super) fn node(node: core::Node) -> Option<Object> {
    let status = node.status.unwrap_or_default();
    let spec = node.spec.unwrap_or_default();
    let created = age(&node.metadata);
    let mut addresses: Vec<(bool, IpAddr)> = status
        .addresses
        .unwrap_or_default()
        .iter()
        .filter(|a| matches!(a.type_.as_str(), "InternalIP" | "ExternalIP"))
        .filter_map(|a| Some((a.type_ == "ExternalIP", address(&a.address)?)))
        .collect();
    addresses.sort_by_key(|(external, _)| *external);
    let cidrs = match spec.pod_cidrs {
        Some(cidrs) if !cidrs.is_empty() => cidrs,
        Some(_) | None => spec.pod_cidr.into_iter().collect(),
    };
    let kubelet = status.daemon_endpoints.and_then(|d| d.kubelet_endpoint).map(|e| e.port);
    Some(Object::Node(Node {
        name: node.metadata.name?.parse().ok()?,
        created,
        addresses: unique(addresses.into_iter().map(|(_, address)| address)),
        cidrs: unique(cidrs.iter().filter_map(|net| pod_cidr(net))),
        kubelet_port: kubelet.and_then(port).unwrap_or(KUBELET_PORT),
    }))
}

pub(super) fn pod(pod: core::Pod) -> Option<Object> {
    let status = pod.status.unwrap_or_default();
    let spec = pod.spec.unwrap_or_default();
    let (first, all) = (status.pod_ip, status.pod_ips.unwrap_or_default());
    let addresses = unique(first.iter().chain(all.iter().map(|ip| &ip.ip)).filter_map(|ip| address(ip)));
    let ports = spec.containers.iter().flat_map(|c| c.ports.iter().flatten());
    let mut tcp = ports.filter(|p| is_tcp(p.protocol.as_deref()));
    Some(Object::Pod(Pod {
        key: key(&pod.metadata)?,
        created: age(&pod.metadata),
        node: spec.node_name.and_then(|name| name.parse().ok()),
        addresses,
        host_network: spec.host_network.unwrap_or_default(),
        ended: matches!(status.phase.as_deref(), Some("Succeeded" | "Failed")),
        first_port: tcp.next().and_then(|p| port(p.container_port)),
    }))
}

pub(super) fn service(service: core::Service) -> Option<Object> {
    let spec = service.spec.unwrap_or_default();
    let cluster_ips = match spec.cluster_ips {
        Some(ips) if !ips.is_empty() => ips,
        Some(_) | None => spec.cluster_ip.into_iter().collect(),
    };
    let is_name = spec.type_.as_deref() == Some("ExternalName");
    let ports = spec.ports.unwrap_or_default();
    Some(Object::Service(Service {
        key: key(&service.metadata)?,
        created: age(&service.metadata),
        addresses: unique(cluster_ips.iter().filter_map(|ip| address(ip))),
        ports: ports
            .into_iter()
            .filter(|p| is_tcp(p.protocol.as_deref()))
            .filter_map(|p| Some(ServicePort { port: port(p.port)?, name: p.name.unwrap_or_default() }))
            .collect(),
        external_name: is_name.then(|| spec.external_name.unwrap_or_default()),
    }))
}

pub(super) fn endpoint_slice(slice: discovery::EndpointSlice) -> Option<Object> {
    let namespace = slice.metadata.namespace.as_deref()?;
    let service = slice.metadata.labels.as_ref()?.get(SERVICE_NAME)?;
    let service = format!("{namespace}/{service}").into();
    let ports = slice.ports.unwrap_or_default();
    let ports = ports.into_iter().filter(|p| is_tcp(p.protocol.as_deref()));
    let endpoints = slice.endpoints.unwrap_or_default().into_iter().filter_map(|endpoint| {
        Some(Endpoint {
            // The addresses of an endpoint are interchangeable.
            address: endpoint.addresses.iter().find_map(|ip| address(ip))?,
            node: endpoint.node_name.and_then(|name| name.parse().ok()),
            hostname: endpoint.hostname,
            // The API says to take an unknown condition as ready.
            ready: endpoint.conditions.and_then(|c| c.ready).unwrap_or(true),
        })
    });
    Some(Object::EndpointSlice(EndpointSlice {
        key: key(&slice.metadata)?,
        service,
        endpoints: endpoints.collect(),
        ports: ports.map(|p| (p.name.unwrap_or_default(), p.port.and_then(port))).collect(),
    }))
}

pub(super) fn key(metadata: &ObjectMeta) -> Option<Key> {
    let name = metadata.name.as_deref()?;
    Some(match metadata.namespace.as_deref() {
        Some(namespace) => format!("{namespace}/{name}").into(),
        None => name.into(),
    })
}

/// Leaves out what comes again.
fn unique<T: Copy + Eq + Hash>(items: impl Iterator<Item = T>) -> Vec<T> {
    let mut seen = HashSet::new();
    items.filter(|item| seen.insert(*item)).collect()
}

fn age(metadata: &ObjectMeta) -> i64 {
    metadata.creation_timestamp.as_ref().map_or(i64::MAX, |time| time.0.as_second())
}

/// Reads an address. No pod or node is at an address that is unspecified, loopback, multicast or link-local.
fn address(text: &str) -> Option<IpAddr> {
    let address = text.parse::<IpAddr>().ok()?.to_canonical();
    let link_local = match address {
        IpAddr::V4(a) => a.is_link_local(),
        IpAddr::V6(a) => a.is_unicast_link_local(),
    };
    let usable = !(address.is_unspecified() || address.is_loopback() || address.is_multicast() || link_local);
    usable.then_some(address)
}

/// Reads a pod network. A very short prefix would amount to a default route, so it is left out.
fn pod_cidr(text: &str) -> Option<IpNet> {
    let net = text.parse::<IpNet>().ok()?.trunc();
    let shortest = match net {
        IpNet::V4(_) => 8,
        IpNet::V6(_) => 16,
    };
    (net.prefix_len() >= shortest).then_some(net)
}

fn port(number: i32) -> Option<u16> {
    u16::try_from(number).ok().filter(|port| *port > 0)
}

fn is_tcp(protocol: Option<&str>) -> bool {
    protocol.is_none_or(|p| p == "TCP")
}
