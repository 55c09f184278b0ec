//! A tunnel: an authenticated SSH session of which the master is the client, over a link that either side
//! dialled.
//!
//! [`establish`] takes a link and gives a [`Tunnel`] only when the node's host key has been verified and the
//! node has accepted the master's certificate. A node-agent offers the multiplexer; anything else is a plain
//! sshd, and each stream an SSH channel of its own.
//!
//! A node opens nothing by itself, with one exception, which the master has to ask for: streams to its front end
//! ([`Tunnel::open_front_end`], [`Tunnel::forward`]).

use std::{
    net::SocketAddr,
    sync::{
        Arc, Mutex, OnceLock, PoisonError,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    time::{Duration, Instant, SystemTime},
};

use bytes::Bytes;
use futures_util::future::BoxFuture;
use proto::{
    DialError, NodeName, Target,
    mux::{FRONT_END_SUBSYSTEM, SUBSYSTEM},
    refusal,
    revocation::{self, Report},
};
use proto_net::{
    channel::{Channels, WriteHalf},
    handshake::{BEGUN, HandshakePermit},
    link::{Gate, Link},
    mux::{Events, Feeder, Mux, ProtocolError},
    ssh, stalls,
    stream::Stream,
    tasks::Tasks,
};
use russh::{
    ChannelId, ChannelMsg, ChannelOpenFailure, SshId,
    client::{self, DisconnectReason, Handle},
    keys::{PrivateKeyWithHashAlg, PublicKey, PublicKeyOrCertificate},
};
use serde::Serialize;
use tokio::{
    io::{AsyncRead, AsyncWrite},
    sync::{OwnedSemaphorePermit, Semaphore, mpsc, watch},
};
use tokio_util::sync::{CancellationToken, DropGuard};

use crate::{
    identity::{HostKeyError, UserIdentity, VerifiedHost},
    tunnels::config::TunnelsConfig,
};

/// How long one stream to a plain sshd may hold up the others on its connection; up to twice as long once it was fast.
const PATIENCE: Duration = Duration::from_millis(250);

/// The least size of packets that a node has to take.
const LEAST_PACKET: u32 = 1024;
/// For a peer to be told why it is refused, or to say why it refuses.
const WORDS: Duration = Duration::from_secs(1);
/// Channels that a plain sshd may open in a window of time. Each costs an answer, and answers wait without bound
/// while keys are exchanged.
const OPENS: u32 = 10_000;
const OPENS_WINDOW: Duration = Duration::from_secs(10);

/// Who dialled the link.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Direction {
    Dialled,
    CallHome,
    /// Over the front end's port.
    CallHomeHttps,
}

/// How a tunnel came to its end.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Loss {
    /// The node left keep-alives unanswered.
    NoAnswer,
    /// The link broke off, or SSH failed on it.
    Link,
    ByNode,
    ByMaster,
    /// The node did what it may not.
    Protocol,
}

impl Loss {
    pub const ALL: [Self; 5] = [Self::NoAnswer, Self::Link, Self::ByNode, Self::ByMaster, Self::Protocol];

    /// A short, fixed word for metric labels.
    pub fn kind(self) -> &'static str {
        match self {
            Self::NoAnswer => "no_answer",
            Self::Link => "link",
            Self::ByNode => "closed_by_node",
            Self::ByMaster => "closed_by_master",
            Self::Protocol => "protocol",
        }
    }
}

/// What verification made of a presented host key.
#[derive(Clone, Debug)]
pub enum HostIdentity {
    Verified(VerifiedHost),
    /// Nobody's yet: good for joining with a token, and for nothing else. The error is why it is no node's.
    Unknown(Box<PublicKey>, Arc<HostKeyError>),
}

/// Decides whose a presented host key is.
pub type Verify =
    Box<dyn Fn(&PublicKeyOrCertificate) -> BoxFuture<'_, Result<HostIdentity, HostKeyError>> + Send + Sync>;

/// Why the registry does not take a tunnel.
#[derive(Debug, thiserror::Error)]
pub enum NotRegistered {
    #[error("node {0} has enough tunnels, active and standing by")]
    Full(NodeName),
    #[error("node {0} is no longer in the inventory")]
    Unknown(NodeName),
}

/// Why there is no tunnel.
#[derive(Debug, thiserror::Error)]
pub enum TunnelError {
    #[error("{0}")]
    HostKey(#[from] HostKeyError),
    #[error(
        "the node refused the master's certificate as SSH user {user:?}{said}: check that it trusts this master's user CA (TrustedUserCAKeys, or `node-agent join`), and the clocks"
    )]
    Unauthorized { user: String, said: String },
    #[error("no SSH handshake within {}", humantime::format_duration(*.0))]
    Timeout(Duration),
    #[error("the connection was closed before the master was authenticated")]
    Closed,
    #[error("gave its place to a newer handshake")]
    Evicted,
    #[error("{0}")]
    Connect(String),
    #[error("{0}")]
    NotRegistered(#[from] NotRegistered),
    #[error("{0}")]
    NotSsh(String),
    #[error(
        "the node's sshd does not listen on {0}: check that the address is the node's and free, and that sshd permits it (PermitListen, AllowTcpForwarding yes, see `master-agent sshd-config`)"
    )]
    NotListening(SocketAddr),
    #[error("SSH: {0}")]
    Ssh(#[from] russh::Error),
}

