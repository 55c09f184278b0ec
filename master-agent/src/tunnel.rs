//! A tunnel: an authenticated SSH session of which the master is the client, over a link that either side
//! dialled.
//!
//! [`establish`] takes a link and gives a [`Tunnel`] only when the node's host key has been verified and the
//! node has accepted the master's certificate. A node-agent offers the multiplexer; anything else is a plain
//! sshd, and each stream an SSH channel of its own.

use std::{
    net::SocketAddr,
    sync::{
        Arc, Mutex, OnceLock, PoisonError,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    time::{Duration, Instant, SystemTime},
};

use proto::{
    DialError, NodeName, Target,
    io::{
        channel::{Channels, Half},
        handshake::{BEGUN, Place},
        link::{Gate, Link},
        mux::{Events, Feeder, Mux},
        ssh,
        stream::Stream,
        tasks::Tasks,
    },
    mux::SUBSYSTEM,
};
use russh::{
    ChannelId, ChannelMsg, ChannelOpenFailure, SshId,
    client::{self, DisconnectReason, Handle},
    keys::{PrivateKeyWithHashAlg, PublicKey, PublicKeyOrCertificate},
};
use serde::Serialize;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio_util::sync::{CancellationToken, DropGuard};

use crate::{
    config::TunnelsConfig,
    identity::{HostKeyError, UserIdentity, VerifiedHost},
};

/// How long one stream to a plain sshd may hold up the others on its connection.
const PATIENCE: Duration = Duration::from_millis(250);

/// The least size of packets that a node has to take.
const LEAST_PACKET: u32 = 1024;
/// The most characters kept of what a node says when it closes a session.
const FAREWELL: usize = 200;

/// Who dialled the link.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Direction {
    Dialled,
    CallHome,
}

/// What verification made of a presented host key.
#[derive(Clone, Debug)]
pub enum HostIdentity {
    Verified(VerifiedHost),
    /// Nobody's yet: good for joining with a token, and for nothing else. The error is why it is no node's.
    Unknown(Box<PublicKey>, Arc<HostKeyError>),
}

/// Decides whose a presented host key is.
pub type Verify = Box<dyn Fn(&PublicKeyOrCertificate) -> Result<HostIdentity, HostKeyError> + Send + Sync>;

/// Why there is no tunnel.
#[derive(Debug, thiserror::Error)]
pub enum TunnelError {
    #[error("{0}")]
    HostKey(#[from] HostKeyError),
    #[error(
        "the node refused the master's certificate as SSH user {user:?}: check that it trusts this master's user CA (TrustedUserCAKeys, or `node-agent join`), and the clocks"
    )]
    Unauthorized { user: String },
    #[error("no SSH handshake within {}", humantime::format_duration(*.0))]
    Timeout(Duration),
    #[error("the connection was closed before the master was authenticated")]
    Closed,
    #[error("gave its place to a newer handshake")]
    Evicted,
    #[error("{0}")]
    Connect(String),
    #[error("{0}")]
    NotRegistered(#[from] crate::registry::NotRegistered),
    #[error("{0}")]
    NotSsh(String),
    #[error("SSH: {0}")]
    Ssh(#[from] russh::Error),
}

/// An SSH session in which both sides have authenticated, as the identity says. Dropping it ends it.
pub struct Session {
    pub identity: HostIdentity,
    pub(crate) handle: Arc<Handle<ClientHandler>>,
    shared: Arc<Shared>,
    channels: Channels,
    gate: Gate,
    tasks: Tasks,
    cut: CancellationToken,
    cut_on_drop: DropGuard,
}

/// What the session's handler and its owner share.
struct Shared {
    feeder: Mutex<Option<(ChannelId, Feeder)>>,
    identity: OnceLock<HostIdentity>,
    refused: Mutex<Option<HostKeyError>>,
    reason: OnceLock<String>,
    ended: CancellationToken,
}

pub(crate) struct ClientHandler {
    verify: Verify,
    shared: Arc<Shared>,
    channels: Channels,
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
    /// A node never opens channels. Refusals would wait without bound while keys are exchanged.
    fn unasked(&self) -> Result<(), russh::Error> {
        let _ = self.shared.reason.set("the node tried to open a channel".to_owned());
        Err(russh::Error::Inconsistent)
    }
}

impl client::Handler for ClientHandler {
    type Error = russh::Error;

    async fn check_server_key(&mut self, presented: &PublicKeyOrCertificate) -> Result<bool, russh::Error> {
        match (self.verify)(presented) {
            Ok(identity) => Ok(self.shared.identity.set(identity).is_ok()),
            Err(error) => {
                *self.shared.refused.lock().unwrap_or_else(PoisonError::into_inner) = Some(error);
                Ok(false)
            }
        }
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
            let _ = self.shared.reason.set(format!("the node takes packets of {max_packet_size} bytes only"));
            return Err(russh::Error::Inconsistent);
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
        let fed = match &mut *self.shared.feeder.lock().unwrap_or_else(PoisonError::into_inner) {
            Some((id, feeder)) if *id == channel => Some(feeder.feed(data)),
            Some(_) | None => None,
        };
        match fed {
            Some(Ok(())) => Ok(()),
            Some(Err(error)) => {
                let _ = self.shared.reason.set(format!("the node broke the stream protocol: {error}"));
                Err(russh::Error::Inconsistent)
            }
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
        let mut feeder = self.shared.feeder.lock().unwrap_or_else(PoisonError::into_inner);
        if feeder.as_ref().is_some_and(|(id, _)| *id == channel) {
            *feeder = None;
            return Err(russh::Error::Disconnect);
        }
        Ok(())
    }

    async fn server_channel_open_forwarded_tcpip(
        &mut self,
        _channel: russh::Channel<client::Msg>,
        _connected_address: &str,
        _connected_port: u32,
        _originator_address: &str,
        _originator_port: u32,
        _reply: client::ChannelOpenHandle,
        _session: &mut client::Session,
    ) -> Result<(), russh::Error> {
        self.unasked()
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
                let printable = |c: char| if c.is_control() { ' ' } else { c };
                let message: String = info.message.chars().take(FAREWELL).map(printable).collect();
                format!("closed by the node: {message}")
            }
            DisconnectReason::Error(russh::Error::KeepaliveTimeout) => {
                "the node no longer answers".to_owned()
            }
            DisconnectReason::Error(error) => error.to_string(),
        });
        Ok(())
    }
}

