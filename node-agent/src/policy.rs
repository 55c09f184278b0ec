//! What this node lets others reach: the rules of the configuration, and the decision about one address.

use std::{
    io,
    net::{IpAddr, Ipv4Addr, Ipv6Addr, UdpSocket},
    ops::RangeInclusive,
};

use ipnet::IpNet;
use proto::{
    NodeName,
    policy::{self, DEFAULT_DENY, Policy, Rule, Verdict},
};
use proto_config::{At, Meanings, Ports, Section};

use crate::{fields::unique, identity::host::NodeIdentity, tcp};

const KUBELET_RULE: &str = "kubelet";
const POD_RULE: &str = "pod-cidr";
const SERVICE_RULE: &str = "service-cidr";
/// Names of rules that are not `allow` entries.
const BUILT_IN: [&str; 3] = [KUBELET_RULE, POD_RULE, SERVICE_RULE];

/// The section `policy`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PolicyConfig {
    /// Allowed on the node's own addresses; `None` allows no kubelet.
    pub kubelet_port: Option<u16>,
    /// Allowed with every port.
    pub pod_cidrs: Vec<IpNet>,
    /// Allowed with every port.
    pub service_cidrs: Vec<IpNet>,
    pub allow: Vec<AllowConfig>,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct AllowConfig {
    pub name: String,
    pub to: IpNet,
    pub ports: Ports,
}

const FIELDS: Meanings = &[
    (
        "kubelet_port",
        "The kubelet's port, which is allowed on the node's own addresses. 0 allows no kubelet.",
    ),
    ("pod_cidrs", "Networks of pods, which are allowed with every port."),
    ("service_cidrs", "Networks of services, which are allowed with every port."),
    (
        "allow",
        "Further targets. Loopback and link-local addresses stay closed unless an entry's network lies \
         wholly inside that range, and metadata services of clouds unless an entry is for that one address.",
    ),
];

impl PolicyConfig {
    pub(crate) fn read(s: &Section<'_>) -> Self {
        s.document(FIELDS);
        let allow: Vec<_> = s.items("allow");
        let mut names = Vec::new();
        Self {
            kubelet_port: Some(s.or("kubelet_port", 10250)).filter(|port| *port != 0),
            pod_cidrs: unique(s, "pod_cidrs"),
            service_cidrs: unique(s, "service_cidrs"),
            allow: allow.iter().filter_map(|at| at.section(|s| AllowConfig::read(s, &mut names))).collect(),
        }
    }

    /// The rules for a node that states these addresses: `kubelet` on each of them, `pod-cidr`, `service-cidr`, then
    /// the `allow` entries in their order.
    pub fn rules(&self, own_addresses: &[IpAddr]) -> Policy {
        let every_port = 1..=u16::MAX;
        let kubelet = self.kubelet_port.into_iter().flat_map(|port| {
            let net = |address: &IpAddr| IpNet::from(address.to_canonical());
            let rule = move |net| Rule { name: KUBELET_RULE.into(), net, ports: port..=port };
            own_addresses.iter().map(net).map(rule)
        });
        let networks = |name: &'static str, nets: &[IpNet]| {
            let rule = |net: &IpNet| Rule { name: name.into(), net: *net, ports: every_port.clone() };
            nets.iter().map(rule).collect::<Vec<_>>()
        };
        let allow = self.allow.iter().flat_map(|allow| {
            let rule = |ports: &RangeInclusive<u16>| Rule {
                name: allow.name.clone(),
                net: allow.to,
                ports: ports.clone(),
            };
            allow.ports.0.iter().map(rule)
        });
        let rules = kubelet
            .chain(networks(POD_RULE, &self.pod_cidrs))
            .chain(networks(SERVICE_RULE, &self.service_cidrs))
            .chain(allow)
            .collect();
        Policy { rules }
    }
}

const ALLOW_FIELDS: Meanings = &[
    ("name", "The rule's name, which logs and refusals show."),
    ("to", "A network, or one address."),
    ("ports", "A port, a range such as 8000-8090, or a list of both."),
];

impl AllowConfig {
    fn read(s: &Section<'_>, names: &mut Vec<String>) -> Option<Self> {
        s.document(ALLOW_FIELDS);
        let name = s.required_at("name").and_then(|at| rule_name(&at, names));
        let to = s.required_at("to").and_then(|at| network_or_address(&at));
        let ports = s.required("ports");
        Some(Self { name: name?, to: to?, ports: ports? })
    }
}

fn rule_name(at: &At<'_>, names: &mut Vec<String>) -> Option<String> {
    let name = at.text()?;
    let allowed = |b: u8| b.is_ascii_lowercase() || b.is_ascii_digit() || matches!(b, b'-' | b'_' | b'.');
    if name.is_empty() || name.len() > 63 || !name.bytes().all(allowed) {
        return at.complain(name, "a rule's name has at most 63 of a-z, 0-9, '-', '_' and '.'");
    }
    if BUILT_IN.contains(&name) || policy::REFUSALS.contains(&name) {
        return at.complain(name, "is the name of a built-in rule");
    }
    if names.iter().any(|other| other == name) {
        return at.complain(name, "another rule has this name");
    }
    names.push(name.to_owned());
    Some(name.to_owned())
}