/// An SSH session in which both sides have authenticated, as the identity says. Dropping it ends it.
pub struct Session {
    pub identity: HostIdentity,
    /// Of the certificate with which the master authenticated.
    expires: Option<SystemTime>,
    pub(crate) handle: Arc<Handle<ClientHandler>>,
    parts: Parts,
    cut: CancellationToken,
    cut_on_drop: DropGuard,
}

/// What a session leaves to its tunnel.
struct Parts {
    shared: Arc<Shared>,
    channels: Channels,
    gate: Gate,
    stalls: stalls::ByDirection,
    tasks: Tasks,
}

/// The multiplexer's end that the session feeds, and its channel.
type Fed = Mutex<Option<(ChannelId, Feeder)>>;

/// What the session's handler and its owner share.
struct Shared {
    feeder: Fed,
    /// Of the multiplexer on which the node opens streams.
    front_end: Fed,
    forward: Mutex<Option<Forward>>,
    /// Whose the presented host key is.
    identity: OnceLock<Result<HostIdentity, HostKeyError>>,
    /// Whether the other side says that it is a node-agent.
    node_agent: AtomicBool,
    reason: OnceLock<(Loss, String)>,
    ended: CancellationToken,
}

pub(crate) struct ClientHandler {
    verify: Verify,
    shared: Arc<Shared>,
    channels: Channels,
    stalls: stalls::ByDirection,
}

/// What a plain sshd was asked to listen on for the front end.
struct Forward {
    host: String,
    port: u32,
    callers: mpsc::Sender<Forwarded>,
    permits: Arc<Semaphore>,
    /// Channels opened since then.
    opens: (Instant, u32),
}

/// A caller at the address that a plain sshd listens on.
pub struct Forwarded {
    pub stream: Stream,
    pub origin: String,
    pub permit: OwnedSemaphorePermit,
}

impl Forward {
    /// Whether a node that opens one more channel now still keeps to a measure.
    fn is_moderate(&mut self, now: Instant) -> bool {
        let (since, count) = &mut self.opens;
        if now.duration_since(*since) > OPENS_WINDOW {
            (*since, *count) = (now, 0);
        }
        *count += 1;
        *count <= OPENS
    }
}

impl HostIdentity {
    pub fn key(&self) -> &PublicKey {
        match self {
            Self::Verified(host) => &host.key,
            Self::Unknown(key, _) => key,
        }
    }
}

impl ClientHandler {
    /// A node opens no channels unless asked to. Refusals would wait without bound while keys are exchanged.
    fn unasked(&self) -> Result<(), russh::Error> {
        Err(self.broken("the node tried to open a channel".to_owned()))
    }

    fn broken(&self, reason: String) -> russh::Error {
        let _ = self.shared.reason.set((Loss::Protocol, reason));
        russh::Error::Inconsistent
    }

    /// A caller's place, if the node was asked to listen there: `Err` ends the session, `None` refuses the channel.
    fn forwarded(
        &self,
        host: &str,
        port: u32,
    ) -> Result<Option<(mpsc::OwnedPermit<Forwarded>, OwnedSemaphorePermit)>, russh::Error> {
        let mut forward = self.shared.forward.lock().unwrap_or_else(PoisonError::into_inner);
        let Some(forward) = forward.as_mut().filter(|f| f.host == host && f.port == port) else {
            self.unasked()?;
            return Ok(None);
        };
        if !forward.is_moderate(Instant::now()) {
            return Err(self.broken("the node opens channels without measure".to_owned()));
        }
        let permit = forward.permits.clone().try_acquire_owned().ok();
        let place = forward.callers.clone().try_reserve_owned().ok();
        Ok(place.zip(permit))
    }
}

/// Gives bytes to a multiplexer if they came on its channel.
fn feed(fed: &Fed, channel: ChannelId, data: &[u8]) -> Option<Result<(), ProtocolError>> {
    match &mut *fed.lock().unwrap_or_else(PoisonError::into_inner) {
        Some((id, feeder)) if *id == channel => Some(feeder.feed(data)),
        Some(_) | None => None,
    }
}

/// Ends a multiplexer if this was its channel.
fn unfeed(fed: &Fed, channel: ChannelId) -> bool {
    fed.lock().unwrap_or_else(PoisonError::into_inner).take_if(|(id, _)| *id == channel).is_some()
}

impl client::Handler for ClientHandler {
    type Error = russh::Error;

    async fn check_server_key(&mut self, presented: &PublicKeyOrCertificate) -> Result<bool, russh::Error> {
        // Also with a key that is refused the key exchange comes to its end, so that the node can be told why;
        // `handshake` goes no further with it.
        Ok(self.shared.identity.set((self.verify)(presented).await).is_ok())
    }

