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
use tokio::{
    net::TcpStream,
    time::{Instant, timeout_at},
};

use crate::{
    metrics::{self, Metrics},
    policy::{Scope, is_of_this_host},
    shares::Share,
    tcp::{self, NoneAnswered},
};

/// What Go's resolver says of a name that does not exist, or has no address.
const NO_SUCH_HOST: &str = "no such host";

/// Dials what the policy allows, and counts the outcome.
#[derive(Debug)]
pub struct Dialer {
    scope: RwLock<Arc<Scope>>,
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
        Self { scope: RwLock::new(Arc::new(scope)), metrics }
    }

    pub fn replace_scope(&self, scope: Scope) {
        *self.scope.write().unwrap_or_else(PoisonError::into_inner) = Arc::new(scope);
    }

    pub fn scope(&self) -> Arc<Scope> {
        self.scope.read().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Connects to `target` within `timeout`, which includes the resolution of its name. `lookups` bounds the names that
    /// are looked up for the same user.
    pub async fn dial(
        &self,
        target: &Target,
        timeout: Duration,
        lookups: &Share,
    ) -> Result<Dialled, DialError> {
        let result = dial(&self.scope(), target, timeout, lookups).await;
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

async fn dial(
    scope: &Scope,
    target: &Target,
    timeout: Duration,
    lookups: &Share,
) -> Result<Dialled, DialError> {
    let deadline = Instant::now() + timeout;
    let late = || {
        let limit = humantime::format_duration(timeout);
        DialError::TimedOut(format!("dial tcp {target}: no answer within {limit}"))
    };
    let addresses = timeout_at(deadline, resolve(scope, target, lookups)).await.map_err(|_| late())??;
    let mut allowed = Vec::new();
    let mut refusal = None;
    for address in addresses {
        let verdict = scope.decide(address, target.port, is_of_this_host);
        match verdict.map_err(|error| connect_error(target, &error))? {
            Verdict::Allow { rule } => allowed.push((SocketAddr::new(address, target.port), rule)),
            Verdict::Deny { rule, reason } => {
                refusal.get_or_insert(DialError::Policy { rule: rule.to_owned(), reason });
            }
        }
    }
    if allowed.is_empty() {
        let no_address = || DialError::Resolve(format!("lookup {}: {NO_SUCH_HOST}", target.host));
        return Err(refusal.unwrap_or_else(no_address));
    }
    match tcp::connect_to_any(allowed, deadline, TcpStream::connect::<SocketAddr>).await {
        Ok((socket, rule)) => Ok(Dialled { socket, rule: rule.to_owned() }),
        Err(NoneAnswered::InTime) => Err(late()),
        Err(NoneAnswered::Failed(error)) => Err(connect_error(target, &error)),
    }
}

async fn resolve(scope: &Scope, target: &Target, lookups: &Share) -> Result<Vec<IpAddr>, DialError> {
    let name = match &target.host {
        Host::Addr(addr) => return Ok(vec![*addr]),
        Host::Name(name) => name,
    };
    if scope.node.as_ref().is_some_and(|node| node.as_str() == name) && !scope.addresses.is_empty() {
        return Ok(scope.addresses.clone());
    }
    let failed = |e: &dyn std::fmt::Display| DialError::Resolve(format!("lookup {name}: {e}"));
    let permit = lookups.take().await.ok_or_else(|| failed(&"the agent is stopping"))?;
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
    if tcp::is_out_of_descriptors(error) {
        DialError::TooManyStreams("this node has no file descriptor left for another one".to_owned())
    } else if kind == io::ErrorKind::ConnectionRefused {
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
    use crate::shares::Shares;

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
        dial_for(dialer, target, &Shares::new(1, 1).of("somebody")).await
    }

    async fn dial_for(dialer: &Dialer, target: &str, lookups: &Share) -> Result<String, DialError> {
        let target = target.parse().unwrap();
        dialer.dial(&target, Duration::from_secs(5), lookups).await.map(|d| d.rule)
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
    async fn who_waits_for_silent_name_servers_keeps_nobody_else_waiting() {
        let dialer = dialer("127.0.0.1/32", 1);
        let lookups = Shares::new(3, 2);
        let (hostile, other) = (lookups.of("hostile"), lookups.of("other"));
        let _silent = [hostile.take().await, hostile.take().await];
        let waits = dial_for(&dialer, "localhost:2", &hostile).await;
        assert!(matches!(waits, Err(DialError::TimedOut(_))), "{waits:?}");
        let answered = dial_for(&dialer, "localhost:2", &other).await;
        assert!(matches!(answered, Err(DialError::Policy { .. })), "{answered:?}");
    }

    #[test]
    fn a_lack_of_descriptors_is_not_the_targets_fault() {
        let target: Target = "10.0.0.1:80".parse().unwrap();
        for code in [libc::EMFILE, libc::ENFILE] {
            let error = connect_error(&target, &io::Error::from_raw_os_error(code));
            assert!(matches!(error, DialError::TooManyStreams(_)), "{error}");
        }
    }
}