/// Reads a network, or an address: `10.0.0.5` is short for `10.0.0.5/32`.
fn network_or_address(at: &At<'_>) -> Option<IpNet> {
    match at.text()?.parse::<IpAddr>() {
        Ok(address) => Some(IpNet::from(address.to_canonical())),
        Err(_) => at.read(),
    }
}

/// What the configuration says about the node itself.
#[derive(Clone, Debug)]
pub struct ScopeConfig {
    /// `None` leaves the name to the host certificate.
    pub node: Option<NodeName>,
    /// Empty leaves the addresses to the host certificate.
    pub addresses: Vec<IpAddr>,
    pub policy: PolicyConfig,
}

impl ScopeConfig {
    /// The scope of a node with this identity.
    pub fn scope(&self, identity: &NodeIdentity) -> Scope {
        let stated = self.addresses.clone();
        let policy = self.policy.rules(&stated);
        let (addresses, certified_kubelet) = match stated.as_slice() {
            [] => (identity.addresses(), self.policy.kubelet_port),
            _ => (stated, None),
        };
        let node = self.node.clone().or_else(|| identity.node_name());
        Scope { node, addresses, policy, certified_kubelet }
    }
}

/// What this node is, and what it lets others reach. A renewed certificate replaces it whole.
#[derive(Clone, Debug, Default)]
pub struct Scope {
    pub node: Option<NodeName>,
    /// The addresses that the node's name resolves to.
    pub addresses: Vec<IpAddr>,
    pub policy: Policy,
    /// The kubelet's port, if the addresses come from the certificate and not from the configuration. The policy then
    /// has no rule for them, and the port is open on those that this host has when it is dialled.
    pub certified_kubelet: Option<u16>,
}

impl Scope {
    /// Decides about one resolved address. A certificate opens nothing but a port of this host: an address in a closed
    /// range stays closed, and so does one that the host does not have. The error is that of `is_of_this_host`.
    pub(crate) fn decide(
        &self,
        address: IpAddr,
        port: u16,
        is_of_this_host: impl Fn(IpAddr) -> io::Result<bool>,
    ) -> io::Result<Verdict<'_>> {
        let verdict = self.policy.decide(address, port);
        let certified =
            self.certified_kubelet == Some(port) && self.addresses.contains(&address.to_canonical());
        Ok(match verdict {
            Verdict::Deny { rule: DEFAULT_DENY, .. } if certified && is_of_this_host(address)? => {
                Verdict::Allow { rule: KUBELET_RULE }
            }
            Verdict::Deny { rule: DEFAULT_DENY, .. } if certified => Verdict::Deny {
                rule: DEFAULT_DENY,
                reason: format!(
                    "{address} is in the host certificate, but no interface of this host has it, or not as the \
                     first of its network: list it under `addresses:` in the node-agent's configuration if it is \
                     an address of this node"
                ),
            },
            Verdict::Allow { .. } | Verdict::Deny { .. } => verdict,
        })
    }

    /// Logs every rule that applies now.
    pub fn log(&self) {
        if let Some(port) = self.certified_kubelet {
            for address in &self.addresses {
                if policy::closed_range(*address).is_none() && is_of_this_host(*address).unwrap_or(false) {
                    tracing::info!(rule = KUBELET_RULE, %address, port, "policy allows an address of the certificate");
                } else {
                    tracing::warn!(%address, "an address of the certificate stays closed: no interface of this host has it as the first of its network, or it is in a closed range; `addresses:` in the configuration can list it");
                }
            }
        }
        for rule in &self.policy.rules {
            tracing::info!(rule = rule.name, net = %rule.net, ports = ?rule.ports, "policy allows");
        }
    }
}

