//! One SSH session, of which this node is the server, whoever dialled the link below it.
//!
//! A session with a master's certificate gets the multiplexer (subsystem `streams-v1`). Any certificate of a
//! trusted user CA gets direct-tcpip channels, as stock `ssh -L`, `-W` and `-J` open them. Every stream passes
//! the node's policy. Shells, commands, sftp, agent and X11 forwarding and remote forwards are refused.
//!
//! A session takes new streams until [`relink::GRACE`] after its certificate's end. Those that run go on, and when the
//! last of them has ended, so does the session. A master makes another link before that and says goodbye on the old one;
//! a session whose master has not is closed after `shutdown_grace`, so that the master comes again. When its certificate
//! is revoked, a session is cut at once.

use std::{
    net::{IpAddr, SocketAddr},
    sync::{
        Arc, Mutex, OnceLock, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
    time::{Duration, Instant, SystemTime},
};

use proto::{
    DialError, Target,
    mux::{FRONT_END_SUBSYSTEM, SUBSYSTEM},
    refusal,
    relink::{self, GRACE},
    revocation::{self, SignedList, krl::Revoked},
};
use proto_net::{
    channel::{Channels, Half},
    expiry,
    handshake::Place,
    link::{Gate, Link},
    mux::{Feeder, Incoming, Mux, Notice},
    relay::{Counters, relay},
    socket, ssh,
    stream::Stream,
    tasks::Tasks,
};
use russh::{
    Channel, ChannelId, ChannelOpenFailure, MethodKind, MethodSet, SshId,
    keys::{Certificate, PublicKey},
    server::{self, Auth, ChannelOpenHandle, Msg},
};
use tokio::{
    io::{AsyncRead, AsyncWrite},
    sync::{OwnedSemaphorePermit, Semaphore, mpsc, oneshot},
};
use tokio_util::sync::CancellationToken;
use tracing::Instrument;

use crate::{
    agent::Agent,
    dialer::Dialled,
    identity::{MASTER, UserRole},
    metrics,
};

/// How long one stream of a stock SSH client may hold up that client's other streams.
const CLIENT_PATIENCE: Duration = Duration::from_secs(30);

/// How long a session may take to send what is left when the agent stops.
const FAREWELL: Duration = Duration::from_secs(10);
/// How long a session whose certificate is revoked may take to be told so. Its streams are cut before.
const REVOKED_FAREWELL: Duration = Duration::from_millis(500);
/// How often it is looked whether the streams of a session that takes no new ones have ended.
const LOOK: Duration = Duration::from_millis(500);
/// Session channels that a master has open at once: one for each subsystem, and one to spare.
const SESSION_CHANNELS: usize = 4;
/// Why a session takes no new streams.
const EXPIRED: &str = "the certificate of this session has expired";
const REPLACED: &str = "another link has taken its place, and its streams have ended";

/// How long a master that is refused may take to read why.
const WORDS: Duration = Duration::from_secs(1);

/// Why a session ended.
#[derive(Debug, thiserror::Error)]
pub enum SessionError {
    #[error("the peer did not authenticate within {}", humantime::format_duration(*.0))]
    HandshakeTimeout(Duration),
    #[error("gave its place to a newer handshake")]
    Evicted,
    #[error("the node has no host key certificate or key to show: {0}")]
    HostKey(String),
    #[error("the master refused the link: {0}")]
    ByMaster(String),
    #[error("refused the certificate of a master: {0}")]
    OfMaster(String),
    #[error(transparent)]
    Ssh(#[from] russh::Error),
    #[error("{0}")]
    Protocol(String),
}

/// A session whose peer has proved who it is.
#[derive(Debug)]
pub struct Authenticated {
    /// How long until its master should have another link to this node.
    pub relink: Option<Duration>,
    /// To be cancelled when there is one: the session takes no new streams, and ends when it has none.
    pub retire: CancellationToken,
}

/// Who a session's peer is.
struct User {
    role: UserRole,
    certificate: Certificate,
}

impl User {
    /// When no new streams are taken any more.
    fn expires(&self) -> Option<SystemTime> {
        self.certificate.valid_before_time()?.checked_add(GRACE)
    }

    fn has_expired(&self) -> bool {
        self.expires().is_some_and(|at| at <= SystemTime::now())
    }

    fn is_master(&self) -> bool {
        matches!(self.role, UserRole::Master)
    }

    fn relink(&self) -> Option<Duration> {
        let end = self.certificate.valid_before_time().filter(|_| self.is_master())?;
        let left = end.duration_since(SystemTime::now()).unwrap_or_default();
        Some(relink::due(left, rand::random()))
    }
}

/// What a session's handler and its owner share.
#[derive(Default)]
struct Shared {
    /// That on which the master opens streams, and that on which this node does.
    muxes: Mutex<[Option<Mux>; 2]>,
    /// The master opens no new streams, or this node has made another link to it.
    replaced: AtomicBool,
}

impl Shared {
    fn muxes(&self) -> Vec<Mux> {
        self.muxes.lock().unwrap_or_else(PoisonError::into_inner).iter().flatten().cloned().collect()
    }

    async fn go_away(&self, reason: &str) {
        for mux in self.muxes() {
            mux.go_away(reason).await;
        }
    }
}

/// Serves one SSH session on an established link, until it ends. `authenticated` is told once the peer has
/// proved who it is; until then it has a `place`, which it may have to give up.
pub async fn serve<T>(
    agent: Arc<Agent>,
    link: T,
    peer: Option<SocketAddr>,
    place: Option<Place>,
    authenticated: oneshot::Sender<Authenticated>,
) -> Result<(), SessionError>
where
    T: AsyncRead + AsyncWrite + Unpin + Send + 'static,
{
    let config = Arc::new(server_config(&agent)?);
    let limit = agent.config.limits.handshake_timeout;
    let cut = CancellationToken::new();
    let _cut_on_exit = cut.clone().drop_guard();
    let received = place.as_ref().map(|place| place.received.clone()).unwrap_or_default();
    let (link, gate) = Link::new(link, cut.clone(), received);
    let tasks = agent.sessions.child();
    let _cancel_on_exit = CancelOnDrop(tasks.clone());
    let (proved, proof) = oneshot::channel();
    let channels =
        Channels::new(gate.clone(), tasks.clone(), CLIENT_PATIENCE, agent.metrics.stalls.down.clone());
    let shared = Arc::<Shared>::default();
    let handler = Session {
        peer: peer.map(|p| p.ip()),
        user: None,
        person: None,
        proved: Some(proved),
        refused: Arc::default(),
        channels: channels.clone(),
        streams: Arc::new(Semaphore::new(agent.config.limits.max_streams)),
        sessions: Vec::new(),
        feeder: None,
        notices: None,
        front_end: None,
        list: None,
        shared: shared.clone(),
        gate,
        tasks: tasks.clone(),
        agent: agent.clone(),
    };

    let refused = handler.refused.clone();
    let handshake = async {
        let session = server::run_stream(config, link, handler).await?;
        let proved = match proof.await {
            Ok(Ok(user)) => Some(user),
            Ok(Err(error)) => {
                if let SessionError::OfMaster(why) = &error {
                    let leave = async {
                        let handle = session.handle();
                        let _ = handle
                            .disconnect(russh::Disconnect::ByApplication, why.clone(), String::new())
                            .await;
                        session.await
                    };
                    let _ = tokio::time::timeout(WORDS, leave).await;
                }
                return Err(error);
            }
            Err(_) => None,
        };
        Ok::<_, SessionError>((session, proved))
    };
    let outcome = tokio::select! {
        r = tokio::time::timeout(limit, handshake) => r.map_err(|_| SessionError::HandshakeTimeout(limit)),
        () = evicted(&place) => Err(SessionError::Evicted),
    };
    drop(place);
    let count = |result| agent.metrics.handshakes.get_or_create(&metrics::Result { result }).inc();
    let (session, user) = match outcome.and_then(|r| r) {
        Ok((session, Some(user))) => {
            count("ok");
            (session, user)
        }
        Ok((session, None)) => {
            count("failed");
            return session.await;
        }
        Err(e) => {
            count("failed");
            return Err(e);
        }
    };
    let retire = CancellationToken::new();
    let _ = authenticated.send(Authenticated { relink: user.relink(), retire: retire.clone() });
    agent.metrics.sessions.inc();
    let handle = session.handle();
    tokio::pin!(session);
    let (reason, limit) = tokio::select! {
        ended = &mut session => {
            agent.metrics.sessions.dec();
            return refused.get().map_or(ended, |reason| Err(SessionError::ByMaster(reason.clone())));
        }
        () = agent.stopping.cancelled() => ("node-agent is stopping", FAREWELL),
        reason = over(&agent, &user, &shared, &channels, &retire) => {
            tracing::info!(key_id = user.certificate.key_id(), reason, "session is over");
            (reason, FAREWELL)
        }
        by = revoked(&agent, &user.certificate) => {
            tasks.cancel();
            let (key_id, serial) = (user.certificate.key_id(), user.certificate.serial());
            tracing::warn!(key_id, serial, %by, ?peer, "cut a session whose certificate is revoked");
            ("the certificate of this session is revoked", REVOKED_FAREWELL)
        }
    };
    // The farewell goes behind all that streams have sent.
    let farewell = async {
        let _ = handle.disconnect(russh::Disconnect::ByApplication, reason.into(), String::new()).await;
        session.await
    };
    let ended = tokio::time::timeout(limit, farewell).await.unwrap_or(Ok(()));
    agent.metrics.sessions.dec();
    ended
}

/// Waits until a certificate is revoked.
async fn revoked(agent: &Agent, certificate: &Certificate) -> Revoked {
    let mut changes = agent.revocations.changes();
    loop {
        changes.mark_unchanged();
        if let Some(by) = agent.revocations.revokes(certificate) {
            return by;
        }
        if changes.changed().await.is_err() {
            return std::future::pending().await;
        }
    }
}

/// Waits until a session takes no new streams, and then until it has none; gives the reason.
async fn over(
    agent: &Agent,
    user: &User,
    shared: &Shared,
    channels: &Channels,
    retire: &CancellationToken,
) -> &'static str {
    let (mut reason, mut limit) = tokio::select! {
        () = expiry::reached(user.expires()) => (EXPIRED, Some(agent.config.shutdown_grace)),
        () = retire.cancelled() => {
            shared.replaced.store(true, Ordering::Relaxed);
            shared.go_away("the node has made another link to this master").await;
            (REPLACED, None)
        }
    };
    if shared.replaced.load(Ordering::Relaxed) {
        (reason, limit) = (REPLACED, None);
    } else if !user.is_master() {
        limit = None;
    }
    let idle = async {
        while channels.len() + shared.muxes().iter().map(Mux::streams_open).sum::<usize>() > 0 {
            tokio::time::sleep(LOOK).await;
        }
    };
    match limit {
        Some(limit) => {
            let _ = tokio::time::timeout(limit, idle).await;
        }
        None => idle.await,
    }
    reason
}

async fn evicted(place: &Option<Place>) {
    match place {
        Some(place) => place.evicted.cancelled().await,
        None => std::future::pending().await,
    }
}

struct CancelOnDrop(Tasks);

impl Drop for CancelOnDrop {
    fn drop(&mut self) {
        self.0.cancel();
    }
}

fn server_config(agent: &Agent) -> Result<server::Config, SessionError> {
    let limits = &agent.config.limits;
    let (key, certificate) = agent.host_key().map_err(SessionError::HostKey)?;
    Ok(server::Config {
        server_id: SshId::Standard(refusal::NODE_AGENT.into()),
        methods: MethodSet::from(&[MethodKind::PublicKey][..]),
        // ssh may offer its bare key before the certificate, and there is nothing to guess.
        auth_rejection_time: Duration::from_millis(20),
        auth_rejection_time_initial: Some(Duration::ZERO),
        keys: vec![key],
        certificates: certificate.into_iter().collect(),
        limits: ssh::node_limits(),
        window_size: ssh::CHANNEL_WINDOW,
        maximum_packet_size: ssh::MAX_PACKET,
        channel_buffer_size: 16,
        event_buffer_size: 32,
        preferred: ssh::preferred(),
        max_auth_attempts: 6,
        // Beyond what keep-alives allow: a peer that has said goodbye and does not leave is asked nothing more.
        inactivity_timeout: Some(
            limits
                .keepalive_interval
                .saturating_mul(u32::try_from(3 * (limits.keepalive_max + 1)).unwrap_or(u32::MAX)),
        ),
        keepalive_interval: Some(limits.keepalive_interval),
        keepalive_max: limits.keepalive_max,
        nodelay: true,
    })
}

struct Session {
    agent: Arc<Agent>,
    peer: Option<IpAddr>,
    user: Option<Arc<User>>,
    /// A person's place among people.
    person: Option<OwnedSemaphorePermit>,
    /// How authentication ended.
    proved: Option<oneshot::Sender<Result<Arc<User>, SessionError>>>,
    /// Why an authenticated master does not want the link.
    refused: Arc<OnceLock<String>>,
    channels: Channels,
    /// One for each stream that is a channel of its own, until its socket is closed.
    streams: Arc<Semaphore>,
    /// Open channels of type session.
    sessions: Vec<ChannelId>,
    feeder: Option<(ChannelId, Feeder)>,
    /// What the master says of the whole tunnel on the multiplexer that `feeder` feeds.
    notices: Option<mpsc::Receiver<Notice>>,
    /// Of the multiplexer on which this node opens streams.
    front_end: Option<(ChannelId, Feeder)>,
    /// The channel on which a list of revoked certificates comes, and what has come; nothing once it is complete.
    list: Option<(ChannelId, Option<Vec<u8>>)>,
    shared: Arc<Shared>,
    gate: Gate,
    tasks: Tasks,
}

impl Session {
    fn is_master(&self) -> bool {
        self.user.as_ref().is_some_and(|user| user.is_master())
    }

    /// Whether the master may have the multiplexer on which this node opens streams.
    fn wants_front_end(&self) -> bool {
        self.is_master() && self.agent.front_ends.is_some() && self.front_end.is_none()
    }

    fn end_proof(&mut self, proof: Result<Arc<User>, SessionError>) {
        if let Some(proved) = self.proved.take() {
            let _ = proved.send(proof);
        }
    }

    /// Takes what the master has said of the whole tunnel: here, as a task could end with the session before it does.
    fn take_notices(&mut self) {
        while let Some(notice) = self.notices.as_mut().and_then(|notices| notices.try_recv().ok()) {
            match notice {
                Notice::Certificate(_) if self.user.as_ref().is_some_and(|user| user.has_expired()) => {
                    tracing::warn!("ignored a host certificate from a master whose own has expired");
                }
                // In the order in which they came: a later one may not have what an earlier one has given up.
                Notice::Certificate(text) => self.agent.renew(&text),
                Notice::GoAway(reason) => {
                    self.shared.replaced.store(true, Ordering::Relaxed);
                    tracing::info!(reason, "the master takes no new streams");
                }
            }
        }
    }

    fn start_mux(&mut self, initiator: bool, channel: ChannelId, session: &server::Session) {
        let Some(user) = self.user.clone() else { return };
        let handle = session.handle();
        let out = move |frame| {
            let handle = handle.clone();
            Box::pin(async move { handle.data(channel, frame).await.is_ok() }) as _
        };
        let max_streams = self.agent.config.limits.max_streams;
        let stalls = &self.agent.metrics.stalls;
        let stalls = if initiator { &stalls.up } else { &stalls.down };
        let (mux, feeder, events) =
            Mux::new(initiator, max_streams, self.gate.clone(), stalls.clone(), Box::new(out), &self.tasks);
        let [of_master, of_node] = &mut *self.shared.muxes.lock().unwrap_or_else(PoisonError::into_inner);
        if initiator {
            *of_node = Some(mux.clone());
            self.front_end = Some((channel, feeder));
            let expired = async move { expiry::reached(user.expires()).await };
            let agent = self.agent.clone();
            self.tasks.spawn(async move {
                if let Some(front_ends) = &agent.front_ends {
                    front_ends.offer(mux, events, expired).await;
                }
            });
        } else {
            *of_master = Some(mux.clone());
            self.feeder = Some((channel, feeder));
            self.notices = Some(events.notices);
            let (agent, shared) = (self.agent.clone(), self.shared.clone());
            self.tasks.spawn(serve_mux(agent, user, shared, mux, events.incoming, self.tasks.clone()));
        }
    }

    /// Takes bytes of a list of revoked certificates.
    fn on_list(
        &mut self,
        channel: ChannelId,
        data: &[u8],
        session: &server::Session,
    ) -> Result<(), SessionError> {
        let unasked = || SessionError::Protocol("a list of revoked certificates came unasked".to_owned());
        let Some((_, came)) = &mut self.list else { return Err(unasked()) };
        let bytes = came.as_mut().ok_or_else(unasked)?;
        bytes.extend_from_slice(data);
        let signed = SignedList::decode(bytes).map_err(|error| SessionError::Protocol(error.to_string()))?;
        let Some(signed) = signed else { return Ok(()) };
        *came = None;
        let (agent, handle) = (self.agent.clone(), session.handle());
        self.tasks.spawn(async move {
            // It is taken to the end, also when it ends the session that it came by.
            let taken = tokio::task::spawn_blocking(move || agent.take_list(signed));
            if let Ok(report) = taken.await {
                let _ = handle.data(channel, report.encode()).await;
            }
        });
        Ok(())
    }
}

impl server::Handler for Session {
    type Error = SessionError;

    async fn auth_none(&mut self, user: &str) -> Result<Auth, SessionError> {
        if let Some(reason) = refusal::from_login(user) {
            self.end_proof(Err(SessionError::ByMaster(reason)));
        }
        Ok(Auth::reject())
    }

    async fn auth_publickey_offered(
        &mut self,
        _user: &str,
        _offer: server::PublicKeyOffer<'_>,
    ) -> Result<Auth, SessionError> {
        Ok(Auth::Accept)
    }

    async fn auth_publickey(
        &mut self,
        user: &str,
        key: server::VerifiedPublicKey<'_>,
    ) -> Result<Auth, SessionError> {
        let fingerprint = PublicKey::fingerprint(key.public_key, Default::default());
        tracing::info!(user = refusal::printable(user), %fingerprint, peer = ?self.peer, "refused a key without certificate");
        Ok(Auth::reject())
    }

    async fn auth_openssh_certificate(
        &mut self,
        user: &str,
        certificate: &Certificate,
    ) -> Result<Auth, SessionError> {
        match self.agent.verify_user(user, certificate, self.peer, SystemTime::now()) {
            Ok(role) => {
                if let UserRole::Person { .. } = role {
                    let Ok(permit) = self.agent.people.clone().try_acquire_owned() else {
                        tracing::warn!(user, peer = ?self.peer, "refused a person: limits.max_sessions reached");
                        return Ok(Auth::reject());
                    };
                    self.person = Some(permit);
                }
                tracing::info!(user, key_id = certificate.key_id(), serial = certificate.serial(), peer = ?self.peer, "authenticated");
                self.user = Some(Arc::new(User { role, certificate: certificate.clone() }));
                Ok(Auth::Accept)
            }
            Err(error) => {
                let [user_name, key_id, why] =
                    [user, certificate.key_id(), &error.to_string()].map(refusal::printable);
                tracing::warn!(user = user_name, key_id, peer = ?self.peer, error = %why, "refused a certificate");
                if user == MASTER {
                    self.end_proof(Err(SessionError::OfMaster(why)));
                }
                Ok(Auth::reject())
            }
        }
    }

    async fn auth_succeeded(&mut self, _session: &mut server::Session) -> Result<(), SessionError> {
        if let Some(user) = self.user.clone() {
            self.end_proof(Ok(user));
        }
        Ok(())
    }

    async fn channel_open_session(
        &mut self,
        channel: Channel<Msg>,
        reply: ChannelOpenHandle,
        _session: &mut server::Session,
    ) -> Result<(), SessionError> {
        if self.is_master() && self.sessions.len() < SESSION_CHANNELS {
            self.sessions.push(channel.id());
            reply.accept().await;
        } else {
            reply
                .reject(refusal("this node serves port forwarding only: no shell, no commands, no sftp"))
                .await;
        }
        Ok(())
    }

    async fn subsystem_request(
        &mut self,
        channel: ChannelId,
        name: &str,
        session: &mut server::Session,
    ) -> Result<(), SessionError> {
        if self.is_master() && name == SUBSYSTEM && self.feeder.is_none() {
            session.channel_success(channel)?;
            self.start_mux(false, channel, session);
        } else if name == FRONT_END_SUBSYSTEM && self.wants_front_end() {
            session.channel_success(channel)?;
            self.start_mux(true, channel, session);
        } else if name == revocation::SUBSYSTEM && self.is_master() && self.list.is_none() {
            session.channel_success(channel)?;
            self.list = Some((channel, Some(Vec::new())));
            session.data(channel, self.agent.held_lists(None).encode())?;
        } else {
            session.channel_failure(channel)?;
        }
        Ok(())
    }

    async fn shell_request(
        &mut self,
        channel: ChannelId,
        session: &mut server::Session,
    ) -> Result<(), SessionError> {
        Ok(session.channel_failure(channel)?)
    }

    async fn exec_request(
        &mut self,
        channel: ChannelId,
        _command: &[u8],
        session: &mut server::Session,
    ) -> Result<(), SessionError> {
        Ok(session.channel_failure(channel)?)
    }

    async fn channel_open_direct_tcpip(
        &mut self,
        channel: Channel<Msg>,
        host: &str,
        port: u32,
        _originator_address: &str,
        _originator_port: u32,
        reply: ChannelOpenHandle,
        _session: &mut server::Session,
    ) -> Result<(), SessionError> {
        let Some(user) = self.user.clone() else { return Ok(()) };
        let login = match &user.role {
            UserRole::Master => "master-agent".to_owned(),
            UserRole::Person { login, .. } => login.clone(),
        };
        if user.has_expired() {
            reply.reject(refusal(EXPIRED)).await;
            return Ok(());
        }
        let target = proto::Host::parse(host).ok().zip(u16::try_from(port).ok().filter(|p| *p > 0));
        let Some((host, port)) = target else {
            reply.reject(refusal("the target is not HOST:PORT")).await;
            return Ok(());
        };
        let Ok(permit) = self.streams.clone().try_acquire_owned() else {
            reply.reject(ChannelOpenFailure::ResourceShortage).await;
            return Ok(());
        };
        self.channels.on_open(channel.id());
        let half = Half::Server(channel.split().1);
        let (agent, channels) = (self.agent.clone(), self.channels.clone());
        let target = Target::new(host, port);
        let origin = format!("ssh {login}");
        self.tasks.spawn(async move {
            let timeout = agent.config.limits.dial_timeout;
            match agent.dial(&target, timeout, &user.role).await {
                Ok(dialled) => {
                    reply.accept().await;
                    run_stream(&agent, dialled, channels.stream(half), &target, &origin).await;
                }
                Err(error) => {
                    channels.forget(half.id());
                    reply.reject(open_failure(&error)).await;
                }
            }
            drop(permit);
        });
        Ok(())
    }

    async fn data(
        &mut self,
        channel: ChannelId,
        data: &[u8],
        session: &mut server::Session,
    ) -> Result<(), SessionError> {
        if self.list.as_ref().is_some_and(|(id, _)| *id == channel) {
            return self.on_list(channel, data, session);
        }
        let mut feeders = self.feeder.iter_mut().chain(&mut self.front_end);
        match feeders.find(|(id, _)| *id == channel) {
            Some((_, feeder)) => {
                let fed = feeder.feed(data).map_err(|e| SessionError::Protocol(e.to_string()));
                self.take_notices();
                fed
            }
            None if self.channels.on_data(channel, data).await => Ok(()),
            None => Ok(session.close(channel)?),
        }
    }

    async fn extended_data(
        &mut self,
        _channel: ChannelId,
        _code: u32,
        data: &[u8],
        _session: &mut server::Session,
    ) -> Result<(), SessionError> {
        if self.is_master() {
            let _ = self.refused.set(refusal::printable(&String::from_utf8_lossy(data)));
        }
        Ok(())
    }

    fn adjust_window(&mut self, _channel: ChannelId, current: u32) -> u32 {
        // The multiplexer drains its channel at once and bounds what is on the way itself.
        if self.feeder.is_some() { ssh::TUNNEL_WINDOW } else { current }
    }

    async fn channel_eof(
        &mut self,
        channel: ChannelId,
        _session: &mut server::Session,
    ) -> Result<(), SessionError> {
        self.channels.on_eof(channel);
        Ok(())
    }

    async fn channel_close(
        &mut self,
        channel: ChannelId,
        _session: &mut server::Session,
    ) -> Result<(), SessionError> {
        self.list.take_if(|(id, _)| *id == channel);
        self.sessions.retain(|id| *id != channel);
        self.channels.on_close(channel);
        self.front_end.take_if(|(id, _)| *id == channel);
        // The streams of another multiplexer in this session would be counted anew.
        match self.feeder.take_if(|(id, _)| *id == channel) {
            Some(_) => Err(SessionError::Protocol("the master closed the multiplexer's channel".to_owned())),
            None => Ok(()),
        }
    }
}

impl Drop for Session {
    fn drop(&mut self) {
        self.channels.close("the SSH session ended");
    }
}

fn refusal(reason: &str) -> ChannelOpenFailure {
    ChannelOpenFailure::Other { code: 1, reason: reason.to_owned() }
}

/// RFC 4254 §5.1 reason codes: 1 administratively prohibited, 2 connect failed, 4 resource shortage.
fn open_failure(error: &DialError) -> ChannelOpenFailure {
    let code = match error {
        DialError::Policy { .. } | DialError::BadTarget(_) => 1,
        DialError::TooManyStreams(_) => 4,
        DialError::Cancelled
        | DialError::NoRoute(_)
        | DialError::NoTunnel { .. }
        | DialError::TunnelLost { .. }
        | DialError::Refused(_)
        | DialError::Resolve(_)
        | DialError::Unreachable(_)
        | DialError::TimedOut(_) => 2,
    };
    ChannelOpenFailure::Other { code, reason: error.to_string() }
}

async fn serve_mux(
    agent: Arc<Agent>,
    user: Arc<User>,
    shared: Arc<Shared>,
    mux: Mux,
    mut incoming: mpsc::Receiver<Incoming>,
    tasks: Tasks,
) {
    let reason = loop {
        tokio::select! {
            asked = incoming.recv() => match asked {
                Some(_) if user.has_expired() => break EXPIRED,
                Some(asked) => { tasks.spawn(serve_incoming(agent.clone(), asked)); }
                None => return,
            },
            () = agent.draining.cancelled() => break "the node-agent is stopping",
            () = expiry::reached(user.expires()) => break EXPIRED,
        }
    };
    if reason == EXPIRED && !shared.replaced.load(Ordering::Relaxed) {
        let (key_id, serial) = (user.certificate.key_id(), user.certificate.serial());
        tracing::warn!(
            key_id,
            serial,
            "a master's certificate has expired; its session takes no new streams"
        );
    }
    mux.go_away(reason).await;
    // What was asked for before the peer could know is refused when `incoming` goes.
}

async fn serve_incoming(agent: Arc<Agent>, incoming: Incoming) {
    let target = incoming.target.clone();
    let origin = incoming.origin.clone();
    let timeout = incoming.timeout.min(agent.config.limits.dial_timeout);
    let dialled = tokio::select! {
        dialled = agent.dial(&target, timeout, &UserRole::Master) => dialled,
        () = incoming.cancelled() => {
            agent.count_dial("cancelled");
            return incoming.refuse(DialError::Cancelled).await;
        }
    };
    match dialled {
        Ok(dialled) => {
            if let Some(stream) = incoming.accept().await {
                run_stream(&agent, dialled, stream, &target, &origin).await;
            }
        }
        Err(error) => incoming.refuse(error).await,
    }
}

/// Relays one stream.
async fn run_stream(agent: &Arc<Agent>, dialled: Dialled, stream: Stream, target: &Target, origin: &str) {
    let span = tracing::info_span!("stream", %target, origin);
    async {
        // Only now, as the caller has been told already that the target is there.
        socket::tune(&dialled.socket);
        let mut record = Record::new(agent.clone(), dialled.rule);
        let (read, write) = dialled.socket.into_split();
        let (down, up) = (&record.counters.down, &record.counters.up);
        let outcome = relay(read, write, stream, down, up, agent.config.half_closed_timeout).await;
        record.outcome = outcome.kind();
    }
    .instrument(span)
    .await;
}

/// A stream's record, left when it ends in whatever way.
struct Record {
    agent: Arc<Agent>,
    rule: String,
    began: Instant,
    counters: Counters,
    outcome: &'static str,
}

impl Record {
    fn new(agent: Arc<Agent>, rule: String) -> Self {
        agent.metrics.streams.inc();
        Self { agent, rule, began: Instant::now(), counters: Counters::default(), outcome: "tunnel_lost" }
    }
}

impl Drop for Record {
    fn drop(&mut self) {
        let metrics = &self.agent.metrics;
        metrics.streams.dec();
        let (up, down) = (*self.counters.up.get_mut(), *self.counters.down.get_mut());
        metrics.bytes.get_or_create(&metrics::Direction { direction: "up" }).inc_by(up);
        metrics.bytes.get_or_create(&metrics::Direction { direction: "down" }).inc_by(down);
        tracing::info!(
            rule = self.rule,
            up,
            down,
            seconds = self.began.elapsed().as_secs_f64(),
            outcome = self.outcome,
            "stream ended"
        );
    }
}
