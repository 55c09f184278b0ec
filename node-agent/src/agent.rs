//! What all parts of a running node-agent share.

use std::{
    net::IpAddr,
    sync::{Arc, Mutex, PoisonError},
    time::{Duration, SystemTime},
};

use hyper::{Request, body::Incoming};
use proto::{
    DialError, Target,
    policy::closed_range,
    revocation::{Report, SignedList},
};
use proto_net::{admin, handshake::Places, tasks::Tasks};
use russh::keys::{Certificate, PrivateKey};
use tokio::sync::Semaphore;
use tokio_util::sync::CancellationToken;

use crate::{
    config::{Config, KUBELET_RULE},
    dialer::{Dialled, LocalDialer, Scope, is_of_this_host},
    front_ends::FrontEnds,
    identity::{NodeIdentity, UserCertError, UserRole},
    metrics::{self, Metrics},
    revocation::{RefusedList, Revocations},
};

/// Names that are looked up at once. Each takes a thread while its name servers are silent.
const LOOKUPS: usize = 64;
const LOOKUPS_OF_PEOPLE: usize = 16;

/// Configuration, identity, dialer and counters, and the owner of every session.
pub struct Agent {
    pub config: Config,
    pub dialer: LocalDialer,
    pub metrics: Metrics,
    /// Every SSH session, and what runs for it.
    pub sessions: Tasks,
    /// Set when no new streams are to be taken.
    pub draining: CancellationToken,
    /// Set when sessions are to say goodbye.
    pub stopping: CancellationToken,
    pub handshakes: Places,
    /// Where callers of the local endpoint go, if there is one.
    pub front_ends: Option<FrontEnds>,
    /// Sessions of people; masters don't count, so that people can't keep them out.
    pub people: Arc<Semaphore>,
    lookups: Arc<Semaphore>,
    lookups_of_people: Arc<Semaphore>,
    identity: Mutex<NodeIdentity>,
    pub revocations: Revocations,
}

impl Agent {
    pub fn new(config: Config, identity: NodeIdentity, revocations: Revocations) -> Self {
        let agent = Self {
            dialer: LocalDialer::default(),
            metrics: Metrics::default(),
            sessions: Tasks::new(),
            draining: CancellationToken::new(),
            stopping: CancellationToken::new(),
            handshakes: Places::new(config.limits.max_handshakes),
            front_ends: config.front_end.as_ref().map(FrontEnds::new),
            people: Arc::new(Semaphore::new(config.limits.max_sessions)),
            lookups: Arc::new(Semaphore::new(LOOKUPS)),
            lookups_of_people: Arc::new(Semaphore::new(LOOKUPS_OF_PEOPLE)),
            identity: Mutex::new(identity),
            revocations,
            config,
        };
        agent.apply_identity();
        agent
    }

    fn identity(&self) -> std::sync::MutexGuard<'_, NodeIdentity> {
        self.identity.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Takes the node's name and addresses from the configuration, or else from the certificate. Those that the
    /// configuration states are rules of the policy; the certificate's are looked for on the host at every dial.
    fn apply_identity(&self) {
        let (node, certified, expiry) = {
            let identity = self.identity();
            let node = self.config.node.clone().or_else(|| identity.node_name());
            (node, identity.addresses(), identity.not_after())
        };
        let stated = self.config.addresses.clone();
        let policy = self.config.policy(&stated);
        let (addresses, certified_kubelet) = match stated.as_slice() {
            [] => (certified, self.config.policy.kubelet_port),
            _ => (stated, None),
        };
        if let Some(port) = certified_kubelet {
            for address in &addresses {
                if closed_range(*address).is_none() && is_of_this_host(*address) {
                    tracing::info!(rule = KUBELET_RULE, %address, port, "policy allows an address of the certificate");
                } else {
                    tracing::warn!(%address, "an address of the certificate stays closed: no interface of this host has it, or it is in a closed range; `addresses:` in the configuration can list it");
                }
            }
        }
        for rule in &policy.rules {
            tracing::info!(rule = rule.name, net = %rule.net, ports = ?rule.ports, "policy allows");
        }
        let seconds = expiry.and_then(|t| t.duration_since(SystemTime::UNIX_EPOCH).ok());
        self.metrics.certificate_expiry.set(seconds.unwrap_or_default().as_secs_f64());
        self.dialer.replace(Scope { node, addresses, policy, certified_kubelet });
    }