    async fn kex_done(
        &mut self,
        _shared_secret: Option<&[u8]>,
        _names: &russh::Names,
        session: &mut client::Session,
    ) -> Result<(), russh::Error> {
        let is_node_agent = session.remote_sshid().starts_with(refusal::NODE_AGENT.as_bytes());
        self.shared.node_agent.store(is_node_agent, Ordering::Relaxed);
        Ok(())
    }

    async fn channel_open_confirmation(
        &mut self,
        id: ChannelId,
        max_packet_size: u32,
        _window_size: u32,
        _session: &mut client::Session,
    ) -> Result<(), russh::Error> {
        // RFC 4253 §6.1 wants packets of 32 KiB to be taken; with tiny ones, one write would become thousands.
        if max_packet_size < LEAST_PACKET {
            return Err(self.broken(format!("the node takes packets of {max_packet_size} bytes only")));
        }
        self.channels.on_open(id);
        Ok(())
    }

    async fn data(
        &mut self,
        channel: ChannelId,
        data: &[u8],
        session: &mut client::Session,
    ) -> Result<(), russh::Error> {
        let fed = feed(&self.shared.feeder, channel, data);
        match fed.or_else(|| feed(&self.shared.front_end, channel, data)) {
            Some(Ok(())) => Ok(()),
            Some(Err(error)) => Err(self.broken(format!("the node broke the stream protocol: {error}"))),
            None if self.channels.on_data(channel, data).await => Ok(()),
            None => session.close(channel),
        }
    }

    async fn channel_eof(
        &mut self,
        channel: ChannelId,
        _session: &mut client::Session,
    ) -> Result<(), russh::Error> {
        self.channels.on_eof(channel);
        Ok(())
    }

    async fn channel_close(
        &mut self,
        channel: ChannelId,
        _session: &mut client::Session,
    ) -> Result<(), russh::Error> {
        self.channels.on_close(channel);
        unfeed(&self.shared.front_end, channel);
        if unfeed(&self.shared.feeder, channel) { Err(russh::Error::Disconnect) } else { Ok(()) }
    }

    async fn server_channel_open_forwarded_tcpip(
        &mut self,
        channel: russh::Channel<client::Msg>,
        connected_address: &str,
        connected_port: u32,
        originator_address: &str,
        originator_port: u32,
        reply: client::ChannelOpenHandle,
        _session: &mut client::Session,
    ) -> Result<(), russh::Error> {
        let Some((place, permit)) = self.forwarded(connected_address, connected_port)? else {
            reply.reject(ChannelOpenFailure::ResourceShortage).await;
            return Ok(());
        };
        let half = channel.split().1;
        let room = half.writable_packet_size().await;
        if room < LEAST_PACKET as usize {
            return Err(self.broken(format!("the node takes packets of {room} bytes only")));
        }
        self.channels.on_open(half.id());
        reply.accept().await;
        place.send(Forwarded {
            stream: self.channels.counted_in(&self.stalls.down).stream(WriteHalf::Client(half)),
            origin: format!("tcp {originator_address}:{originator_port}"),
            permit,
        });
        Ok(())
    }

    async fn server_channel_open_forwarded_streamlocal(
        &mut self,
        _channel: russh::Channel<client::Msg>,
        _socket_path: &str,
        _reply: client::ChannelOpenHandle,
        _session: &mut client::Session,
    ) -> Result<(), russh::Error> {
        self.unasked()
    }

    async fn server_channel_open_agent_forward(
        &mut self,
        _channel: russh::Channel<client::Msg>,
        _reply: client::ChannelOpenHandle,
        _session: &mut client::Session,
    ) -> Result<(), russh::Error> {
        self.unasked()
    }

    async fn server_channel_open_session(
        &mut self,
        _channel: russh::Channel<client::Msg>,
        _reply: client::ChannelOpenHandle,
        _session: &mut client::Session,
    ) -> Result<(), russh::Error> {
        self.unasked()
    }

    async fn server_channel_open_direct_tcpip(
        &mut self,
        _channel: russh::Channel<client::Msg>,
        _host_to_connect: &str,
        _port_to_connect: u32,
        _originator_address: &str,
        _originator_port: u32,
        _reply: client::ChannelOpenHandle,
        _session: &mut client::Session,
    ) -> Result<(), russh::Error> {
        self.unasked()
    }

    async fn server_channel_open_direct_streamlocal(
        &mut self,
        _channel: russh::Channel<client::Msg>,
        _socket_path: &str,
        _reply: client::ChannelOpenHandle,
        _session: &mut client::Session,
    ) -> Result<(), russh::Error> {
        self.unasked()
    }

    async fn server_channel_open_x11(
        &mut self,
        _channel: russh::Channel<client::Msg>,
        _originator_address: &str,
        _originator_port: u32,
        _reply: client::ChannelOpenHandle,
        _session: &mut client::Session,
    ) -> Result<(), russh::Error> {
        self.unasked()
    }

