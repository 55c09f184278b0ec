//! What a node lets a master reach. Default deny; decided on the node, for every stream, on the very address
//! that is then dialled.

use std::net::IpAddr;

use ipnet::IpNet;

/// What one allow rule permits: an address inside `net`, a port inside `ports` (inclusive).
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Rule {
    /// Shown to whoever is refused or allowed by it, for instance `kubelet` or `pod-cidr`.
    pub name: String,
    pub net: IpNet,
    pub ports: std::ops::RangeInclusive<u16>,
}

/// A node's allow rules. What no rule names is refused; link-local and loopback addresses are refused
/// unless a rule's network lies wholly inside that range, so that a wide `0.0.0.0/0` never opens them.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Policy {
    pub rules: Vec<Rule>,
}

/// The rule that decided, whichever way.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Verdict<'a> {
    Allow { rule: &'a str },
    Deny { rule: &'static str, reason: String },
}

impl Policy {
    /// Decides about one resolved address. IPv4-mapped IPv6 addresses are judged as the IPv4 address.
    pub fn decide(&self, addr: IpAddr, port: u16) -> Verdict<'_> {
        let addr = addr.to_canonical();
        let special = special_range(addr);
        let matching = self
            .rules
            .iter()
            .filter(|rule| rule.net.contains(&addr) && rule.ports.contains(&port))
            .find(|rule| special.as_ref().is_none_or(|(_, range)| range.contains(&rule.net)));
        match (matching, special) {
            (Some(rule), _) => Verdict::Allow { rule: &rule.name },
            (None, Some((name, _))) => Verdict::Deny {
                rule: name,
                reason: format!("{addr} is in a range that is closed unless a rule names it"),
            },
            (None, None) => {
                Verdict::Deny { rule: "default-deny", reason: format!("no rule allows {addr} port {port}") }
            }
        }
    }
}

/// The always-closed range an address lies in, with the name that a refusal carries.
fn special_range(addr: IpAddr) -> Option<(&'static str, IpNet)> {
    let ranges = match addr {
        IpAddr::V4(_) => [
            ("link-local", net(IpAddr::from([169, 254, 0, 0]), 16)),
            ("loopback", net(IpAddr::from([127, 0, 0, 0]), 8)),
            ("unspecified", net(IpAddr::from([0, 0, 0, 0]), 8)),
            ("multicast", net(IpAddr::from([224, 0, 0, 0]), 3)),
        ],
        IpAddr::V6(_) => [
            ("link-local", net(IpAddr::from([0xfe80, 0, 0, 0, 0, 0, 0, 0]), 10)),
            ("loopback", net(IpAddr::from([0, 0, 0, 0, 0, 0, 0, 1]), 128)),
            ("unspecified", net(IpAddr::from([0u16; 8]), 128)),
            ("multicast", net(IpAddr::from([0xff00, 0, 0, 0, 0, 0, 0, 0]), 8)),
        ],
    };
    ranges.into_iter().find(|(_, range)| range.contains(&addr))
}

fn net(addr: IpAddr, prefix: u8) -> IpNet {
    IpNet::new_assert(addr, prefix)
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

    #[test]
    fn an_empty_policy_refuses_everything() {
        assert!(matches!(
            Policy::default().decide([10, 0, 0, 1].into(), 80),
            Verdict::Deny { rule: "default-deny", .. }
        ));
    }
}