/// Whether this host has an address now. The kernel tells without a list of interfaces, which would need netlink, and
/// without a packet: it connects from the very address that is dialled only if that address is its own. For a further
/// IPv4 address in a network of which the interface has one already, it connects from that one, and such an address does
/// not count. Binding to the address would tell as well, but not on hosts with `net.ipv4.ip_nonlocal_bind`.
///
/// Without a file descriptor nothing can be told, which is an error.
pub fn is_of_this_host(address: IpAddr) -> io::Result<bool> {
    let address = address.to_canonical();
    let any = match address {
        IpAddr::V4(_) => IpAddr::V4(Ipv4Addr::UNSPECIFIED),
        IpAddr::V6(_) => IpAddr::V6(Ipv6Addr::UNSPECIFIED),
    };
    let source = || {
        let socket = UdpSocket::bind((any, 0))?;
        socket.connect((address, 9))?;
        socket.local_addr()
    };
    match source() {
        Ok(source) => Ok(source.ip() == address),
        Err(error) if tcp::is_out_of_descriptors(&error) => Err(error),
        // There is no route to the address, or no such family of addresses.
        Err(_) => Ok(false),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn policy(text: &str, own_addresses: &[&str]) -> Policy {
        let source = proto_config::Source {
            origin: "test.yaml",
            base_dir: std::path::Path::new(""),
            check_files: false,
        };
        let config = proto_config::parse(text, source, |s| Some(PolicyConfig::read(s))).unwrap();
        let addresses: Vec<_> = own_addresses.iter().map(|a| a.parse().unwrap()).collect();
        config.rules(&addresses)
    }

    #[test]
    fn the_rules_follow_the_configuration_and_the_addresses() {
        let text = "
pod_cidrs: [10.244.1.0/24, \"fd00:1::/64\"]
service_cidrs: [10.96.0.0/12]
allow:
- {name: metrics, to: 10.0.0.5, ports: [9100, \"9200-9299\"]}
- {name: wide, to: 0.0.0.0/0, ports: 8000}
- {name: local-api, to: 127.0.0.1/32, ports: \"6443\"}
";
        let policy = policy(text, &["10.0.0.5", "fd00::5"]);
        for (address, port, expected) in [
            ("10.0.0.5", 10250, Ok("kubelet")),
            ("fd00::5", 10250, Ok("kubelet")),
            ("10.0.0.6", 10250, Err("default-deny")),
            ("10.0.0.5", 22, Err("default-deny")),
            ("10.244.1.9", 1, Ok("pod-cidr")),
            ("fd00:1::9", 65535, Ok("pod-cidr")),
            ("10.100.0.1", 443, Ok("service-cidr")),
            ("10.0.0.5", 9100, Ok("metrics")),
            ("10.0.0.5", 9250, Ok("metrics")),
            ("10.0.0.5", 9300, Err("default-deny")),
            ("8.8.8.8", 8000, Ok("wide")),
            ("169.254.169.254", 8000, Err("link-local")),
            ("127.0.0.1", 8000, Err("loopback")),
            ("127.0.0.1", 6443, Ok("local-api")),
        ] {
            let verdict = match policy.decide(address.parse().unwrap(), port) {
                Verdict::Allow { rule } => Ok(rule),
                Verdict::Deny { rule, .. } => Err(rule),
            };
            assert_eq!(verdict, expected, "{address} {port}");
        }
    }

    #[test]
    fn kubelet_port_0_allows_no_kubelet() {
        assert_eq!(policy("kubelet_port: 0", &["10.0.0.5"]), Policy::default());
    }

    #[test]
    fn an_address_is_of_this_host_or_it_is_not() {
        for (address, expected) in [
            ("127.0.0.1", true),
            ("::1", true),
            ("::ffff:127.0.0.1", true),
            ("198.51.100.7", false),
            ("255.255.255.255", false),
            ("2001:db8::7", false),
        ] {
            assert_eq!(is_of_this_host(address.parse().unwrap()).unwrap(), expected, "{address}");
        }
    }

    #[test]
    fn an_address_of_the_certificate_counts_if_the_host_has_it_and_it_is_not_closed() {
        let closed =
            ["127.0.0.1", "::1", "169.254.169.254", "fe80::1", "100.100.100.200", "64:ff9b::169.254.169.254"];
        let own = ["10.0.0.5", "fd00::5", "198.51.100.7"];
        let addresses = own.iter().chain(&closed).map(|a| a.parse().unwrap()).collect();
        let scope = Scope { addresses, certified_kubelet: Some(10250), ..Scope::default() };
        let here = |address: IpAddr| Ok(address != "198.51.100.7".parse::<IpAddr>().unwrap());
        let decide = |scope: &Scope, address: &str, port| match scope
            .decide(address.parse().unwrap(), port, here)
            .unwrap()
        {
            Verdict::Allow { rule } => Ok(rule.to_owned()),
            Verdict::Deny { rule, reason } => Err((rule, reason)),
        };
        for address in ["10.0.0.5", "::ffff:10.0.0.5", "fd00::5"] {
            assert_eq!(decide(&scope, address, 10250), Ok(KUBELET_RULE.to_owned()), "{address}");
            assert_eq!(decide(&scope, address, 10251).unwrap_err().0, DEFAULT_DENY, "{address}");
        }
        for address in closed {
            assert_ne!(decide(&scope, address, 10250).unwrap_err().0, DEFAULT_DENY, "{address}");
        }
        assert_eq!(decide(&scope, "10.0.0.6", 10250).unwrap_err().0, DEFAULT_DENY);
        let (rule, reason) = decide(&scope, "198.51.100.7", 10250).unwrap_err();
        assert!(rule == DEFAULT_DENY && reason.contains("`addresses:`"), "{rule}: {reason}");
        let unknown = |_| Err(io::Error::from_raw_os_error(libc::EMFILE));
        let own = "10.0.0.5".parse().unwrap();
        assert!(scope.decide(own, 10250, unknown).is_err(), "it is not refused as another host's");
        let none = Scope { certified_kubelet: None, ..scope };
        assert_eq!(decide(&none, "10.0.0.5", 10250).unwrap_err().0, DEFAULT_DENY);
    }
}