    async fn disconnected(&mut self, reason: DisconnectReason<russh::Error>) -> Result<(), russh::Error> {
        let _ = self.shared.reason.set(match reason {
            DisconnectReason::ReceivedDisconnect(info) => {
                (Loss::ByNode, format!("closed by the node: {}", refusal::printable(&info.message)))
            }
            DisconnectReason::Error(russh::Error::KeepaliveTimeout) => {
                (Loss::NoAnswer, "the node no longer answers".to_owned())
            }
            DisconnectReason::Error(error) => (Loss::Link, error.to_string()),
        });
        Ok(())
    }
}

impl Drop for ClientHandler {
    fn drop(&mut self) {
        for fed in [&self.shared.feeder, &self.shared.front_end] {
            *fed.lock().unwrap_or_else(PoisonError::into_inner) = None;
        }
        *self.shared.forward.lock().unwrap_or_else(PoisonError::into_inner) = None;
        self.channels.close(self.shared.reason.get().map_or("the tunnel was lost", |(_, reason)| reason));
        self.shared.ended.cancel();
    }
}

fn client_config(config: &TunnelsConfig) -> client::Config {
    client::Config {
        client_id: SshId::Standard("SSH-2.0-master-agent".into()),
        limits: ssh::master_limits(config.rekey_interval),
        window_size: ssh::TUNNEL_WINDOW,
        maximum_packet_size: ssh::MAX_PACKET,
        channel_buffer_size: 16,
        preferred: ssh::preferred(),
        inactivity_timeout: None,
        keepalive_interval: Some(config.keepalive_interval),
        keepalive_max: config.keepalive_max,
        nodelay: true,
        ..client::Config::default()
    }
}

/// Runs the SSH handshake on a link: the node's host key must pass `verify`, the node must accept `user`'s
/// certificate. A handshake that has a `place` may have to give it up to another.
pub async fn handshake<T>(
    link: T,
    verify: Verify,
    (login, user): (&str, &UserIdentity),
    config: &TunnelsConfig,
    tasks: &Tasks,
    place: Option<&HandshakePermit>,
    stalls: &stalls::ByDirection,
) -> Result<Session, TunnelError>
where
    T: AsyncRead + AsyncWrite + Unpin + Send + 'static,
{
    let cut = CancellationToken::new();
    // Whatever makes this fail or be dropped also ends the session that russh runs.
    let cut_on_drop = cut.clone().drop_guard();
    let received = place.map(|place| place.received.clone()).unwrap_or_default();
    let (link, gate) = Link::new(link, cut.clone(), received.clone());
    let tasks = tasks.child();
    let channels = Channels::new(gate.clone(), tasks.clone(), PATIENCE, stalls.up.clone());
    let shared = Arc::new(Shared {
        feeder: Mutex::default(),
        front_end: Mutex::default(),
        forward: Mutex::default(),
        identity: OnceLock::new(),
        node_agent: AtomicBool::new(false),
        reason: OnceLock::new(),
        ended: CancellationToken::new(),
    });
    let handler =
        ClientHandler { verify, shared: shared.clone(), channels: channels.clone(), stalls: stalls.clone() };

    let run = async {
        let connected = client::connect_stream(Arc::new(client_config(config)), link, handler).await;
        let (mut handle, identity) = match (connected, shared.identity.get().cloned()) {
            (Ok(handle), Some(Ok(identity))) => (handle, identity),
            (connected, Some(Err(refused))) => {
                if let Ok(mut handle) = connected {
                    let reason = refused.for_peer();
                    let _ = tokio::time::timeout(WORDS, shared.refuse(&mut handle, &reason)).await;
                }
                return Err(TunnelError::HostKey(refused));
            }
            (Ok(_), None) => return Err(TunnelError::Ssh(russh::Error::UnknownKey)),
            (Err(error), _) => return Err(not_ssh(error)),
        };
        let key = Arc::new(user.key.clone());
        let auth = match &user.certificate {
            Some(certificate) => handle.authenticate_openssh_cert(login, key, certificate.clone()).await?,
            None => {
                let hash = handle.best_supported_rsa_hash().await?.flatten();
                handle.authenticate_publickey(login, PrivateKeyWithHashAlg::new(key, hash)).await?
            }
        };
        if auth.success() {
            return Ok((handle, identity));
        }
        // A node-agent says why, and leaves.
        let closed = handle.is_closed();
        if closed || shared.node_agent.load(Ordering::Relaxed) {
            let _ = tokio::time::timeout(WORDS, shared.ended.cancelled()).await;
        }
        Err(match shared.reason.get() {
            Some((Loss::ByNode, said)) => {
                TunnelError::Unauthorized { user: login.to_owned(), said: format!(" ({said})") }
            }
            // russh tells a session that ended from a refusal in no other way.
            Some(_) | None if closed => TunnelError::Closed,
            Some(_) | None => TunnelError::Unauthorized { user: login.to_owned(), said: String::new() },
        })
    };
    let (handle, identity) = tokio::select! {
        r = tokio::time::timeout(config.handshake_timeout, run) => {
            r.map_err(|_| timed_out(config.handshake_timeout, received.load(Ordering::Relaxed)))??
        }
        () = evicted(place) => return Err(TunnelError::Evicted),
    };
    let parts = Parts { shared, channels, gate, stalls: stalls.clone(), tasks };
    Ok(Session { identity, expires: user.expires(), handle: Arc::new(handle), parts, cut, cut_on_drop })
}

