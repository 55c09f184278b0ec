//! Policy, resolution and connection: every stream of every peer passes here.
//!
//! A name is resolved once, and the addresses that came out are what is checked and what is dialled, so an
//! answer that changes between the two gains nothing.

use std::{
    io,
    net::{IpAddr, SocketAddr, ToSocketAddrs},
    sync::{Arc, PoisonError, RwLock},
    time::Duration,
};

use proto::{
    DialError, Host, NodeName, Target,
    policy::{Policy, Verdict},
};
use tokio::{net::TcpStream, sync::Semaphore};

/// What this node is and lets others reach. Replaced whole when a renewed certificate changes it.
#[derive(Clone, Debug, Default)]
pub struct Scope {
    pub node: Option<NodeName>,
    pub addresses: Vec<IpAddr>,
    pub policy: Policy,
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
        match scope.policy.decide(address, target.port) {
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
}