    /// The key and certificate to show in a handshake.
    pub fn host_key(&self) -> Result<(PrivateKey, Option<Certificate>), String> {
        let identity = self.identity();
        Ok((identity.host_key().clone(), identity.certificate().cloned()))
    }

    /// When the host certificate expired, if it has.
    pub fn expired(&self) -> Option<SystemTime> {
        self.identity().not_after().filter(|at| *at <= SystemTime::now())
    }

    pub fn verify_user(
        &self,
        login: &str,
        certificate: &Certificate,
        peer: Option<IpAddr>,
        now: SystemTime,
    ) -> Result<UserRole, UserCertError> {
        let role = self.identity().verify_user(login, certificate, peer, now)?;
        if let Some(by) = self.revocations.revokes(certificate) {
            return Err(UserCertError::Revoked(by));
        }
        match &role {
            UserRole::Person { login, .. }
                if !self.config.users.is_empty() && !self.config.users.contains(login) =>
            {
                Err(UserCertError::NotAllowed(login.clone()))
            }
            UserRole::Person { .. } | UserRole::Master => Ok(role),
        }
    }

    /// What a master is told of the lists of revoked certificates.
    pub fn held_lists(&self, refused: Option<String>) -> Report {
        let cas = self.identity().user_cas().to_vec();
        self.revocations.report(&cas, refused)
    }

    /// Takes a list of revoked certificates that a master has brought; gives what to answer. Takes time.
    pub fn take_list(&self, signed: SignedList) -> Report {
        let cas = self.identity().user_cas().to_vec();
        let refused = match self.revocations.install(signed, &cas) {
            Ok(new) => {
                if new {
                    tracing::info!(held = ?self.revocations.report(&cas, None).held, "took a list of revoked certificates");
                }
                None
            }
            Err(error @ RefusedList::NotKept(_)) => {
                tracing::error!(%error, "can't keep the list of revoked certificates");
                Some(error.to_string())
            }
            Err(error) => {
                tracing::warn!(%error, "refused a list of revoked certificates");
                Some(error.to_string())
            }
        };
        self.revocations.report(&cas, refused)
    }

    /// Takes a renewed host certificate from the master.
    pub fn renew(&self, text: &str) {
        let result = self.identity().renew(text);
        match result {
            Ok(()) => {
                self.metrics.renewals.get_or_create(&metrics::Result { result: "ok" }).inc();
                self.apply_identity();
                tracing::info!("host certificate renewed");
            }
            Err(error) => {
                self.metrics.renewals.get_or_create(&metrics::Result { result: "refused" }).inc();
                tracing::warn!(%error, "refused a renewed host certificate; the present one stays");
            }
        }
    }

    /// Dials through the policy, and counts the outcome.
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
        let result = self.dialer.dial(target, timeout, lookups).await;
        match &result {
            Ok(_) => self.count_dial("ok"),
            Err(error) => {
                self.count_dial(error.kind());
                if let DialError::Policy { rule, .. } = error {
                    self.metrics.refusals.get_or_create(&metrics::Rule { rule: rule.clone() }).inc();
                }
                tracing::info!(%target, %error, fault = %error.fault(), "dial failed");
            }
        }
        result
    }

    pub fn count_front_end(&self, result: &'static str) {
        self.metrics.front_end_callers.get_or_create(&metrics::Result { result }).inc();
    }

    pub fn count_dial(&self, result: &'static str) {
        self.metrics.dials.get_or_create(&metrics::Result { result }).inc();
    }
}

impl admin::Admin for Agent {
    fn ready(&self) -> Result<Vec<String>, String> {
        if self.draining.is_cancelled() {
            return Err("stopping".to_owned());
        }
        if self.config.listen.is_none() && self.metrics.sessions.get() == 0 {
            return Err("no master is connected".to_owned());
        }
        Ok(Vec::new())
    }

    fn answer(self: Arc<Self>, _: Request<Incoming>, _: admin::Door) -> admin::AnswerFuture {
        Box::pin(std::future::ready(None))
    }
}