impl Shared {
    /// Tells a node, before this master has authenticated, why there is nothing for it here.
    async fn refuse(&self, handle: &mut Handle<ClientHandler>, reason: &str) {
        if self.node_agent.load(Ordering::Relaxed) {
            let _ = handle.authenticate_none(refusal::to_login(reason)).await;
        }
        let _ = handle.disconnect(russh::Disconnect::ByApplication, reason, "").await;
        self.ended.cancelled().await;
    }
}

fn timed_out(limit: Duration, received: usize) -> TunnelError {
    if received >= BEGUN {
        return TunnelError::Timeout(limit);
    }
    let limit = humantime::format_duration(limit);
    TunnelError::NotSsh(format!("no SSH server answered there within {limit}. {WAYS_OUT}"))
}

async fn evicted(place: Option<&HandshakePermit>) {
    match place {
        Some(place) => place.evicted.cancelled().await,
        None => std::future::pending().await,
    }
}

const WAYS_OUT: &str = "If another service holds this port, let the node call home (`call_home:` in its config), \
     give node-agent another port (`listen:`, and `dial:` in the inventory), or use the sshd that runs there \
     (`master-agent sshd-config`)";

/// What stands on a port that does not speak as expected is worth a word to whoever set it up.
fn not_ssh(error: russh::Error) -> TunnelError {
    if matches!(error, russh::Error::Disconnect | russh::Error::Version | russh::Error::IO(_)) {
        return TunnelError::NotSsh(format!(
            "no SSH server completed a handshake there ({error}). {WAYS_OUT}"
        ));
    }
    TunnelError::Ssh(error)
}

/// What came of bringing a node a list of revoked certificates.
#[derive(Debug, PartialEq, Eq)]
pub enum Brought {
    Taken,
    Held,
    /// It has this version.
    Newer(u64),
    Refused(String),
    /// Its agent knows nothing of such lists.
    Unknown,
}

/// What carries a tunnel's streams.
enum Carrier {
    Mux(Mux),
    Channels(Channels),
}

/// An established tunnel to a node.
pub struct Tunnel {
    pub id: u64,
    pub node: NodeName,
    pub direction: Direction,
    pub peer: Option<SocketAddr>,
    pub established: Instant,
    pub since: SystemTime,
    pub host: VerifiedHost,
    /// When the master's own certificate expires, with which it authenticated.
    pub user_expires: Option<SystemTime>,
    /// Another tunnel has taken its place, and it is left to the streams that it has.
    retired: CancellationToken,
    /// When the node's certificate expires, the one that it was renewed by included.
    expires: Mutex<Option<SystemTime>>,
    carrier: Carrier,
    max_streams: usize,
    /// For the node to answer to what is neither a stream nor a keep-alive.
    timeout: Duration,
    /// Channels that an sshd has not answered for yet.
    opening: Arc<()>,
    suspect: AtomicBool,
    handle: Arc<Handle<ClientHandler>>,
    parts: Parts,
    /// Of the streams that the node opens.
    front_end: OnceLock<Mux>,
    cut: CancellationToken,
}

static NEXT_ID: AtomicU64 = AtomicU64::new(1);

impl Session {
    /// Makes a tunnel of the session: with the multiplexer where the node offers it. The events are the
    /// multiplexer's.
    pub async fn into_tunnel(
        self,
        host: VerifiedHost,
        direction: Direction,
        peer: Option<SocketAddr>,
        config: &TunnelsConfig,
    ) -> Result<(Tunnel, Option<Events>), TunnelError> {
        let start = self.parts.start_mux(&self.handle, true, config.max_streams_per_tunnel);
        let started = tokio::time::timeout(config.handshake_timeout, start)
            .await
            .map_err(|_| TunnelError::Timeout(config.handshake_timeout))??;
        let (carrier, events) = match started {
            Some((mux, events)) => (Carrier::Mux(mux), Some(events)),
            None => (Carrier::Channels(self.parts.channels.clone()), None),
        };
        self.cut_on_drop.disarm();
        let tunnel = Tunnel {
            id: NEXT_ID.fetch_add(1, Ordering::Relaxed),
            node: host.node.clone(),
            direction,
            peer,
            established: Instant::now(),
            since: SystemTime::now(),
            user_expires: self.expires,
            retired: CancellationToken::new(),
            expires: Mutex::new(host.not_after),
            host,
            carrier,
            max_streams: config.max_streams_per_tunnel,
            timeout: config.handshake_timeout,
            opening: Arc::default(),
            suspect: AtomicBool::new(false),
            handle: self.handle,
            parts: self.parts,
            front_end: OnceLock::new(),
            cut: self.cut,
        };
        Ok((tunnel, events))
    }

    /// Whether the other side says that it is a node-agent.
    pub fn is_with_node_agent(&self) -> bool {
        self.parts.shared.node_agent.load(Ordering::Relaxed)
    }

