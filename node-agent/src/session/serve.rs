//! The life of a session, from the link to the farewell.

use std::{net::SocketAddr, sync::Arc, time::Duration};

use prometheus_client::metrics::gauge::Gauge;
use proto::refusal;
use proto_net::{
    channel::Channels, handshake::HandshakePermit, link::Link, log_throttle::LogThrottle, ssh, tasks::Tasks,
};
use russh::{
    MethodKind, MethodSet, SshId,
    server::{self, RunningSession},
};
use tokio::{
    io::{AsyncRead, AsyncWrite},
    sync::{mpsc, oneshot},
    time::Instant,
};
use tokio_util::sync::CancellationToken;

use super::{
    error::SessionError,
    handler::{Handler, Proof, Purpose, WORN_OUT},
    services::SessionServices,
    state::SessionState,
    streams::EXPIRED,
    user::AuthenticatedUser,
};
use crate::{
    identity::trust::Expected,
    metrics::{self, Sessions},
};

/// How long one stream of a stock SSH client may hold up that client's other streams.
const CLIENT_PATIENCE: Duration = Duration::from_secs(30);
/// How long a session that ends may take to send what is left.
const FAREWELL_TIMEOUT: Duration = Duration::from_secs(10);
/// How long a session whose certificate is revoked may take to be told so. Its streams are cut before.
const REVOKED_FAREWELL_TIMEOUT: Duration = Duration::from_millis(500);
/// How long a master that is refused may take to read why.
const REFUSAL_TIMEOUT: Duration = Duration::from_secs(1);
/// How often a session that accepts no new streams checks whether its last one has ended.
const IDLE_CHECK_INTERVAL: Duration = Duration::from_millis(500);

/// The calls for further connections that may wait.
const MAX_CALLS: usize = 4;
const JOINED_ENDED: &str = "the session that this connection belonged to has ended";

const REPLACED: &str = "another link has taken its place, and its streams have ended";

/// Serves sessions on links.
#[derive(Clone)]
pub struct SessionServer {
    services: Arc<SessionServices>,
    tasks: Tasks,
}

/// Who made a link.
#[derive(Debug)]
pub enum Direction {
    /// A master or a person has dialled this node. A newer handshake may take the permit away until the peer has
    /// authenticated.
    Dialled(HandshakePermit),
    /// This node has called a master home, so nobody but a master may answer.
    CallHome,
    /// The same, because the master has asked for a further connection of a session.
    CallHomeFurther,
}

/// A session whose peer has proved who it is.
#[derive(Debug)]
pub struct Authenticated {
    /// How long until its master should have another link to this node.
    pub relink: Option<Duration>,
    /// Cancelled when the master asks for another link.
    pub relink_asked: CancellationToken,
    /// To be cancelled when there is another link: the session takes no new streams, and ends when it has none.
    pub retire: CancellationToken,
    /// Receives the master's calls for further connections, and ends with the session.
    pub calls: Option<mpsc::Receiver<()>>,
}

impl SessionServer {
    /// The tasks of each session go into a child group of `tasks`.
    pub fn new(services: Arc<SessionServices>, tasks: Tasks) -> Self {
        Self { services, tasks }
    }

    /// Bounds the log lines that peers cause before they have authenticated.
    pub fn log_throttle(&self) -> &LogThrottle {
        &self.services.log_throttle
    }

