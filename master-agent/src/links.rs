//! Where links come from: nodes that the master dials, and nodes that call home (RFC 8071). Above the link
//! both are the same tunnel.

use std::{
    collections::HashMap,
    net::{IpAddr, SocketAddr},
    sync::Arc,
    time::{Duration, Instant, SystemTime},
};

use proto::{NodeName, Target, backoff::Backoff, relink};
use proto_net::{
    admin::accept_error,
    handshake::HandshakePermit,
    mux::{Events, Notice},
    socket,
    tasks::Tasks,
};
use tokio::{
    io::{AsyncRead, AsyncWrite},
    net::{TcpListener, TcpStream},
    sync::watch,
    time::Interval,
};

use crate::{
    admin_api::EventKind,
    agent::Agent,
    identity::{HostKeyError, LOGIN, UserIdentity},
    join,
    metrics::Reason,
    registry::{Absent, Registration},
    routing::inventory::InventoryNode,
    trust,
    tunnel::{Direction, HostIdentity, Session, Tunnel, TunnelError, Verify, handshake},
    tunnels::revocation,
};

/// How long a TCP connection may take.
const CONNECT_TIMEOUT: Duration = Duration::from_millis(2500);
/// How long an older tunnel has to prove that it lives when a second one for its node comes.
const PROBE_TIMEOUT: Duration = Duration::from_millis(1500);
/// How often it is checked that a tunnel's key is still the node's: a node may be forgotten, or join anew.
const RECHECK_INTERVAL: Duration = Duration::from_secs(10);
/// Tunnels of one node that take no new streams and are left to those that they have.
const RETIRED: usize = 16;
/// How often it is looked whether the streams of a retired tunnel have ended.
const LOOK: Duration = Duration::from_secs(1);
/// A tunnel that held this long ends the back-off.
const STEADY: Duration = Duration::from_secs(10);

/// Keeps a dial loop for every node of the inventory that is to be dialled.
#[derive(Default)]
pub struct DialLinks {
    loops: HashMap<NodeName, (InventoryNode, Tasks)>,
}

impl DialLinks {
    /// Starts loops for new nodes, ends those of nodes that are gone, restarts those that changed.
    pub fn follow(&mut self, agent: &Arc<Agent>) {
        let inventory = agent.inventory();
        self.loops.retain(|name, (was, tasks)| {
            let stays = inventory.node(name).is_some_and(|node| same_link(node, was));
            if !stays {
                tasks.cancel();
            }
            stays
        });
        for node in inventory.nodes() {
            let Some(address) = &node.dial else { continue };
            if self.loops.contains_key(&node.name) {
                continue;
            }
            let tasks = agent.sessions.child();
            for _ in 0..node.connections {
                tasks.spawn(dial_loop(agent.clone(), node.clone(), address.clone(), tasks.clone()));
            }
            self.loops.insert(node.name.clone(), (node.clone(), tasks));
        }
    }
}

/// Whether a tunnel made for one entry of the inventory is as good for the other.
fn same_link(a: &InventoryNode, b: &InventoryNode) -> bool {
    let link = |n: &InventoryNode| {
        (
            n.dial.clone(),
            n.user.clone(),
            n.trust.clone(),
            n.key_file.clone(),
            n.connections,
            n.front_end_listen,
        )
    };
    link(a) == link(b)
}

async fn dial_loop(agent: Arc<Agent>, node: InventoryNode, address: Target, tasks: Tasks) {
    let tunnels = &agent.config.tunnels;
    let mut backoff = Backoff::new(tunnels.backoff_min, tunnels.backoff_max);
    while !agent.draining.is_cancelled() {
        if !agent.registry.is_connected(&node.name) {
            agent.registry.set_absent(&node.name, Absent::Connecting);
        }
        agent.metrics.tunnel_dials.inc();
        match dial_once(&agent, &node, &address, &tasks).await {
            Ok(first) => {
                let (began, reason) = hold_in_turn(&agent, &node, &address, &tasks, first).await;
                agent
                    .registry
                    .set_absent(&node.name, Absent::Retrying { error: reason, at: SystemTime::now() });
                if began.elapsed() > STEADY {
                    backoff.reset();
                }
            }
            Err(error) => {
                dial_failed(&agent, &node, &address, &error);
                agent.registry.set_absent(
                    &node.name,
                    Absent::Retrying { error: error.to_string(), at: SystemTime::now() },
                );
            }
        }
        tokio::time::sleep(backoff.next_delay(rand::random())).await;
    }
}

type Linked = (Registration, Option<Events>);

