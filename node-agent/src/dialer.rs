//! Policy, resolution and connection: every stream of every peer passes here.
//!
//! A name is resolved once, and the addresses that came out are what is checked and what is dialled, so an
//! answer that changes between the two gains nothing.

use std::{
    io,
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, ToSocketAddrs, UdpSocket},
    sync::{Arc, PoisonError, RwLock},
    time::Duration,
};

use proto::{
    DialError, Host, NodeName, Target,
    policy::{DEFAULT_DENY, Policy, Verdict},
};
use tokio::{net::TcpStream, sync::Semaphore};

use crate::config::KUBELET_RULE;

/// What this node is and lets others reach. Replaced whole when a renewed certificate changes it.
#[derive(Clone, Debug, Default)]
pub struct Scope {
    pub node: Option<NodeName>,
    /// What the node's name stands for.
    pub addresses: Vec<IpAddr>,
    pub policy: Policy,
    /// Where the addresses are the certificate's and not the configuration's, so that the policy has no rule for
    /// them, the kubelet's port. It is open on those that are this host's.
    pub certified_kubelet: Option<u16>,
}

impl Scope {
    /// Decides about one resolved address. Who signs certificates opens nothing but a port of this host: an address
    /// in a closed range stays closed, and one that the host does not have does.
    fn decide(&self, address: IpAddr, port: u16, is_of_this_host: impl Fn(IpAddr) -> bool) -> Verdict<'_> {
        let verdict = self.policy.decide(address, port);
        let certified =
            self.certified_kubelet == Some(port) && self.addresses.contains(&address.to_canonical());
        match verdict {
            Verdict::Deny { rule: DEFAULT_DENY, .. } if certified && is_of_this_host(address) => {
                Verdict::Allow { rule: KUBELET_RULE }
            }
            Verdict::Deny { rule: DEFAULT_DENY, .. } if certified => Verdict::Deny {
                rule: DEFAULT_DENY,
                reason: format!(
                    "{address} is in the host certificate, but no interface of this host has it: if the host is \
                     behind NAT, list it under `addresses:` in the node-agent's configuration"
                ),
            },
            Verdict::Allow { .. } | Verdict::Deny { .. } => verdict,
        }
    }
}

/// Whether an address is this host's now. The kernel knows without a list of interfaces, which would need netlink,
/// and without a packet: only to its own addresses does it connect from that very address.
pub fn is_of_this_host(address: IpAddr) -> bool {
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
    source().is_ok_and(|source| source.ip() == address)
}

/// Dials what the policy allows. Cheap to clone.
#[derive(Clone, Debug, Default)]
pub struct LocalDialer(Arc<RwLock<Arc<Scope>>>);

/// A connection, and the rule that allowed it.
#[derive(Debug)]
pub struct Dialled {
    pub socket: TcpStream,
    pub rule: String,
}

impl LocalDialer {
    pub fn new(scope: Scope) -> Self {
        Self(Arc::new(RwLock::new(Arc::new(scope))))
    }

    pub fn replace(&self, scope: Scope) {
        *self.0.write().unwrap_or_else(PoisonError::into_inner) = Arc::new(scope);
    }

    pub fn scope(&self) -> Arc<Scope> {
        self.0.read().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Connects to `target` within `timeout`, resolution included.
    /// `lookups` bounds how many names the caller's kind may have under way.
    pub async fn dial(
        &self,
        target: &Target,
        timeout: Duration,
        lookups: &Arc<Semaphore>,
    ) -> Result<Dialled, DialError> {
        let scope = self.scope();
        match tokio::time::timeout(timeout, dial(&scope, target, lookups)).await {
            Ok(result) => result,
            Err(_) => Err(DialError::TimedOut(format!(
                "dial tcp {target}: no answer within {}",
                humantime::format_duration(timeout)
            ))),
        }
    }
}

async fn dial(scope: &Scope, target: &Target, lookups: &Arc<Semaphore>) -> Result<Dialled, DialError> {
    let addresses = resolve(scope, target, lookups).await?;
    let mut refusal = None;
    let mut failure = None;
    for address in addresses {
        match scope.decide(address, target.port, is_of_this_host) {
            Verdict::Allow { rule } => {
                match TcpStream::connect(SocketAddr::new(address, target.port)).await {
                    Ok(socket) => return Ok(Dialled { socket, rule: rule.to_owned() }),
                    Err(e) => failure = Some(connect_error(target, &e)),
                }
            }
            Verdict::Deny { rule, reason } => {
                refusal.get_or_insert(DialError::Policy { rule: rule.to_owned(), reason });
            }
        }
    }
    Err(failure
        .or(refusal)
        .unwrap_or_else(|| DialError::Resolve(format!("lookup {}: the name has no address", target.host))))
}

async fn resolve(scope: &Scope, target: &Target, lookups: &Arc<Semaphore>) -> Result<Vec<IpAddr>, DialError> {
    let name = match &target.host {
        Host::Addr(addr) => return Ok(vec![*addr]),
        Host::Name(name) => name,
    };
    if scope.node.as_ref().is_some_and(|node| node.as_str() == name) && !scope.addresses.is_empty() {
        return Ok(scope.addresses.clone());
    }
    let failed = |e: &dyn std::fmt::Display| DialError::Resolve(format!("lookup {name}: {e}"));
    let permit = lookups.clone().acquire_owned().await.map_err(|e| failed(&e))?;
    let (asked, port) = (name.clone(), target.port);
    // A look-up can't be cancelled: it keeps its permit until it ends, also when its caller has left.
    let lookup = tokio::task::spawn_blocking(move || {
        let _permit = permit;
        Ok::<_, io::Error>(
            (asked.as_str(), port).to_socket_addrs()?.map(|addr| addr.ip().to_canonical()).collect(),
        )
    });
    lookup.await.map_err(|e| failed(&e))?.map_err(|e| failed(&e))
}

fn connect_error(target: &Target, error: &io::Error) -> DialError {
    let text = |what: &str| format!("dial tcp {target}: {what}");
    let kind = error.kind();
    if kind == io::ErrorKind::ConnectionRefused {
        DialError::Refused(text("connection refused"))
    } else if kind == io::ErrorKind::ConnectionReset {
        DialError::Refused(text("connection reset"))
    } else if kind == io::ErrorKind::TimedOut {
        DialError::TimedOut(text("connection timed out"))
    } else {
        DialError::Unreachable(text(&error.to_string()))
    }
}

#[cfg(test)]
mod tests {
    use proto::policy::Rule;
    use tokio::net::TcpListener;

