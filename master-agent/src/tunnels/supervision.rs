//! Admits tunnels to the registry and supervises each to its end.

use std::{
    convert::Infallible,
    future::pending,
    sync::Arc,
    time::{Duration, SystemTime},
};

use proto::relink::GRACE;
use proto_net::{mux::Notice, tasks::Tasks};
use tokio::{
    sync::watch,
    task::spawn_blocking,
    time::{MissedTickBehavior, interval, sleep},
};

use super::{
    callers::CallerTunnelSender,
    config::TunnelsConfig,
    counters::TunnelMetrics,
    further::Attempts,
    refusals::Refusals,
    registry::{Registration, Registry},
    renewal::Renewal,
    revocations::RevocationList,
    session::error::TunnelError,
    trust::Trust,
    tunnel::{Direction, Notices, Tunnel},
};
use crate::{admin_api::EventKind, metrics::ReasonLabel, routing::inventory::Inventory};

/// How long an older tunnel may take to answer a ping when its node establishes another one.
const PROBE_TIMEOUT: Duration = Duration::from_millis(1500);
/// How often the host keys of all tunnels are verified again, since the inventory may have changed. A change of the store
/// causes a check at once.
const RECHECK_INTERVAL: Duration = Duration::from_secs(10);
/// The maximum number of retired tunnels that one node may keep.
const MAX_RETIRED: usize = 64;
/// The number of notices of one tunnel that are logged. An honest node sends one or two, and a hostile one can send any
/// number.
const MAX_LOGGED_NOTICES: usize = 16;
/// How often a retired tunnel is checked for open streams.
const IDLE_POLL_INTERVAL: Duration = Duration::from_secs(1);

/// A registered tunnel, and what its node says about it if it has a multiplexer.
pub(super) type Linked = (Registration, Option<Notices>);

/// Registers tunnels and supervises them until they end.
pub struct Supervisor {
    pub config: TunnelsConfig,
    pub nodes: watch::Receiver<Arc<Inventory>>,
    pub registry: Arc<Registry>,
    pub trust: Arc<Trust>,
    pub refusals: Refusals,
    pub renewal: Renewal,
    pub revocations: Arc<RevocationList>,
    /// Passes tunnels to the front end, which serves their callers. With `None`, no callers come through tunnels.
    pub callers: Option<CallerTunnelSender>,
    pub metrics: TunnelMetrics,
    /// The group of the tasks that probe and close tunnels.
    pub tasks: Tasks,
}

impl Supervisor {
    /// Registers a tunnel. A tunnel that can't be registered is closed, and its node learns the reason.
    pub(super) async fn register(&self, tunnel: Tunnel) -> Result<Registration, TunnelError> {
        let tunnel = Arc::new(tunnel);
        // The node may have joined with another key since this one was verified.
        let registered = match self.trust.still_good(&tunnel.host) {
            Ok(()) => self.registry.register(tunnel.clone()).map_err(TunnelError::from),
            Err(why) => Err(self.refusals.host_key(&why)),
        };
        let (registration, others) = match registered {
            Ok(registered) => registered,
            Err(error) => {
                tunnel.close(&error.to_string()).await;
                return Err(error);
            }
        };
        if let Some(absence) = registration.absence {
            self.metrics.node_absence_seconds.observe(absence.as_secs_f64());
        }
        self.metrics.tunnels_established.inc();
        tracing::info!(
            node = %tunnel.node,
            peer = tunnel.peer.map(tracing::field::display),
            direction = tunnel.direction.name(),
            kind = tunnel.kind(),
            standby = others.len(),
            "tunnel established"
        );
        self.settle_others(others);
        Ok(registration)
    }

    /// Closes surplus retired tunnels of a node that has established another one, and probes the others.
    fn settle_others(&self, others: Vec<Arc<Tunnel>>) {
        // Streams that last longer than the certificates of many links must not keep all of those links.
        let retired: Vec<_> = others.iter().filter(|other| !other.is_usable()).cloned().collect();
        for oldest in retired.into_iter().rev().skip(MAX_RETIRED) {
            let reason = "too many links of the node take no new streams";
            self.tasks.spawn(async move { oldest.close(reason).await });
        }
        // A node that establishes another tunnel may have lost the old one without the master noticing.
        let unanswered = u32::try_from(self.config.keepalive_max + 1).unwrap_or(u32::MAX);
        let dead_after = self.config.keepalive_interval.saturating_mul(unanswered);
        for other in others {
            self.tasks.spawn(probe(other, dead_after));
        }
    }