    /// Serves one session on an established link, until it ends. `authenticated` is told once the peer has proved who it
    /// is. A peer that has not done so when the agent drains is cut.
    pub async fn serve<T>(
        self,
        link: T,
        peer: Option<SocketAddr>,
        direction: Direction,
        authenticated: oneshot::Sender<Authenticated>,
    ) -> Result<(), SessionError>
    where
        T: AsyncRead + AsyncWrite + Unpin + Send + 'static,
    {
        let services = &self.services;
        let (permit, expected) = match direction {
            Direction::Dialled(permit) => (Some(permit), (Expected::Anybody, Purpose::Any)),
            Direction::CallHome => (None, (Expected::Master, Purpose::Session)),
            Direction::CallHomeFurther => (None, (Expected::Master, Purpose::Further)),
        };
        let tasks = self.tasks.child();
        let _cancel_on_exit = CancelOnDrop(tasks.clone());
        let cut = CancellationToken::new();
        let _cut_on_exit = cut.clone().drop_guard();
        let received = permit.as_ref().map(|permit| permit.received.clone()).unwrap_or_default();
        let (link, gate) = Link::new(link, cut.clone(), received);
        let stalls = services.metrics.stalls.down.clone();
        let channels = Channels::new(gate.clone(), tasks.clone(), CLIENT_PATIENCE, stalls)
            .closing_first_at_most(services.max_closed_first);
        let (called, calls) = mpsc::channel(MAX_CALLS);
        let state = Arc::new(SessionState::new(channels, called, permit.is_some()));
        let peer_ip = peer.map(|peer| peer.ip());
        let (handler, proof) =
            Handler::new(services.clone(), state.clone(), gate, tasks.clone(), peer_ip, expected);

        let limit = services.limits.handshake_timeout;
        let handshake = authenticate(server_config(services), link, handler, proof);
        let outcome = tokio::select! {
            outcome = tokio::time::timeout(limit, handshake) => {
                outcome.unwrap_or(Err(SessionError::HandshakeTimeout(limit)))
            }
            () = evicted(permit.as_ref()) => Err(SessionError::Evicted),
            () = services.shutdown.draining.cancelled() => Err(SessionError::Stopping),
        };
        drop(permit);
        let result = if matches!(&outcome, Ok(Some(_))) { "ok" } else { "failed" };
        services.metrics.handshakes.get_or_create(&metrics::ResultLabel { result }).inc();
        let Some((session, user)) = outcome? else { return Ok(()) };

        let retire = CancellationToken::new();
        let relink = user.relink_after();
        let _ = authenticated.send(Authenticated {
            relink,
            relink_asked: state.relink.clone(),
            retire: retire.clone(),
            calls: Some(calls),
        });
        tasks.spawn(services.streams.drain.clone().follow_on_channels(state.channels.clone()));
        let _counted = CountedSession::new(&services.metrics.sessions, &user);
        let session = AuthenticatedSession { services: services.clone(), state, user, tasks, peer, session };
        session.run(&retire).await
    }
}

/// Runs the SSH handshake and waits until the peer has authenticated; `None` if it leaves before that.
async fn authenticate<T>(
    config: server::Config,
    link: Link<T>,
    handler: Handler,
    proof: oneshot::Receiver<Proof>,
) -> Result<Option<(RunningSession<Handler>, Arc<AuthenticatedUser>)>, SessionError>
where
    T: AsyncRead + AsyncWrite + Unpin + Send + 'static,
{
    let session = server::run_stream(Arc::new(config), link, handler).await?;
    match proof.await {
        Ok(Ok(user)) => Ok(Some((session, user))),
        Ok(Err(error)) => {
            if let SessionError::MasterCertificate(why) = &error {
                let _ = tokio::time::timeout(REFUSAL_TIMEOUT, say_goodbye(session, why)).await;
            }
            Err(error)
        }
        Err(_) => session.await.map(|()| None),
    }
}

async fn evicted(permit: Option<&HandshakePermit>) {
    match permit {
        Some(permit) => permit.evicted.cancelled().await,
        None => std::future::pending().await,
    }
}

fn server_config(services: &SessionServices) -> server::Config {
    let limits = &services.limits;
    let identity = services.identity.get();
    server::Config {
        server_id: SshId::Standard(refusal::NODE_AGENT.into()),
        methods: MethodSet::from(&[MethodKind::PublicKey][..]),
        // ssh may offer its bare key before the certificate, and there is nothing to guess.
        auth_rejection_time: Duration::from_millis(20),
        auth_rejection_time_initial: Some(Duration::ZERO),
        keys: vec![identity.host_key().clone()],
        certificates: identity.certificate().cloned().into_iter().collect(),
        limits: ssh::node_limits(),
        window_size: ssh::CHANNEL_WINDOW,
        maximum_packet_size: ssh::MAX_PACKET,
        channel_buffer_size: 16,
        event_buffer_size: 32,
        preferred: ssh::preferred(),
        max_auth_attempts: 6,
        // Longer than keep-alives allow: a peer that has said goodbye and does not leave gets no more of them.
        inactivity_timeout: Some(
            limits
                .keepalive_interval
                .saturating_mul(u32::try_from(3 * (limits.keepalive_max + 1)).unwrap_or(u32::MAX)),
        ),
        // A master's own keep-alives come more often (`proto::keep_alive`). So these are for people, and for a master that
        // has fallen silent.
        keepalive_interval: Some(limits.keepalive_interval),
        keepalive_max: limits.keepalive_max,
        nodelay: true,
    }
}

/// A session from authentication to its end.
struct AuthenticatedSession {
    services: Arc<SessionServices>,
    state: Arc<SessionState>,
    user: Arc<AuthenticatedUser>,
    tasks: Tasks,
    peer: Option<SocketAddr>,
    session: RunningSession<Handler>,
}