/// Keeps a tunnel, and makes the next one before the master's certificate, with which this one was authenticated, comes
/// to its end; the former one is left to its streams. Gives when the last one began, and why it ended.
async fn hold_in_turn(
    agent: &Arc<Agent>,
    node: &InventoryNode,
    address: &Target,
    tasks: &Tasks,
    mut linked: Linked,
) -> (Instant, String) {
    loop {
        let (registration, events) = linked;
        let tunnel = registration.tunnel().clone();
        let mut held = Box::pin(hold(agent.clone(), registration, events));
        let next = next_link(agent, node, address, tasks, &tunnel);
        linked = tokio::select! {
            reason = &mut held => return (tunnel.established, reason),
            next = next => next,
        };
        let told = tunnel.retire("the master has made another link to this node");
        let _ = tokio::time::timeout(PROBE_TIMEOUT, told).await;
        tasks.spawn(held);
    }
}

/// Dials again in time; for ever where the tunnel is good without end.
async fn next_link(
    agent: &Arc<Agent>,
    node: &InventoryNode,
    address: &Target,
    tasks: &Tasks,
    tunnel: &Tunnel,
) -> Linked {
    // A plain sshd looks at certificates in handshakes only.
    let Some(expires) = tunnel.user_expires.filter(|_| tunnel.is_node_agent()) else {
        return std::future::pending().await;
    };
    let left = expires.duration_since(SystemTime::now()).unwrap_or_default();
    tokio::time::sleep(relink::due(left, rand::random())).await;
    let tunnels = &agent.config.tunnels;
    let mut backoff = Backoff::new(tunnels.backoff_min, tunnels.backoff_max);
    loop {
        if agent.draining.is_cancelled() {
            return std::future::pending().await;
        }
        agent.metrics.tunnel_dials.inc();
        match dial_once(agent, node, address, tasks).await {
            Ok(next) => return next,
            Err(error) => dial_failed(agent, node, address, &error),
        }
        tokio::time::sleep(backoff.next_delay(rand::random())).await;
    }
}

fn dial_failed(agent: &Agent, node: &InventoryNode, address: &Target, error: &TunnelError) {
    agent.metrics.tunnel_dials_failed.inc();
    tracing::warn!(node = %node.name, %address, %error, "no tunnel");
    agent.registry.event(&node.name, EventKind::Retrying, &error.to_string());
}

async fn dial_once(
    agent: &Arc<Agent>,
    node: &InventoryNode,
    address: &Target,
    tasks: &Tasks,
) -> Result<Linked, TunnelError> {
    let connect = TcpStream::connect((address.host.to_string(), address.port));
    let socket = match tokio::time::timeout(CONNECT_TIMEOUT, connect).await {
        Ok(Ok(socket)) => socket,
        Ok(Err(e)) => {
            return Err(refused(
                agent,
                "connect",
                TunnelError::Connect(format!("can't connect to {address}: {e}")),
            ));
        }
        Err(_) => {
            let error = TunnelError::Connect(format!("can't connect to {address}: no answer"));
            return Err(refused(agent, "connect", error));
        }
    };
    socket::tune(&socket);
    let peer = socket.peer_addr().ok();
    let verify = trust::dialled(agent, node, address);
    let user = match &node.key_file {
        Some(path) => {
            Arc::new(UserIdentity::load(path.clone()).await.map_err(|e| TunnelError::Connect(e.to_string()))?)
        }
        None => agent.user(),
    };
    let session = shake(agent, socket, verify, (&node.user, &user), tasks, None).await?;
    let HostIdentity::Verified(host) = session.identity.clone() else {
        return Err(TunnelError::Ssh(russh::Error::UnknownKey));
    };
    let (tunnel, events) = session.into_tunnel(host, Direction::Dialled, peer, &agent.config.tunnels).await?;
    register(agent, tunnel).await.map(|registration| (registration, events))
}

/// Accepts nodes that call home until the group of sessions is cancelled.
pub async fn accept(agent: Arc<Agent>, listener: TcpListener) {
    loop {
        let (socket, peer) = match listener.accept().await {
            Ok(accepted) => accepted,
            Err(e) => {
                accept_error(&e).await;
                continue;
            }
        };
        if agent.draining.is_cancelled() {
            continue;
        }
        socket::tune(&socket);
        let place = agent.handshakes.take(peer.ip());
        let agent = agent.clone();
        let tasks = agent.sessions.clone();
        tasks.spawn(async move { answer(&agent, socket, peer, Asked::Anything, place).await });
    }
}