    use super::*;

    fn dialer(net: &str, port: u16) -> LocalDialer {
        LocalDialer::new(Scope {
            node: Some("n1".parse().unwrap()),
            addresses: vec!["127.0.0.1".parse().unwrap()],
            policy: Policy {
                rules: vec![Rule { name: "test".into(), net: net.parse().unwrap(), ports: port..=port }],
            },
            certified_kubelet: None,
        })
    }

    async fn try_dial(dialer: &LocalDialer, target: &str) -> Result<String, DialError> {
        let lookups = Arc::new(Semaphore::new(1));
        dialer.dial(&target.parse().unwrap(), Duration::from_secs(5), &lookups).await.map(|d| d.rule)
    }

    #[tokio::test]
    async fn dials_what_a_rule_allows_under_any_name() {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let port = listener.local_addr().unwrap().port();
        let dialer = dialer("127.0.0.1/32", port);
        for host in ["127.0.0.1", "n1", "localhost", "[::ffff:127.0.0.1]"] {
            assert_eq!(try_dial(&dialer, &format!("{host}:{port}")).await, Ok("test".into()), "{host}");
        }
    }

    #[tokio::test]
    async fn refuses_by_the_resolved_address() {
        let dialer = dialer("10.0.0.0/8", 1);
        for (target, rule) in [
            ("127.0.0.1:1", "loopback"),
            ("localhost:1", "loopback"),
            ("169.254.169.254:1", "link-local"),
            ("192.168.0.1:1", "default-deny"),
        ] {
            let result = try_dial(&dialer, target).await;
            assert!(
                matches!(&result, Err(DialError::Policy { rule: r, .. }) if r == rule),
                "{target}: {result:?}"
            );
        }
    }

    #[tokio::test]
    async fn names_the_cause_of_a_failure() {
        let port = TcpListener::bind("127.0.0.1:0").await.unwrap().local_addr().unwrap().port();
        let dialer = dialer("127.0.0.1/32", port);
        assert_eq!(
            try_dial(&dialer, &format!("127.0.0.1:{port}")).await,
            Err(DialError::Refused(format!("dial tcp 127.0.0.1:{port}: connection refused")))
        );
        assert!(matches!(try_dial(&dialer, "no-such-name.invalid:1").await, Err(DialError::Resolve(_))));
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
            assert_eq!(is_of_this_host(address.parse().unwrap()), expected, "{address}");
        }
    }

    #[test]
    fn an_address_of_the_certificate_counts_if_the_host_has_it_and_it_is_not_closed() {
        let closed =
            ["127.0.0.1", "::1", "169.254.169.254", "fe80::1", "100.100.100.200", "64:ff9b::169.254.169.254"];
        let own = ["10.0.0.5", "fd00::5", "198.51.100.7"];
        let addresses = own.iter().chain(&closed).map(|a| a.parse().unwrap()).collect();
        let scope = Scope { addresses, certified_kubelet: Some(10250), ..Scope::default() };
        let here = |address: IpAddr| address != "198.51.100.7".parse::<IpAddr>().unwrap();
        let decide =
            |scope: &Scope, address: &str, port| match scope.decide(address.parse().unwrap(), port, here) {
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
        let none = Scope { certified_kubelet: None, ..scope };
        assert_eq!(decide(&none, "10.0.0.5", 10250).unwrap_err().0, DEFAULT_DENY);
    }
}