impl AuthenticatedSession {
    async fn run(mut self, retire: &CancellationToken) -> Result<(), SessionError> {
        let Self { services, state, user, tasks, peer, session } = &mut self;
        let (reason, limit) = tokio::select! {
            ended = session => {
                return state.refusal.get().map_or(ended, |reason| {
                    Err(SessionError::RefusedByMaster(reason.clone()))
                });
            }
            () = services.shutdown.stopping.cancelled() => ("node-agent is stopping", FAREWELL_TIMEOUT),
            reason = retired(services, user, state, retire) => {
                tracing::info!(key_id = user.certificate.key_id(), reason, "session ends");
                (reason, FAREWELL_TIMEOUT)
            }
            by = services.revocations.revoked(&user.certificate) => {
                tasks.cancel();
                let (key_id, serial) = (user.certificate.key_id(), user.certificate.serial());
                tracing::warn!(key_id, serial, %by, peer = peer.map(tracing::field::display), "cut a session whose certificate is revoked");
                ("the certificate of this session is revoked", REVOKED_FAREWELL_TIMEOUT)
            }
        };
        tokio::time::timeout(limit, say_goodbye(self.session, reason)).await.unwrap_or(Ok(()))
    }
}

/// Ends a session. The farewell follows everything that its streams have sent.
async fn say_goodbye(session: RunningSession<Handler>, reason: &str) -> Result<(), SessionError> {
    let handle = session.handle();
    let _ = handle.disconnect(russh::Disconnect::ByApplication, reason.to_owned(), String::new()).await;
    session.await
}

/// Waits until a session is to end, and returns the reason.
async fn retired(
    services: &SessionServices,
    user: &Arc<AuthenticatedUser>,
    state: &SessionState,
    retire: &CancellationToken,
) -> &'static str {
    tokio::select! {
        reason = ended_by_itself(services, user, state, retire) => reason,
        () = state.joined_ended() => JOINED_ENDED,
    }
}

/// Waits until a session takes no new streams, and then until it has none or has had the time to end them. Returns the
/// reason. A further connection never does: it lasts as long as the session that it belongs to.
async fn ended_by_itself(
    services: &SessionServices,
    user: &Arc<AuthenticatedUser>,
    state: &SessionState,
    retire: &CancellationToken,
) -> &'static str {
    let reason = tokio::select! {
        () = user.expired() => EXPIRED,
        () = retire.cancelled() => {
            state.set_replaced();
            state.go_away("the node has made another link to this master").await;
            REPLACED
        }
        () = replaced_with_process(services, user, state) => {
            state.set_replaced();
            state.go_away("another process of the node-agent has taken its place").await;
            REPLACED
        }
        () = state.channels.worn_out() => {
            state.go_away(WORN_OUT).await;
            WORN_OUT
        }
    };
    if state.is_joined() {
        return std::future::pending().await;
    }
    let idle = async {
        while state.streams_open() > 0 {
            tokio::time::sleep(IDLE_CHECK_INTERVAL).await;
        }
        if state.has_further_connections() {
            // What the streams have sent last may still be under way there.
            tokio::time::sleep(IDLE_CHECK_INTERVAL).await;
        }
    };
    tokio::select! {
        () = idle => if state.is_replaced() { REPLACED } else { reason },
        () = overdue(services, user, state, retire) => EXPIRED,
    }
}

/// Waits until another process has taken the place of this one and the peer can have a link to that. A person's client
/// can't, nor can a master of an earlier release that dials this node, so their sessions go on here.
async fn replaced_with_process(services: &SessionServices, user: &AuthenticatedUser, state: &SessionState) {
    services.shutdown.replaced.cancelled().await;
    if !user.is_master() || !state.is_replaceable() {
        std::future::pending::<()>().await;
    }
}

/// Waits until a master has had `shutdown_grace` after the end of its certificate to make another link, and has made
/// none. If this node has made the other link, it knows that, and the process that has taken this one's place has its own
/// links. If the master says that it has, there must be a session.
async fn overdue(
    services: &SessionServices,
    user: &Arc<AuthenticatedUser>,
    state: &SessionState,
    retire: &CancellationToken,
) {
    if !user.is_master() {
        return std::future::pending().await;
    }
    user.expired().await;
    let mut deadline = Instant::now() + services.shutdown_grace;
    loop {
        let has_another = || state.is_replaced() && services.connected_masters.has_another(user);
        let has_another_process = services.shutdown.replaced.is_cancelled();
        if retire.is_cancelled() || has_another_process || has_another() {
            deadline = Instant::now() + services.shutdown_grace;
        } else if Instant::now() >= deadline {
            return;
        }
        tokio::time::sleep(IDLE_CHECK_INTERVAL).await;
    }
}

struct CancelOnDrop(Tasks);

impl Drop for CancelOnDrop {
    fn drop(&mut self) {
        self.0.cancel();
    }
}

/// Counts a session for as long as it lasts.
struct CountedSession(Gauge);

impl CountedSession {
    fn new(sessions: &Sessions, user: &AuthenticatedUser) -> Self {
        let gauge = if user.is_master() { &sessions.masters } else { &sessions.people };
        gauge.inc();
        Self(gauge.clone())
    }
}

impl Drop for CountedSession {
    fn drop(&mut self) {
        self.0.dec();
    }
}