impl Drop for ClientHandler {
    fn drop(&mut self) {
        *self.shared.feeder.lock().unwrap_or_else(PoisonError::into_inner) = None;
        self.channels.close(self.shared.reason.get().map_or("the tunnel was lost", String::as_str));
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
    login: &str,
    user: &UserIdentity,
    config: &TunnelsConfig,
    tasks: &Tasks,
    place: Option<&Place>,
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
    let channels = Channels::new(gate.clone(), tasks.clone(), PATIENCE);
    let shared = Arc::new(Shared {
        feeder: Mutex::default(),
        identity: OnceLock::new(),
        refused: Mutex::default(),
        reason: OnceLock::new(),
        ended: CancellationToken::new(),
    });
    let handler = ClientHandler { verify, shared: shared.clone(), channels: channels.clone() };
    let refused = || shared.refused.lock().unwrap_or_else(PoisonError::into_inner).take();

    let run = async {
        let mut handle = match client::connect_stream(Arc::new(client_config(config)), link, handler).await {
            Ok(handle) => handle,
            Err(error) => {
                return Err(match refused() {
                    Some(refused) => TunnelError::HostKey(refused),
                    None => not_ssh(error),
                });
            }
        };
        let key = Arc::new(user.key.clone());
        let auth = match &user.certificate {
            Some(certificate) => handle.authenticate_openssh_cert(login, key, certificate.clone()).await?,
            None => {
                let hash = handle.best_supported_rsa_hash().await?.flatten();
                handle.authenticate_publickey(login, PrivateKeyWithHashAlg::new(key, hash)).await?
            }
        };
        match auth.success() {
            true => Ok(handle),
            // russh tells a session that ended from a refusal in no other way.
            false if handle.is_closed() => Err(TunnelError::Closed),
            false => Err(TunnelError::Unauthorized { user: login.to_owned() }),
        }
    };
    let handle = tokio::select! {
        r = tokio::time::timeout(config.handshake_timeout, run) => {
            r.map_err(|_| timed_out(config.handshake_timeout, received.load(Ordering::Relaxed)))??
        }
        () = evicted(place) => return Err(TunnelError::Evicted),
    };
    let Some(identity) = shared.identity.get().cloned() else {
        return Err(TunnelError::Ssh(russh::Error::UnknownKey));
    };
    Ok(Session { identity, handle: Arc::new(handle), shared, channels, gate, tasks, cut, cut_on_drop })
}

fn timed_out(limit: Duration, received: usize) -> TunnelError {
    if received >= BEGUN {
        return TunnelError::Timeout(limit);
    }
    let limit = humantime::format_duration(limit);
    TunnelError::NotSsh(format!("no SSH server answered there within {limit}. {WAYS_OUT}"))
}

async fn evicted(place: Option<&Place>) {
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
    /// When the node's certificate expires, the one that it was renewed by included.
    expires: Mutex<Option<SystemTime>>,
    carrier: Carrier,
    max_streams: usize,
    /// Channels that an sshd has not answered for yet.
    opening: Arc<()>,
    suspect: AtomicBool,
    handle: Arc<Handle<ClientHandler>>,
    shared: Arc<Shared>,
    tasks: Tasks,
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
        let start = self.start_mux(config.max_streams_per_tunnel);
        let started = tokio::time::timeout(config.handshake_timeout, start)
            .await
            .map_err(|_| TunnelError::Timeout(config.handshake_timeout))??;
        let (carrier, events) = match started {
            Some((mux, events)) => (Carrier::Mux(mux), Some(events)),
            None => (Carrier::Channels(self.channels.clone()), None),
        };
        self.cut_on_drop.disarm();
        let tunnel = Tunnel {
            id: NEXT_ID.fetch_add(1, Ordering::Relaxed),
            node: host.node.clone(),
            direction,
            peer,
            established: Instant::now(),
            since: SystemTime::now(),
            expires: Mutex::new(host.not_after),
            host,
            carrier,
            max_streams: config.max_streams_per_tunnel,
            opening: Arc::default(),
            suspect: AtomicBool::new(false),
            handle: self.handle,
            shared: self.shared,
            tasks: self.tasks,
            cut: self.cut,
        };
        Ok((tunnel, events))
    }

