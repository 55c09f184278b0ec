//! What a node lets a master reach. What no rule allows is refused. The node decides for every stream, on the address that
//! it then dials.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use ipnet::{IpNet, Ipv4Net, Ipv6Net};

/// An allow rule: it permits the addresses in `net` on the ports in `ports`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Rule {
    /// Shown in records and refusals, for instance `kubelet` or `pod-cidr`.
    pub name: String,
    pub net: IpNet,
    pub ports: std::ops::RangeInclusive<u16>,
}

/// A node's allow rules. Addresses in a [`ClosedRange`] are refused unless the network of a rule lies wholly inside that
/// range, so that a wide rule such as `0.0.0.0/0` never opens them.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Policy {
    pub rules: Vec<Rule>,
}

/// The decision, and the rule that decided.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Verdict<'a> {
    Allow { rule: &'a str },
    Deny { rule: &'static str, reason: String },
}

/// A range of addresses that stays closed unless a rule names addresses in it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ClosedRange {
    pub name: &'static str,
    pub net: IpNet,
}

/// The name of the refusal of addresses that no rule allows and that lie in no closed range.
pub const DEFAULT_DENY: &str = "default-deny";

/// All names that refusals have in place of a rule: [`DEFAULT_DENY`], and those of the closed ranges.
pub const REFUSALS: [&str; 7] =
    [DEFAULT_DENY, "link-local", "loopback", "unspecified", "multicast", "metadata", "nat64"];

/// The metadata services of clouds whose addresses are not link-local. They give the host's credentials to everybody who asks
/// from it.
const METADATA: [IpAddr; 8] = [
    IpAddr::V4(Ipv4Addr::new(168, 63, 129, 16)),   // Azure
    IpAddr::V4(Ipv4Addr::new(100, 100, 100, 200)), // Alibaba Cloud
    IpAddr::V4(Ipv4Addr::new(192, 0, 0, 192)),     // Oracle Cloud Classic
    IpAddr::V6(Ipv6Addr::new(0xfd00, 0xec2, 0, 0, 0, 0, 0, 0x254)), // AWS
    IpAddr::V6(Ipv6Addr::new(0xfd00, 0xec2, 0, 0, 0, 0, 0, 0x23)), // AWS EKS Pod Identity
    IpAddr::V6(Ipv6Addr::new(0xfd20, 0xce, 0, 0, 0, 0, 0, 0x254)), // Google Cloud
    IpAddr::V6(Ipv6Addr::new(0xfd00, 0xc1, 0, 0, 0, 0, 0xa9fe, 0xa9fe)), // Oracle Cloud
    IpAddr::V6(Ipv6Addr::new(0xfd00, 0x42, 0, 0, 0, 0, 0, 0x42)), // Scaleway
];

impl Policy {
    /// Decides about one resolved address. An IPv4-mapped address counts as the IPv4 address in it, and so does a NAT64
    /// address, which rules may also name by networks inside `64:ff9b::/96`.
    pub fn decide(&self, addr: IpAddr, port: u16) -> Verdict<'_> {
        let addr = addr.to_canonical();
        let closed = closed_range(addr);
        let allows = |rule: &&Rule| rule.ports.contains(&port) && names(&rule.net, addr, closed);
        match (self.rules.iter().find(allows), closed) {
            (Some(rule), _) => Verdict::Allow { rule: &rule.name },
            (None, Some(ClosedRange { name, net })) => Verdict::Deny {
                rule: name,
                reason: format!("{addr} is in the range {net}, which is closed unless a rule names it"),
            },
            (None, None) => {
                Verdict::Deny { rule: DEFAULT_DENY, reason: format!("no rule allows {addr} port {port}") }
            }
        }
    }
}

/// Whether a rule for `net` allows `addr`: whether the network contains the address, and lies inside the closed range of
/// the address if there is one.
fn names(net: &IpNet, addr: IpAddr, closed: Option<ClosedRange>) -> bool {
    let inside = |net: &IpNet| closed.is_none_or(|range| range.net.contains(net));
    match (nat64_to_v4(addr), net) {
        (None, net) => net.contains(&addr) && inside(net),
        (Some(v4), IpNet::V4(_)) => net.contains(&IpAddr::V4(v4)) && inside(net),
        (Some(v4), IpNet::V6(v6)) => {
            let Some(prefix) = v6.prefix_len().checked_sub(96) else { return false };
            let Some(base) = nat64_to_v4(IpAddr::V6(v6.network())) else { return false };
            Ipv4Net::new(base, prefix).is_ok_and(|net| net.contains(&v4) && inside(&IpNet::V4(net)))
        }
    }
}

