//! Every stream of every peer is dialled here: the target's name is resolved, the policy decides about each address,
//! and one that is allowed is connected to.
//!
//! A name is resolved once. The addresses that came out are both checked and dialled, so a peer gains nothing from a
//! name server whose answer changes between the two.

use std::{
    io,
    net::{IpAddr, SocketAddr},
    sync::{Arc, PoisonError, RwLock},
    time::Duration,
};

use dns_lookup::{AddrInfoHints, LookupError, LookupErrorKind, SockType, getaddrinfo};
use proto::{DialError, Host, Target, policy::Verdict};
use tokio::{net::TcpStream, sync::Semaphore};

use crate::{
    identity::user::UserRole,
    metrics::{self, Metrics},
    policy::{Scope, is_of_this_host},
};

/// What Go's resolver says of a name that does not exist, or has no address.
const NO_SUCH_HOST: &str = "no such host";
/// Names that are looked up at once for masters and for people. Each takes a thread while its name servers are silent.
const LOOKUPS: usize = 64;
const LOOKUPS_OF_PEOPLE: usize = 16;

/// Dials what the policy allows, and counts the outcome.
#[derive(Debug)]
pub struct Dialer {
    scope: RwLock<Arc<Scope>>,
    lookups: Arc<Semaphore>,
    lookups_of_people: Arc<Semaphore>,
    metrics: Arc<Metrics>,
}

/// A connection, and the rule that allowed it.
#[derive(Debug)]
pub struct Dialled {
    pub socket: TcpStream,
    pub rule: String,
}

impl Dialer {
    pub fn new(scope: Scope, metrics: Arc<Metrics>) -> Self {
        Self {
            scope: RwLock::new(Arc::new(scope)),
            lookups: Arc::new(Semaphore::new(LOOKUPS)),
            lookups_of_people: Arc::new(Semaphore::new(LOOKUPS_OF_PEOPLE)),
            metrics,
        }
    }

    pub fn replace_scope(&self, scope: Scope) {
        *self.scope.write().unwrap_or_else(PoisonError::into_inner) = Arc::new(scope);
    }

    pub fn scope(&self) -> Arc<Scope> {
        self.scope.read().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Connects to `target` on behalf of a user within `timeout`, which includes the resolution of its name.
    pub async fn dial(
        &self,
        target: &Target,
        timeout: Duration,
        role: &UserRole,
    ) -> Result<Dialled, DialError> {
        let lookups = match role {
            UserRole::Master => &self.lookups,
            UserRole::Person { .. } => &self.lookups_of_people,
        };
        let scope = self.scope();
        let result = match tokio::time::timeout(timeout, dial(&scope, target, lookups)).await {
            Ok(result) => result,
            Err(_) => Err(DialError::TimedOut(format!(
                "dial tcp {target}: no answer within {}",
                humantime::format_duration(timeout)
            ))),
        };
        match &result {
            Ok(_) => self.count("ok"),
            Err(error) => {
                self.count(error.kind());
                if let DialError::Policy { rule, .. } = error {
                    self.metrics.refusals.get_or_create(&metrics::RuleLabel { rule: rule.clone() }).inc();
                }
                tracing::info!(%target, %error, fault = %error.fault(), "dial failed");
            }
        }
        result
    }

    /// Counts a dial whose caller left before it ended.
    pub fn count_cancelled(&self) {
        self.count(DialError::Cancelled.kind());
    }

    fn count(&self, result: &'static str) {
        self.metrics.dials.get_or_create(&metrics::ResultLabel { result }).inc();
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
        .unwrap_or_else(|| DialError::Resolve(format!("lookup {}: {NO_SUCH_HOST}", target.host))))
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
    let asked = name.clone();
    // A lookup can't be cancelled, so it keeps its permit until it ends, also when its caller has left.
    let lookup = tokio::task::spawn_blocking(move || {
        let _permit = permit;
        let hints = AddrInfoHints { socktype: SockType::Stream.into(), ..AddrInfoHints::default() };
        let found = getaddrinfo(Some(&asked), None, Some(hints))?;
        found.map(|found| Ok(found?.sockaddr.ip().to_canonical())).collect::<Result<_, LookupError>>()
    });
    lookup.await.map_err(|e| failed(&e))?.map_err(|error| failed(&lookup_error(error)))
}

/// What a failed lookup says. Programs in Go look for the text [`NO_SUCH_HOST`].
fn lookup_error(error: LookupError) -> String {
    if matches!(error.kind(), LookupErrorKind::NoName | LookupErrorKind::NoData) {
        return NO_SUCH_HOST.to_owned();
    }
    io::Error::from(error).to_string()
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
    use proto::policy::{Policy, Rule};
    use tokio::net::TcpListener;

    use super::*;

    fn dialer(net: &str, port: u16) -> Dialer {
        let scope = Scope {
            node: Some("n1".parse().unwrap()),
            addresses: vec!["127.0.0.1".parse().unwrap()],
            policy: Policy {
                rules: vec![Rule { name: "test".into(), net: net.parse().unwrap(), ports: port..=port }],
            },
            certified_kubelet: None,
        };
        Dialer::new(scope, Arc::default())
    }

    async fn try_dial(dialer: &Dialer, target: &str) -> Result<String, DialError> {
        let target = target.parse().unwrap();
        dialer.dial(&target, Duration::from_secs(5), &UserRole::Master).await.map(|d| d.rule)
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
        let refusals = |rule: &str| {
            dialer.metrics.refusals.get_or_create(&metrics::RuleLabel { rule: rule.to_owned() }).get()
        };
        assert_eq!([refusals("loopback"), refusals("link-local"), refusals("default-deny")], [2, 1, 1]);
        assert_eq!(dialer.metrics.dials.get_or_create(&metrics::ResultLabel { result: "policy" }).get(), 4);
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
    fn a_name_that_does_not_exist_is_no_such_host() {
        for (code, says) in [
            (libc::EAI_NONAME, "no such host"),
            (libc::EAI_NODATA, "no such host"),
            (libc::EAI_AGAIN, "Temporary failure in name resolution"),
        ] {
            let error = lookup_error(LookupError::new(code));
            assert!(error.contains(says), "{error}");
        }
    }

    #[tokio::test(start_paused = true)]
    async fn people_who_wait_for_name_servers_keep_no_master_waiting() {
        let dialer = dialer("127.0.0.1/32", 1);
        let _all = dialer.lookups_of_people.acquire_many(LOOKUPS_OF_PEOPLE as u32).await.unwrap();
        let target = "localhost:2".parse().unwrap();
        let person = UserRole::Person { login: "alice".into(), key_id: "alice".into() };
        let waits = dialer.dial(&target, Duration::from_secs(5), &person).await;
        assert!(matches!(waits, Err(DialError::TimedOut(_))), "{waits:?}");
        assert!(matches!(try_dial(&dialer, "localhost:2").await, Err(DialError::Policy { .. })));
    }
}