/// What a call home is for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Asked {
    /// What it is shows in the handshake.
    Anything,
    /// Admitted over the front end's port as this node's link.
    Link(NodeName),
    /// Admitted over the front end's port to join, under this name if one was given.
    Join(Option<NodeName>),
}

/// Answers a call home, and keeps its tunnel to its end.
pub async fn answer<T>(agent: &Arc<Agent>, socket: T, peer: SocketAddr, asked: Asked, place: HandshakePermit)
where
    T: AsyncRead + AsyncWrite + Unpin + Send + 'static,
{
    let held = called(agent, socket, peer, asked, &place).await;
    drop(place);
    match held {
        Ok(Some((registration, events))) => {
            let node = registration.tunnel().node.clone();
            let reason = hold(agent.clone(), registration, events).await;
            if !agent.registry.is_connected(&node) {
                agent.registry.set_absent(&node, Absent::Lost { reason, since: SystemTime::now() });
            }
        }
        Ok(None) => {}
        // As many as anybody likes to send; they are counted.
        Err(error @ TunnelError::Evicted) => tracing::debug!(%peer, %error, "refused a call home"),
        Err(error) => tracing::warn!(%peer, %error, "refused a call home"),
    }
}

/// What a node that calls home is: a tunnel, or a host that joins (and calls again).
async fn called<T>(
    agent: &Arc<Agent>,
    socket: T,
    peer: SocketAddr,
    asked: Asked,
    place: &HandshakePermit,
) -> Result<Option<Linked>, TunnelError>
where
    T: AsyncRead + AsyncWrite + Unpin + Send + 'static,
{
    let session = shake(
        agent,
        socket,
        admitted(trust::call_home(agent), &asked),
        (LOGIN, &agent.user()),
        &agent.sessions,
        Some(place),
    )
    .await?;
    let (direction, name) = match asked {
        Asked::Anything => (Direction::CallHome, None),
        Asked::Link(_) => (Direction::CallHomeHttps, None),
        Asked::Join(name) => (Direction::CallHomeHttps, name),
    };
    match session.identity.clone() {
        HostIdentity::Verified(host) => {
            let (tunnel, events) =
                session.into_tunnel(host, direction, Some(peer), &agent.config.tunnels).await?;
            register(agent, tunnel).await.map(|registration| Some((registration, events)))
        }
        HostIdentity::Unknown(key, why) => {
            let join = join::serve(agent, session, &key, &why, name.as_ref(), peer);
            let joined = tokio::select! {
                joined = tokio::time::timeout(agent.config.tunnels.handshake_timeout, join) => joined,
                () = place.evicted.cancelled() => return Err(TunnelError::Evicted),
            };
            match joined {
                Ok(true) => Ok(None),
                Ok(false) | Err(_) => Err(refuse_key(agent, &why)),
            }
        }
    }
}

/// Takes only what the call was admitted as: that node, or a host that is none yet.
fn admitted(verify: Verify, asked: &Asked) -> Verify {
    let asked = asked.clone();
    Box::new(move |presented| {
        let (verified, asked) = (verify(presented), asked.clone());
        Box::pin(async move {
            match (verified.await?, &asked) {
                (HostIdentity::Verified(host), Asked::Link(node)) if host.node != *node => {
                    Err(HostKeyError::OtherNode { admitted: node.clone(), node: host.node })
                }
                (HostIdentity::Verified(host), Asked::Join(_)) => {
                    Err(HostKeyError::NotJoining { node: host.node })
                }
                (HostIdentity::Unknown(_, why), Asked::Link(_)) => Err(why.as_ref().clone()),
                (identity, Asked::Anything | Asked::Link(_) | Asked::Join(_)) => Ok(identity),
            }
        })
    })
}

async fn shake<T>(
    agent: &Arc<Agent>,
    link: T,
    verify: Verify,
    (login, user): (&str, &UserIdentity),
    tasks: &Tasks,
    place: Option<&HandshakePermit>,
) -> Result<Session, TunnelError>
where
    T: AsyncRead + AsyncWrite + Unpin + Send + 'static,
{
    let shaken =
        handshake(link, verify, (login, user), &agent.config.tunnels, tasks, place, &agent.metrics.stalls)
            .await;
    shaken.map_err(|error| match &error {
        TunnelError::HostKey(why) => {
            if let Some(node) = why.node() {
                agent.registry.count_refused(node, why);
            }
            refused(agent, why.kind(), error)
        }
        TunnelError::Unauthorized { .. } => refused(agent, "unauthorized", error),
        TunnelError::Timeout(_) => refused(agent, "timeout", error),
        TunnelError::Evicted => refused(agent, "evicted", error),
        TunnelError::Closed => refused(agent, "closed", error),
        TunnelError::NotSsh(_) | TunnelError::Ssh(_) => refused(agent, "ssh", error),
        TunnelError::Connect(_) | TunnelError::NotRegistered(_) | TunnelError::NotListening(_) => error,
    })
}