/// The closed range that an address lies in.
pub fn closed_range(addr: IpAddr) -> Option<ClosedRange> {
    let addr = addr.to_canonical();
    let addr = nat64_to_v4(addr).map_or(addr, IpAddr::V4);
    let v4 = |name, a: [u8; 4], prefix| (name, IpNet::V4(Ipv4Net::new_assert(a.into(), prefix)));
    let v6 = |name, a: [u16; 8], prefix| (name, IpNet::V6(Ipv6Net::new_assert(a.into(), prefix)));
    let ranges = [
        v4("link-local", [169, 254, 0, 0], 16),
        v4("loopback", [127, 0, 0, 0], 8),
        v4("unspecified", [0, 0, 0, 0], 8),
        v4("multicast", [224, 0, 0, 0], 3),
        v6("link-local", [0xfe80, 0, 0, 0, 0, 0, 0, 0], 10),
        v6("loopback", [0, 0, 0, 0, 0, 0, 0, 1], 128),
        v6("unspecified", [0; 8], 128),
        v6("multicast", [0xff00, 0, 0, 0, 0, 0, 0, 0], 8),
        // NAT64 inside one network (RFC 8215): only its owner knows where the IPv4 address is in these.
        v6("nat64", [0x64, 0xff9b, 1, 0, 0, 0, 0, 0], 48),
    ];
    let metadata = METADATA.into_iter().map(|addr| ("metadata", IpNet::from(addr)));
    let found = ranges.into_iter().chain(metadata).find(|(_, net)| net.contains(&addr));
    found.map(|(name, net)| ClosedRange { name, net })
}