    /// Returns the most callers of one node at once, if callers come through tunnels.
    pub(super) fn max_callers(&self) -> Option<usize> {
        self.callers.as_ref().map(|callers| callers.max_callers)
    }

    /// Supervises a tunnel until it ends, and returns the reason.
    pub(super) async fn supervise(self: Arc<Self>, (registration, mut notices): Linked) -> String {
        let tunnel = registration.tunnel();
        let duties = async {
            tokio::join!(
                pending::<Infallible>(),
                self.hand_to_callers(tunnel),
                self.revocations.deliver(tunnel),
                self.renewal.run(tunnel),
                log_notices(tunnel, notices.as_mut()),
                close_when_idle(tunnel),
                call_for_more(tunnel),
            )
        };
        let reason = tokio::select! {
            // The node's last notices are logged before the end.
            biased;
            (never, ..) = duties => match never {},
            reason = tunnel.ended() => reason,
        };
        while let Some(notice) = notices.as_mut().and_then(|notices| notices.try_recv().ok()) {
            log_notice(tunnel, &notice);
        }
        tunnel.further.end();
        let seconds = tunnel.established.elapsed().as_secs();
        // A node that has called home again takes no new streams on the former link, and closes that link once its
        // streams have ended.
        if tunnel.is_retired() || tunnel.is_going_away() && self.registry.has_newer(tunnel) {
            tracing::info!(node = %tunnel.node, reason, seconds, "retired tunnel ended");
            return reason;
        }
        self.metrics.tunnels_lost.get_or_create(&ReasonLabel { reason: tunnel.loss().kind() }).inc();
        self.registry.event(&tunnel.node, EventKind::Lost, &reason);
        tracing::warn!(node = %tunnel.node, reason, seconds, "tunnel ended");
        reason
    }

    /// Verifies the host keys of all tunnels again and again, and closes those whose host is no longer the node, or which
    /// have outlived the certificates that established them. Never returns.
    pub async fn recheck(self: Arc<Self>) {
        let mut interval = interval(RECHECK_INTERVAL);
        interval.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let mut key_changes = self.trust.key_changes();
        loop {
            tokio::select! {
                _ = interval.tick() => {}
                Ok(()) = key_changes.changed() => {}
            }
            let (supervisor, now) = (self.clone(), self.renewal.clock.now());
            // A visit of many tunnels must not block the threads that serve streams, and one task wakes up less often than
            // a timer for each tunnel.
            match spawn_blocking(move || supervisor.unfit(now)).await {
                Ok(unfit) => {
                    for (tunnel, reason) in unfit {
                        self.tasks.spawn(async move { tunnel.close(&reason).await });
                    }
                }
                Err(error) => tracing::error!(%error, "can't verify host keys again"),
            }
        }
    }

    /// Returns the tunnels that have to be closed, each with the reason.
    fn unfit(&self, now: SystemTime) -> Vec<(Arc<Tunnel>, String)> {
        let reason = |tunnel: &Tunnel| match self.trust.still_good(&tunnel.host) {
            Ok(()) => outlived(tunnel, now).map(str::to_owned),
            Err(why) => Some(self.refusals.host_key(&why).to_string()),
        };
        let alive = self.registry.tunnels().into_iter().filter(|tunnel| !tunnel.has_ended());
        alive.filter_map(|tunnel| reason(&tunnel).map(|reason| (tunnel, reason))).collect()
    }

    async fn hand_to_callers(&self, tunnel: &Arc<Tunnel>) {
        let Some(callers) = &self.callers else { return };
        let listen = match tunnel.is_node_agent() {
            true => None,
            false => self.nodes.borrow().node(&tunnel.node).and_then(|node| node.front_end_listen),
        };
        callers.send(tunnel.clone(), listen).await;
    }
}