fn refuse_key(agent: &Agent, why: &HostKeyError) -> TunnelError {
    if let Some(node) = why.node() {
        agent.registry.count_refused(node, why);
    }
    refused(agent, why.kind(), TunnelError::Connect(why.to_string()))
}

fn refused(agent: &Agent, reason: &'static str, error: TunnelError) -> TunnelError {
    agent.count_refused(reason);
    error
}

/// Takes a tunnel among those of its node, or closes it with the reason why not.
async fn register(agent: &Arc<Agent>, tunnel: Tunnel) -> Result<Registration, TunnelError> {
    let tunnel = Arc::new(tunnel);
    // The node may have joined with another key since this one was looked at.
    let registered = match trust::still_good(agent, &tunnel.host) {
        Ok(()) => agent.registry.register(tunnel.clone()).map_err(TunnelError::from),
        Err(why) => Err(refuse_key(agent, &why)),
    };
    let (registration, others) = match registered {
        Ok(registered) => registered,
        Err(error) => {
            tunnel.close(&error.to_string()).await;
            return Err(error);
        }
    };
    drop(tunnel);
    if let Some(absence) = registration.absence {
        agent.metrics.node_absence_seconds.observe(absence.as_secs_f64());
    }
    let tunnel = registration.tunnel();
    agent.metrics.tunnels_established.inc();
    let kind = if tunnel.is_node_agent() { "node-agent" } else { "sshd" };
    tracing::info!(
        node = %tunnel.node, peer = ?tunnel.peer, direction = ?tunnel.direction, kind, standby = others.len(), "tunnel established"
    );
    // Streams that last longer than the certificates of many links must not keep all of those links.
    let retired: Vec<_> = others.iter().filter(|other| !other.is_usable()).cloned().collect();
    for oldest in retired.into_iter().rev().skip(RETIRED) {
        agent
            .sessions
            .spawn(async move { oldest.close("too many links of the node take no new streams").await });
    }
    // A node that comes again may have lost the old tunnel in a way that nobody told the master.
    for other in others {
        let tunnels = &agent.config.tunnels;
        let dead_after = tunnels
            .keepalive_interval
            .saturating_mul(u32::try_from(tunnels.keepalive_max + 1).unwrap_or(u32::MAX));
        agent.sessions.spawn(probe(other, dead_after));
    }
    Ok(registration)
}

/// Puts a tunnel behind the others while it does not answer, and ends it when it never does.
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

/// Keeps a tunnel until it ends, renewing the node's certificate in time. Gives the reason of the end.
async fn hold(agent: Arc<Agent>, registration: Registration, events: Option<Events>) -> String {
    let agent = &agent;
    let tunnel = registration.tunnel().clone();
    let mut notices = events.map(|events| events.notices);
    let mut recheck = tokio::time::interval(RECHECK_INTERVAL);
    let mut front_end = Box::pin(serve_callers(agent.clone(), tunnel.clone()));
    let mut front_end_served = true;
    let mut certified = tunnel.host.addresses.clone();
    let mut revocations = Box::pin(revocation::serve(agent.clone(), tunnel.clone()));
    let mut revocations_served = true;
    let mut store_changes = agent.store.changes();
    let host_ttl = agent.config.certificates.host_ttl;
    let mut not_before = Instant::now();
    let reason = loop {
        let expires = tunnel.certificate_expires();
        let renewal = (Instant::now() + renewal_due(expires, host_ttl, SystemTime::now())).max(not_before);
        tokio::select! {
            // What a node says last is heard before its end, and hides nothing that is due.
            biased;
            () = &mut front_end, if front_end_served => front_end_served = false,
            () = &mut revocations, if revocations_served => revocations_served = false,
            () = tokio::time::sleep_until(renewal.into()), if tunnel.is_node_agent() && expires.is_some() => {
                renew(agent, &tunnel, &mut certified).await;
                not_before = Instant::now() + renewal_retry(host_ttl);
            }
            () = recheck_due(&mut recheck, &mut store_changes) => {
                if let Err(why) = trust::still_good(agent, &tunnel.host) {
                    tunnel.close(&refuse_key(agent, &why).to_string()).await;
                }
            }
            notice = next(&mut notices) => match notice {
                Some(notice) => heard(&tunnel, &notice),
                None => notices = None,
            },
            reason = tunnel.ended() => break reason,
            () = idle(&tunnel), if tunnel.direction == Direction::Dialled => {
                tunnel.close("another link has taken its place, and its streams have ended").await;
            }
        }
    };
    while let Some(notice) = notices.as_mut().and_then(|notices| notices.try_recv().ok()) {
        heard(&tunnel, &notice);
    }
    // A node that called again says so, and closes the former link when its streams have ended.
    if tunnel.is_retired() || tunnel.is_going_away() && agent.registry.has_newer(&tunnel) {
        tracing::info!(node = %tunnel.node, reason, seconds = tunnel.established.elapsed().as_secs(), "retired tunnel ended");
        return reason;
    }
    agent.metrics.tunnels_lost.get_or_create(&Reason { reason: tunnel.loss().kind() }).inc();
    agent.registry.event(&tunnel.node, EventKind::Lost, &reason);
    tracing::warn!(node = %tunnel.node, reason, seconds = tunnel.established.elapsed().as_secs(), "tunnel ended");
    reason
}