    /// Ends a session that does not become a tunnel.
    pub async fn close(self, reason: &str) {
        let _ = self.handle.disconnect(russh::Disconnect::ByApplication, reason, "").await;
        // The farewell gets a moment to leave.
        let _ = tokio::time::timeout(Duration::from_millis(500), self.parts.shared.ended.cancelled()).await;
        self.cut.cancel();
        self.parts.tasks.cancel();
    }
}

impl Parts {
    /// Asks for a multiplexer: one on which the master opens streams, or else the node. `None` where the node has
    /// none.
    async fn start_mux(
        &self,
        handle: &Arc<Handle<ClientHandler>>,
        initiator: bool,
        max_streams: usize,
    ) -> Result<Option<(Mux, Events)>, TunnelError> {
        let (subsystem, fed) = match initiator {
            true => (SUBSYSTEM, &self.shared.feeder),
            false => (FRONT_END_SUBSYSTEM, &self.shared.front_end),
        };
        let mut channel = match handle.channel_open_session().await {
            Ok(channel) => channel,
            // An sshd set up for forwarding only.
            Err(russh::Error::ChannelOpenFailure(_)) => return Ok(None),
            Err(e) => return Err(e.into()),
        };
        let id = channel.id();
        // Nothing is sent before the node has agreed: a plain sshd's window stays closed until then, and while one
        // channel waits for its window russh sends nothing at all, not even that channel's close.
        let (agreed, agreement) = watch::channel(false);
        let to = handle.clone();
        let out = move |frame| {
            let handle = to.clone();
            let waiting = (!*agreement.borrow()).then(|| agreement.clone());
            Box::pin(async move {
                if let Some(mut agreement) = waiting
                    && agreement.wait_for(|agreed| *agreed).await.is_err()
                {
                    return false;
                }
                handle.data(id, frame).await.is_ok()
            }) as _
        };
        // What the master sends to a node's own callers comes down.
        let stalls = if initiator { &self.stalls.up } else { &self.stalls.down };
        let (mux, feeder, events) =
            Mux::new(initiator, max_streams, self.gate.clone(), stalls.clone(), Box::new(out), &self.tasks);
        self.channels.forget(id);
        *fed.lock().unwrap_or_else(PoisonError::into_inner) = Some((id, feeder));
        channel.request_subsystem(true, subsystem).await?;
        loop {
            match channel.wait().await {
                Some(ChannelMsg::Success) => {
                    agreed.send_replace(true);
                    return Ok(Some((mux, events)));
                }
                Some(ChannelMsg::Failure | ChannelMsg::Close | ChannelMsg::Eof) | None => {
                    *fed.lock().unwrap_or_else(PoisonError::into_inner) = None;
                    let _ = channel.close().await;
                    return Ok(None);
                }
                Some(_) => {}
            }
        }
    }
}

impl Tunnel {
    /// Lets a node-agent open streams to the front end, so many at once; `None` where it has no use for that.
    pub async fn open_front_end(&self, max_streams: usize) -> Result<Option<Events>, TunnelError> {
        let start = self.parts.start_mux(&self.handle, false, max_streams);
        let started = tokio::time::timeout(self.timeout, start).await;
        let Some((mux, events)) = started.map_err(|_| TunnelError::Timeout(self.timeout))?? else {
            return Ok(None);
        };
        let _ = self.front_end.set(mux);
        Ok(Some(events))
    }

    /// Asks a plain sshd to listen on an address; gives the callers that come there, so many at once.
    pub async fn forward(
        &self,
        address: SocketAddr,
        most: usize,
    ) -> Result<mpsc::Receiver<Forwarded>, TunnelError> {
        let (host, port) = (address.ip().to_string(), u32::from(address.port()));
        let (callers, came) = mpsc::channel(most.max(1));
        let permits = Arc::new(Semaphore::new(most));
        let forward = Forward { host: host.clone(), port, callers, permits, opens: (Instant::now(), 0) };
        // Callers may come as soon as it listens.
        *self.parts.shared.forward.lock().unwrap_or_else(PoisonError::into_inner) = Some(forward);
        let asked = tokio::time::timeout(self.timeout, self.handle.tcpip_forward(host, port)).await;
        let answer = asked.map_err(|_| TunnelError::Timeout(self.timeout));
        if !matches!(answer, Ok(Ok(_))) {
            *self.parts.shared.forward.lock().unwrap_or_else(PoisonError::into_inner) = None;
        }
        match answer? {
            Ok(_) => Ok(came),
            Err(russh::Error::RequestDenied) => Err(TunnelError::NotListening(address)),
            Err(error) => Err(error.into()),
        }
    }

    /// Opens a stream to `target` within `timeout`. Dropping the future cancels the dial.
    pub async fn open(&self, target: &Target, origin: &str, timeout: Duration) -> Result<Stream, DialError> {
        let result = match &self.carrier {
            Carrier::Mux(mux) => mux.open(target, origin, timeout).await,
            Carrier::Channels(channels) => self.open_channel(channels, target, timeout).await,
        };
        result.map_err(|error| self.with_node(error))
    }