/// Returns why a tunnel has lasted for too long, if it has. An honest node has its host certificate renewed over the tunnel,
/// and another link before the master's certificate expires. A link that another one has replaced keeps its streams, and a
/// plain sshd checks certificates in handshakes only.
fn outlived(tunnel: &Tunnel, now: SystemTime) -> Option<&'static str> {
    let expired =
        |at: Option<SystemTime>| at.and_then(|at| at.checked_add(GRACE)).is_some_and(|end| end < now);
    if !tunnel.is_node_agent() {
        return None;
    }
    if expired(tunnel.certificate_expires()) {
        return Some("the node's host certificate has expired");
    }
    let is_replaced = tunnel.is_going_away() && !tunnel.is_idle();
    (expired(tunnel.user_expires()) && !is_replaced)
        .then_some("the master's certificate that established this link has expired")
}

/// Makes a tunnel the last choice while it leaves a ping unanswered, and closes it if it does not answer in time.
async fn probe(tunnel: Arc<Tunnel>, dead_after: Duration) {
    if tunnel.answers(PROBE_TIMEOUT).await {
        return;
    }
    tunnel.set_suspect(true);
    if tunnel.answers(dead_after).await {
        tunnel.set_suspect(false);
    } else {
        tunnel.close("the node came again, and this tunnel no longer answers").await;
    }
}

async fn log_notices(tunnel: &Tunnel, notices: Option<&mut Notices>) {
    let Some(notices) = notices else { return };
    let mut logged = 0;
    while let Some(notice) = notices.recv().await {
        if matches!(notice, Notice::Relink | Notice::GoAway(_)) {
            tunnel.on_relink();
        }
        if let Notice::Drain { milliseconds } = notice {
            tunnel.on_drain(Duration::from_millis(milliseconds));
        }
        if notice != Notice::Relink && logged < MAX_LOGGED_NOTICES {
            logged += 1;
            log_notice(tunnel, &notice);
        }
    }
}

fn log_notice(tunnel: &Tunnel, notice: &Notice) {
    match notice {
        Notice::Call => {
            tracing::warn!(node = %tunnel.node, "ignoring a call for a connection from the node");
        }
        Notice::Relink => tracing::info!(node = %tunnel.node, "the node asks for another link"),
        Notice::Drain { milliseconds: 0 } => {
            tracing::info!(node = %tunnel.node, "the node no longer asks to be drained");
        }
        Notice::Drain { milliseconds } => {
            let seconds = milliseconds / 1000;
            tracing::info!(node = %tunnel.node, seconds, "the node asks to be drained");
        }
        Notice::GoAway(reason) => {
            tracing::info!(node = %tunnel.node, reason, "the node takes no new streams");
        }
        Notice::Certificate(_) => {
            tracing::warn!(node = %tunnel.node, "ignoring a certificate from the node");
        }
    }
}

/// Calls for further connections to a node that dials them.
async fn call_for_more(tunnel: &Tunnel) {
    if tunnel.direction == Direction::Dialled {
        return;
    }
    let mut attempts = Attempts::default();
    loop {
        tunnel.wants_further().await;
        attempts.after(tunnel, tunnel.call_node().await).await;
    }
}