/// What a node says of its whole tunnel.
fn heard(tunnel: &Tunnel, notice: &Notice) {
    match notice {
        Notice::GoAway(reason) => {
            tracing::info!(node = %tunnel.node, reason, "the node takes no new streams");
        }
        Notice::Certificate(_) => {
            tracing::warn!(node = %tunnel.node, "the node sent a certificate; ignored");
        }
    }
}

/// Serves the callers who come through a tunnel, where that is configured.
async fn serve_callers(agent: Arc<Agent>, tunnel: Arc<Tunnel>) {
    let Some(callers) = agent.callers.get() else { return };
    // An inventory is not kept for as long as a tunnel lasts.
    let listen = match tunnel.is_node_agent() {
        true => None,
        false => agent.inventory().node(&tunnel.node).and_then(|node| node.front_end_listen),
    };
    callers.clone().serve(tunnel, listen).await;
}

/// Waits until a tunnel is retired and has no streams.
async fn idle(tunnel: &Tunnel) {
    tunnel.retired().await;
    while !tunnel.is_idle() {
        tokio::time::sleep(LOOK).await;
    }
}

async fn next(notices: &mut Option<tokio::sync::mpsc::Receiver<Notice>>) -> Option<Notice> {
    match notices {
        Some(notices) => notices.recv().await,
        None => std::future::pending().await,
    }
}

/// Completes when the store has changed, and now and then, since what else a key depends on may have changed as well.
async fn recheck_due(interval: &mut Interval, store_changes: &mut watch::Receiver<()>) {
    tokio::select! {
        _ = interval.tick() => {}
        Ok(()) = store_changes.changed() => {}
    }
}

/// Certificates are renewed when a third of their life is left.
fn renewal_due(expires: Option<SystemTime>, ttl: Duration, now: SystemTime) -> Duration {
    let left = expires.and_then(|t| t.duration_since(now).ok()).unwrap_or_default();
    left.saturating_sub(ttl / 3)
}

/// The time between two attempts to renew a certificate.
fn renewal_retry(ttl: Duration) -> Duration {
    (ttl / 100).clamp(Duration::from_secs(1), Duration::from_secs(60))
}

async fn renew(agent: &Arc<Agent>, tunnel: &Tunnel, certified: &mut Vec<IpAddr>) {
    let ttl = agent.config.certificates.host_ttl;
    let now = SystemTime::now();
    let signed = match trust::still_good(agent, &tunnel.host) {
        Ok(()) => join::renew(agent, &tunnel.host, certified.clone(), now, ttl).await,
        Err(why) => Err(why.into()),
    };
    match signed {
        Ok((text, addresses)) if send_certificate(tunnel, &text).await => {
            *certified = addresses;
            agent.metrics.certificates_renewed.inc();
            tunnel.set_certificate_expires(now + ttl);
            tracing::info!(node = %tunnel.node, "host certificate renewed");
        }
        Ok(_) => {}
        Err(error) => tracing::error!(node = %tunnel.node, %error, "can't renew the host certificate"),
    }
}

/// A node whose link is stuck must not keep its tunnel from being watched.
async fn send_certificate(tunnel: &Tunnel, text: &str) -> bool {
    tokio::time::timeout(PROBE_TIMEOUT, tunnel.send_certificate(text)).await.unwrap_or(false)
}