    async fn start_mux(&self, max_streams: usize) -> Result<Option<(Mux, Events)>, TunnelError> {
        let mut channel = match self.handle.channel_open_session().await {
            Ok(channel) => channel,
            // An sshd set up for forwarding only.
            Err(russh::Error::ChannelOpenFailure(_)) => return Ok(None),
            Err(e) => return Err(e.into()),
        };
        let id = channel.id();
        let handle = self.handle.clone();
        let out = move |frame| {
            let handle = handle.clone();
            Box::pin(async move { handle.data(id, frame).await.is_ok() }) as _
        };
        let (mux, feeder, events) =
            Mux::new(true, max_streams, self.gate.clone(), Box::new(out), &self.tasks);
        self.channels.forget(id);
        *self.shared.feeder.lock().unwrap_or_else(PoisonError::into_inner) = Some((id, feeder));
        channel.request_subsystem(true, SUBSYSTEM).await?;
        loop {
            match channel.wait().await {
                Some(ChannelMsg::Success) => return Ok(Some((mux, events))),
                Some(ChannelMsg::Failure | ChannelMsg::Close | ChannelMsg::Eof) | None => {
                    *self.shared.feeder.lock().unwrap_or_else(PoisonError::into_inner) = None;
                    let _ = channel.close().await;
                    return Ok(None);
                }
                Some(_) => {}
            }
        }
    }

    /// Ends a session that does not become a tunnel.
    pub async fn close(self, reason: &str) {
        let _ = self.handle.disconnect(russh::Disconnect::ByApplication, reason, "").await;
        // The farewell gets a moment to leave.
        let _ = tokio::time::timeout(Duration::from_millis(500), self.shared.ended.cancelled()).await;
        self.cut.cancel();
        self.tasks.cancel();
    }
}

impl Tunnel {
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
        self.tasks.spawn(async move {
            let (host, port) = (asked.host.to_string(), u32::from(asked.port));
            let opened = handle.channel_open_direct_tcpip(host, port, "127.0.0.1", 0).await;
            drop(opening);
            let _ = answer.send(opened.map(|channel| channels.stream(Half::Client(channel.split().1))));
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
        let going = match &self.carrier {
            Carrier::Mux(mux) => mux.is_going_away(),
            Carrier::Channels(_) => false,
        };
        !going && !self.has_ended()
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
        self.shared.ended.is_cancelled()
    }

    /// Waits for the end, and gives its reason.
    pub async fn ended(&self) -> String {
        self.shared.ended.cancelled().await;
        self.ended_reason()
    }

    fn ended_reason(&self) -> String {
        self.shared.reason.get().cloned().unwrap_or_else(|| "the SSH session ended".to_owned())
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

    /// Tells the node that no new streams will come.
    pub async fn go_away(&self, reason: &str) {
        if let Carrier::Mux(mux) = &self.carrier {
            mux.go_away(reason).await;
        }
    }

    /// Ends the tunnel; its streams are reset.
    pub async fn close(&self, reason: &str) {
        let _ = self.shared.reason.set(reason.to_owned());
        let bye = self.handle.disconnect(russh::Disconnect::ByApplication, reason, "");
        let _ = tokio::time::timeout(Duration::from_millis(500), bye).await;
        let _ = tokio::time::timeout(Duration::from_millis(500), self.shared.ended.cancelled()).await;
        self.cut.cancel();
        self.tasks.cancel();
    }
}

impl Drop for Tunnel {
    fn drop(&mut self) {
        self.cut.cancel();
        self.tasks.cancel();
    }
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