/// Closes a tunnel once it is retired and its streams have ended.
async fn close_when_idle(tunnel: &Tunnel) {
    tunnel.retired().await;
    let idle = async {
        while !tunnel.is_idle() {
            sleep(IDLE_POLL_INTERVAL).await;
        }
        if tunnel.connections() > 1 {
            // What the streams have sent last may still be under way there.
            sleep(IDLE_POLL_INTERVAL).await;
        }
    };
    tokio::select! {
        () = idle => {}
        // It ends unused connections, and makes no more of them.
        () = tunnel.wants_further() => {}
    }
    tunnel.close("another link has taken its place, and its streams have ended").await;
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::tunnels::{
        absent::Absent,
        session::state::Loss,
        testing::{Master, n1},
    };

    const HOUR: Duration = Duration::from_secs(3600);

    fn expect_n1(registry: &Registry) {
        registry.expect(&[(n1(), (1, Absent::New))].into_iter().collect());
    }

    fn lost(master: &Master, loss: Loss) -> u64 {
        master.metrics.tunnels_lost.get_or_create(&ReasonLabel { reason: loss.kind() }).get()
    }

    #[tokio::test(start_paused = true)]
    async fn a_tunnel_ends_when_its_host_is_no_longer_the_node() {
        let mut master = Master::new(HOUR, 8);
        expect_n1(&master.registry);
        let (tunnel, notices, _node) = master.tunnel().await;
        let registration = master.supervisor.register(tunnel).await.unwrap();
        master.tasks.spawn(master.supervisor.clone().recheck());
        let supervised = master.supervisor.clone().supervise((registration, Some(notices)));
        let forgotten = async {
            sleep(3 * RECHECK_INTERVAL).await;
            assert!(master.registry.is_connected(&n1()));
            master.nodes.send_replace(Arc::default());
        };
        let (reason, ()) = tokio::join!(supervised, forgotten);
        assert!(reason.contains("n1"), "{reason}");
        assert_eq!((lost(&master, Loss::ByMaster), master.registry.count()), (1, (0, 1)));
    }

    #[tokio::test(start_paused = true)]
    async fn a_link_ends_with_the_certificates_that_established_it_unless_it_is_replaced() {
        let life = Duration::from_secs(600);
        let mut master = Master::new(life, 8);
        expect_n1(&master.registry);
        master.tasks.spawn(master.supervisor.clone().recheck());
        let (mut supervised, mut tunnels, mut nodes) = (Vec::new(), Vec::new(), Vec::new());
        for _ in 0..3 {
            let (tunnel, notices, node) = master.tunnel().await;
            let registration = master.supervisor.register(tunnel).await.unwrap();
            tunnels.push(registration.tunnel().clone());
            supervised
                .push(master.tasks.spawn(master.supervisor.clone().supervise((registration, Some(notices)))));
            nodes.push(node);
        }
        let [left_over, replaced, unrenewed] = [0, 1, 2].map(|i| tunnels[i].clone());
        let stream = replaced.open(&"10.0.0.1:80".parse().unwrap(), "test", HOUR).await.unwrap();
        replaced.retire("another link has taken its place").await;
        // None of them has a host certificate, which is no reason to end them.
        sleep(Duration::from_secs(60)).await;
        assert!(tunnels.iter().all(|tunnel| !tunnel.has_ended()));
        let expires = master.clock.now() + Duration::from_secs(60);
        unrenewed.set_certificate_expires(expires);
        assert_eq!(unrenewed.ended().await, "the node's host certificate has expired");
        let late = |expired: SystemTime| master.clock.now().duration_since(expired).unwrap();
        let bounds = GRACE..=GRACE + RECHECK_INTERVAL + Duration::from_secs(1);
        assert!(bounds.contains(&late(expires)), "{:?}", late(expires));
        let expires = left_over.user_expires().unwrap();
        let reason = left_over.ended().await;
        assert_eq!(reason, "the master's certificate that established this link has expired");
        assert!(bounds.contains(&late(expires)), "{:?}", late(expires));
        sleep(2 * life).await;
        assert!(!replaced.has_ended());
        drop(stream);
        tokio::time::timeout(Duration::from_secs(60), replaced.ended()).await.unwrap();
        for supervised in supervised {
            supervised.await.unwrap().unwrap();
        }
    }

    #[tokio::test(start_paused = true)]
    async fn a_tunnel_that_a_newer_one_replaces_is_not_lost() {
        let mut master = Master::new(HOUR, 8);
        expect_n1(&master.registry);
        let mut supervised = Vec::new();
        let mut nodes = Vec::new();
        for _ in 0..2 {
            let (tunnel, notices, node) = master.tunnel().await;
            let registration = master.supervisor.register(tunnel).await.unwrap();
            supervised.push(Box::pin(master.supervisor.clone().supervise((registration, Some(notices)))));
            nodes.push(node);
        }
        let [former, newer] = [supervised.remove(0), supervised.remove(0)];
        nodes[0].mux.go_away("the node has made another link").await;
        let tunnels = master.registry.tunnels_of(&n1());
        let end = async {
            // The node's side ends the session once its streams have ended.
            while !tunnels[0].is_going_away() {
                sleep(Duration::from_millis(1)).await;
            }
            tunnels[0].close("the test ends it").await;
        };
        let (reason, ()) = tokio::join!(former, end);
        assert_eq!((reason.as_str(), lost(&master, Loss::ByMaster)), ("the test ends it", 0));
        tokio::join!(newer, tunnels[1].close("the agent stops"));
        assert_eq!(lost(&master, Loss::ByMaster), 1);
    }
}