    async fn open_channel(
        &self,
        channels: &Channels,
        target: &Target,
        timeout: Duration,
    ) -> Result<Stream, DialError> {
        // SSH has no way to take an open back, so one that nobody waits for any more still counts.
        let opening = self.opening.clone();
        if channels.len() + Arc::strong_count(&opening) > self.max_streams + 1 {
            let error =
                format!("the tunnel carries {} streams already (max_streams_per_tunnel)", self.max_streams);
            return Err(DialError::TooManyStreams(error));
        }
        let (handle, channels, asked) = (self.handle.clone(), channels.clone(), target.clone());
        let (answer, answered) = tokio::sync::oneshot::channel();
        self.parts.tasks.spawn(async move {
            let (host, port) = (asked.host.to_string(), u32::from(asked.port));
            let opened = handle.channel_open_direct_tcpip(host, port, "127.0.0.1", 0).await;
            drop(opening);
            let _ = answer.send(opened.map(|channel| channels.stream(WriteHalf::Client(channel.split().1))));
        });
        match tokio::time::timeout(timeout, answered).await {
            Ok(Ok(Ok(stream))) => Ok(stream),
            Ok(Ok(Err(russh::Error::ChannelOpenFailure(failure)))) => Err(sshd_error(target, &failure)),
            Ok(Ok(Err(_)) | Err(_)) => {
                Err(DialError::TunnelLost { node: String::new(), reason: self.ended_reason() })
            }
            Err(_) => Err(DialError::TimedOut(format!(
                "dial tcp {target}: the node's sshd gave no answer within {}",
                humantime::format_duration(timeout)
            ))),
        }
    }

    fn with_node(&self, error: DialError) -> DialError {
        match error {
            DialError::TunnelLost { node, reason } if node.is_empty() => {
                DialError::TunnelLost { node: self.node.to_string(), reason }
            }
            other @ (DialError::BadTarget(_)
            | DialError::TooManyStreams(_)
            | DialError::Cancelled
            | DialError::NoRoute(_)
            | DialError::NoTunnel { .. }
            | DialError::TunnelLost { .. }
            | DialError::Policy { .. }
            | DialError::Refused(_)
            | DialError::Resolve(_)
            | DialError::Unreachable(_)
            | DialError::TimedOut(_)) => other,
        }
    }

    /// Whether the node resolves names and reports causes itself.
    pub fn is_node_agent(&self) -> bool {
        matches!(self.carrier, Carrier::Mux(_))
    }

    pub fn streams(&self) -> usize {
        match &self.carrier {
            Carrier::Mux(mux) => mux.streams_open(),
            Carrier::Channels(channels) => channels.len(),
        }
    }

    pub fn round_trip(&self) -> Option<Duration> {
        match &self.carrier {
            Carrier::Mux(mux) => mux.round_trip(),
            Carrier::Channels(_) => None,
        }
    }

    /// Whether new streams can be asked for.
    pub fn is_usable(&self) -> bool {
        !self.is_going_away() && !self.has_ended()
    }

    /// Whether either side has said that it takes no new streams.
    pub fn is_going_away(&self) -> bool {
        match &self.carrier {
            Carrier::Mux(mux) => mux.is_going_away(),
            Carrier::Channels(_) => false,
        }
    }