/// The IPv4 address in an address with NAT64's well-known prefix (RFC 6052 §2.1).
fn nat64_to_v4(addr: IpAddr) -> Option<Ipv4Addr> {
    let IpAddr::V6(addr) = addr else { return None };
    let [0x64, 0xff9b, 0, 0, 0, 0, high, low] = addr.segments() else { return None };
    Some(Ipv4Addr::from_bits(u32::from(high) << 16 | u32::from(low)))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn policy(rules: &[(&str, &str, u16, u16)]) -> Policy {
        let rule = |&(name, net, from, to): &(&str, &str, u16, u16)| Rule {
            name: name.into(),
            net: net.parse().unwrap(),
            ports: from..=to,
        };
        Policy { rules: rules.iter().map(rule).collect() }
    }

    #[test]
    fn table() {
        let p = policy(&[
            ("kubelet", "10.0.0.5/32", 10250, 10250),
            ("pods", "10.244.1.0/24", 1, 65535),
            ("pods6", "fd00:1::/64", 1, 65535),
            ("everything", "0.0.0.0/0", 9000, 9000),
            ("everything6", "::/0", 9000, 9000),
            ("local-api", "127.0.0.1/32", 6443, 6443),
        ]);
        for (addr, port, want) in [
            ("10.0.0.5", 10250, Ok("kubelet")),
            ("10.0.0.5", 22, Err("default-deny")),
            ("10.244.1.7", 1, Ok("pods")),
            ("10.244.2.7", 80, Err("default-deny")),
            ("::ffff:10.244.1.7", 80, Ok("pods")),
            ("fd00:1::9", 80, Ok("pods6")),
            ("fd00:2::9", 80, Err("default-deny")),
            ("8.8.8.8", 9000, Ok("everything")),
            ("169.254.169.254", 9000, Err("link-local")),
            ("169.254.169.254", 80, Err("link-local")),
            ("::ffff:169.254.169.254", 80, Err("link-local")),
            ("fe80::1", 80, Err("link-local")),
            ("febf::1", 80, Err("link-local")),
            ("127.0.0.1", 6443, Ok("local-api")),
            ("127.0.0.1", 9000, Err("loopback")),
            ("127.0.0.2", 6443, Err("loopback")),
            ("::1", 80, Err("loopback")),
            ("0.0.0.0", 9000, Err("unspecified")),
            ("::", 9000, Err("unspecified")),
            ("224.0.0.1", 9000, Err("multicast")),
            ("255.255.255.255", 9000, Err("multicast")),
        ] {
            let got = match p.decide(addr.parse().unwrap(), port) {
                Verdict::Allow { rule } => Ok(rule.to_owned()),
                Verdict::Deny { rule, .. } => Err(rule.to_owned()),
            };
            assert_eq!(got, want.map(str::to_owned).map_err(str::to_owned), "{addr}:{port}");
        }
    }

    fn rule_of(policy: &Policy, addr: &str, port: u16) -> Result<String, &'static str> {
        match policy.decide(addr.parse().unwrap(), port) {
            Verdict::Allow { rule } => Ok(rule.to_owned()),
            Verdict::Deny { rule, .. } => Err(rule),
        }
    }

    const SERVICES: [&str; 5] =
        ["168.63.129.16", "100.100.100.200", "fd00:ec2::254", "fd20:ce::254", "::ffff:100.100.100.200"];

    #[test]
    fn metadata_services_are_closed_but_to_a_rule_for_that_very_address() {
        let wide = ["0.0.0.0/0", "168.63.129.0/24", "168.63.129.16/31", "100.64.0.0/10", "::/0", "fd00::/8"];
        let rules: Vec<_> = wide.iter().map(|net| ("wide", *net, 1, u16::MAX)).collect();
        for addr in SERVICES {
            for port in [53, 80] {
                assert_eq!(rule_of(&policy(&rules), addr, port), Err("metadata"), "{addr}");
            }
        }
        for neighbour in ["168.63.129.17", "100.100.100.201", "fd00:ec2::253"] {
            assert_eq!(rule_of(&policy(&rules), neighbour, 80), Ok("wide".into()), "{neighbour}");
        }
        let named = policy(&[("dns", "168.63.129.16/32", 53, 53), ("imds", "fd00:ec2::254/128", 80, 80)]);
        assert_eq!(rule_of(&named, "168.63.129.16", 53), Ok("dns".into()));
        assert_eq!(rule_of(&named, "168.63.129.16", 80), Err("metadata"));
        assert_eq!(rule_of(&named, "fd00:ec2::254", 80), Ok("imds".into()));
    }

    #[test]
    fn nat64_is_judged_by_the_address_in_it() {
        let wide = policy(&[
            ("kubelet", "10.0.0.5/32", 10250, 10250),
            ("v4", "0.0.0.0/0", 9000, 9000),
            ("v6", "::/0", 1, u16::MAX),
            ("nat64", "64:ff9b::/96", 9001, 9001),
        ]);
        for (addr, port, want) in [
            ("64:ff9b::10.0.0.5", 10250, Ok("kubelet")),
            ("64:ff9b::10.0.0.5", 22, Err("default-deny")),
            ("64:ff9b::8.8.8.8", 9000, Ok("v4")),
            ("64:ff9b::8.8.8.8", 9001, Ok("nat64")),
            ("64:ff9b::169.254.169.254", 9000, Err("link-local")),
            ("64:ff9b::169.254.169.254", 9001, Err("link-local")),
            ("64:ff9b::127.0.0.1", 9001, Err("loopback")),
            ("64:ff9b::0.0.0.0", 9001, Err("unspecified")),
            ("64:ff9b::224.0.0.1", 9001, Err("multicast")),
            ("64:ff9b::168.63.129.16", 9001, Err("metadata")),
            // The prefix for local use, whose closed range applies as a whole.
            ("64:ff9b:1::169.254.169.254", 80, Err("nat64")),
            ("64:ff9b:1:808:8:800::", 80, Err("nat64")),
            ("64:ff9b:2::1", 80, Ok("v6")),
            ("64:ff9b::1:0:0", 80, Ok("v6")),
        ] {
            assert_eq!(rule_of(&wide, addr, port), want.map(str::to_owned), "{addr}:{port}");
        }
        let named = policy(&[
            ("imds", "64:ff9b::169.254.169.254/128", 80, 80),
            ("link", "169.254.0.0/16", 81, 81),
            ("local", "64:ff9b:1:8::/64", 80, 80),
        ]);
        for (addr, port, want) in [
            ("64:ff9b::169.254.169.254", 80, Ok("imds")),
            ("64:ff9b::169.254.169.254", 81, Ok("link")),
            ("169.254.169.254", 80, Err("link-local")),
            ("64:ff9b:1:8::1", 80, Ok("local")),
        ] {
            assert_eq!(rule_of(&named, addr, port), want.map(str::to_owned), "{addr}:{port}");
        }
    }

    #[test]
    fn every_refusal_is_listed() {
        let addrs = ["10.0.0.1", "fe80::1", "::1", "::", "ff02::1", "fd00:ec2::254", "64:ff9b:1::"];
        let refusals = addrs.map(|addr| rule_of(&Policy::default(), addr, 80).unwrap_err());
        assert_eq!(refusals.len(), REFUSALS.len());
        assert!(REFUSALS.iter().all(|name| refusals.contains(name)), "{refusals:?}");
    }

    #[test]
    fn an_empty_policy_refuses_everything() {
        assert!(matches!(
            Policy::default().decide([10, 0, 0, 1].into(), 80),
            Verdict::Deny { rule: "default-deny", .. }
        ));
    }
}