    pub fn certificate_expires(&self) -> Option<SystemTime> {
        *self.expires.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub fn set_certificate_expires(&self, at: SystemTime) {
        *self.expires.lock().unwrap_or_else(PoisonError::into_inner) = Some(at);
    }

    /// Whether the node left the last question unanswered, which may only mean that the link is busy.
    pub fn is_suspect(&self) -> bool {
        self.suspect.load(Ordering::Relaxed)
    }

    pub fn set_suspect(&self, suspect: bool) {
        self.suspect.store(suspect, Ordering::Relaxed);
    }

    pub fn has_ended(&self) -> bool {
        self.parts.shared.ended.is_cancelled()
    }

    /// Waits for the end, and gives its reason.
    pub async fn ended(&self) -> String {
        self.parts.shared.ended.cancelled().await;
        self.ended_reason()
    }

    fn ended_reason(&self) -> String {
        self.parts.shared.reason.get().map_or_else(|| "the SSH session ended".to_owned(), |(_, r)| r.clone())
    }

    /// Why it has ended, in one word.
    pub fn loss(&self) -> Loss {
        self.parts.shared.reason.get().map_or(Loss::Link, |(loss, _)| *loss)
    }

    /// Whether the node answers within `timeout`.
    pub async fn answers(&self, timeout: Duration) -> bool {
        tokio::time::timeout(timeout, self.handle.send_ping()).await.is_ok_and(|r| r.is_ok())
    }

    /// Sends a renewed host certificate; only a node-agent can take it.
    pub async fn send_certificate(&self, text: &str) -> bool {
        match &self.carrier {
            Carrier::Mux(mux) => mux.send_certificate(text).await,
            Carrier::Channels(_) => false,
        }
    }

    /// Brings a node-agent the list of revoked certificates of the user CA with the fingerprint `ca`, unless it has that
    /// version or a newer one.
    pub async fn bring_revocations(
        &self,
        ca: &str,
        version: u64,
        signed: Bytes,
    ) -> Result<Brought, TunnelError> {
        let late = |_| TunnelError::Timeout(self.timeout);
        let opened = tokio::time::timeout(self.timeout, self.handle.channel_open_session()).await;
        let mut channel = match opened.map_err(late)? {
            Ok(channel) => channel,
            Err(russh::Error::ChannelOpenFailure(_)) => return Ok(Brought::Unknown),
            Err(e) => return Err(e.into()),
        };
        self.parts.channels.forget(channel.id());
        let exchange = exchange_revocations(&mut channel, ca, version, signed);
        let brought = tokio::time::timeout(self.timeout, exchange).await.map_err(late);
        // The node's side keeps memory of channels that it closes first.
        channel.close().await?;
        brought?
    }

    /// Leaves the tunnel to the streams that it has.
    pub async fn retire(&self, reason: &str) {
        self.retired.cancel();
        self.go_away(reason).await;
    }

    pub fn is_retired(&self) -> bool {
        self.retired.is_cancelled()
    }

    /// Waits until the tunnel is retired.
    pub async fn retired(&self) {
        self.retired.cancelled().await;
    }

    /// Whether no stream of either direction is left.
    pub fn is_idle(&self) -> bool {
        self.streams() + self.front_end.get().map_or(0, Mux::streams_open) == 0
    }

    /// Tells the node that no new streams will come.
    pub async fn go_away(&self, reason: &str) {
        if let Carrier::Mux(mux) = &self.carrier {
            mux.go_away(reason).await;
        }
        if let Some(mux) = self.front_end.get() {
            mux.go_away(reason).await;
        }
    }

    /// Ends the tunnel; its streams are reset.
    pub async fn close(&self, reason: &str) {
        let _ = self.parts.shared.reason.set((Loss::ByMaster, reason.to_owned()));
        let bye = async {
            if let Carrier::Mux(mux) = &self.carrier
                && !mux.is_going_away()
            {
                mux.go_away(reason).await;
            }
            self.handle.disconnect(russh::Disconnect::ByApplication, reason, "").await
        };
        let _ = tokio::time::timeout(Duration::from_millis(500), bye).await;
        let _ = tokio::time::timeout(Duration::from_millis(500), self.parts.shared.ended.cancelled()).await;
        self.cut.cancel();
        self.parts.tasks.cancel();
    }
}

impl Drop for Tunnel {
    fn drop(&mut self) {
        self.cut.cancel();
        self.parts.tasks.cancel();
    }
}

async fn exchange_revocations(
    channel: &mut russh::Channel<client::Msg>,
    ca: &str,
    version: u64,
    signed: Bytes,
) -> Result<Brought, TunnelError> {
    channel.request_subsystem(true, revocation::SUBSYSTEM).await?;
    let mut signed = Some(signed);
    let mut came = Vec::new();
    let brought = loop {
        match channel.wait().await {
            Some(ChannelMsg::Data { data }) => came.extend_from_slice(&data),
            Some(ChannelMsg::Failure | ChannelMsg::Close | ChannelMsg::Eof) => break Brought::Unknown,
            None => return Err(TunnelError::Closed),
            Some(_) => continue,
        }
        let decoded = Report::decode(&came);
        let Some((report, used)) = decoded.map_err(|e| TunnelError::Connect(e.to_string()))? else {
            continue;
        };
        came.drain(..used);
        let held = report.held.get(ca).copied();
        match (report.refused, held) {
            (Some(error), _) => break Brought::Refused(refusal::printable(&error)),
            (None, Some(held)) if held > version => break Brought::Newer(held),
            (None, Some(held)) if held == version => {
                break if signed.is_some() { Brought::Held } else { Brought::Taken };
            }
            (None, _) => match signed.take() {
                Some(signed) => channel.data_bytes(signed).await?,
                None => break Brought::Refused("it does not have it now".to_owned()),
            },
        }
    };
    Ok(brought)
}

fn sshd_error(target: &Target, failure: &ChannelOpenFailure) -> DialError {
    match failure {
        ChannelOpenFailure::AdministrativelyProhibited => DialError::Policy {
            rule: "sshd".to_owned(),
            reason: format!("the node's sshd forbids {target} (PermitOpen, AllowTcpForwarding)"),
        },
        ChannelOpenFailure::ConnectFailed => {
            DialError::Refused(format!("dial tcp {target}: refused or unreachable, says the node's sshd"))
        }
        ChannelOpenFailure::ResourceShortage => {
            DialError::TooManyStreams("the node's sshd is short of resources".to_owned())
        }
        ChannelOpenFailure::UnknownChannelType => DialError::Policy {
            rule: "sshd".to_owned(),
            reason: "the node's sshd does not forward TCP connections".to_owned(),
        },
        ChannelOpenFailure::Other { reason, .. } => {
            DialError::Refused(format!("dial tcp {target}: {reason}"))
        }
    }
}
