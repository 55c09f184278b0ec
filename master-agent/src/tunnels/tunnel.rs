//! A tunnel, which is a session with a known node and the carrier of its streams. The streams of a node-agent share its
//! multiplexer. Any other node is a plain sshd, whose streams have SSH channels of their own.

use std::{
    net::SocketAddr,
    sync::{
        Mutex, OnceLock, PoisonError,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    time::{Duration, SystemTime},
};

use proto::{DialError, NodeName, Target, mux::ids::Opener};
use proto_net::{
    mux::{Events, Incoming, Mux, Notice},
    stream::Stream,
};
use tokio::{
    sync::mpsc,
    time::{Instant, timeout},
};
use tokio_util::sync::CancellationToken;

use super::{
    config::TunnelsConfig,
    drain::Drain,
    further_sessions::FurtherSessions,
    session::{
        direct_tcpip::DirectTcpip,
        error::TunnelError,
        handshake::Session,
        multiplexer::{Started, StreamLimits},
        state::Loss,
    },
};
use crate::identity::VerifiedHost;

static NEXT_ID: AtomicU64 = AtomicU64::new(1);

/// The side that dialled the link.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Direction {
    /// The master.
    Dialled,
    /// The node.
    CallHome,
    /// The node, over the front end's port.
    CallHomeHttps,
}

impl Direction {
    pub(super) fn name(self) -> &'static str {
        match self {
            Self::Dialled => "dialled",
            Self::CallHome => "call-home",
            Self::CallHomeHttps => "call-home-https",
        }
    }
}

/// Receives what a node says about its tunnel as a whole.
pub type Notices = mpsc::Receiver<Notice>;

/// The carrier of a tunnel's streams.
enum Carrier {
    Mux(Mux),
    DirectTcpip(DirectTcpip),
}

/// An established tunnel to a node. Dropping it ends it.
pub struct Tunnel {
    /// The number of the tunnel. Later tunnels have greater numbers.
    pub id: u64,
    pub node: NodeName,
    pub direction: Direction,
    pub peer: Option<SocketAddr>,
    pub established: Instant,
    /// The wall-clock time of `established`, for the status.
    pub since: SystemTime,
    pub host: VerifiedHost,
    pub(super) session: Session,
    /// The streams that the node opens to the front end, until somebody takes them.
    pub(super) callers: Mutex<Option<mpsc::Receiver<Incoming>>>,
    /// The multiplexer on which a node-agent of an earlier release opens them, once it has been asked for.
    pub(super) front_end: OnceLock<Mux>,
    pub(super) limits: StreamLimits,
    pub(super) further: FurtherSessions,
    /// The longest time for answers of the node to requests that are neither dials nor keep-alives.
    pub(super) answer_timeout: Duration,
    carrier: Carrier,
    /// Cancelled when another tunnel has replaced this one. A retired tunnel keeps its streams.
    retired: CancellationToken,
    /// Cancelled when the node asks for another link in place of this one.
    relink: CancellationToken,
    /// When the node's certificate expires. Renewals change it.
    certificate_expires: Mutex<Option<SystemTime>>,
    suspect: AtomicBool,
    /// The drain that the node has asked for.
    drain: Mutex<Option<Drain>>,
}

impl Tunnel {
    /// Establishes a tunnel on a session with `host`, and also returns what the node says about the tunnel, if it has a
    /// multiplexer. Returns `None` if the session has become a further connection of `present` instead.
    pub async fn establish(
        session: Session,
        host: VerifiedHost,
        (direction, peer): (Direction, Option<SocketAddr>),
        config: &TunnelsConfig,
        max_callers: Option<usize>,
        present: Option<&Self>,
    ) -> Result<Option<(Self, Option<Notices>)>, TunnelError> {
        let (limit, max_streams) = (config.handshake_timeout, config.max_streams_per_tunnel);
        let limits = StreamLimits { to_node: max_streams, to_front_end: max_callers };
        let mux = present.and_then(Self::mux);
        let started = timeout(limit, session.start_multiplexer(limits, mux)).await;
        let (carrier, callers, notices) = match started.map_err(|_| TunnelError::Timeout(limit))?? {
            Started::New(mux, Events { incoming, notices }) => {
                (Carrier::Mux(mux), Some(incoming), Some(notices))
            }
            Started::Joined => {
                present.ok_or(TunnelError::NotJoined)?.add_further(session);
                return Ok(None);
            }
            Started::Nothing => (Carrier::DirectTcpip(DirectTcpip::new(&session, max_streams)), None, None),
        };
        let tunnel = Self {
            id: NEXT_ID.fetch_add(1, Ordering::Relaxed),
            node: host.node.clone(),
            direction,
            peer,
            established: Instant::now(),
            since: SystemTime::now(),
            session,
            callers: Mutex::new(callers),
            front_end: OnceLock::new(),
            limits,
            further: FurtherSessions::new(config.max_further_connections),
            answer_timeout: limit,
            carrier,
            retired: CancellationToken::new(),
            relink: CancellationToken::new(),
            certificate_expires: Mutex::new(host.not_after),
            suspect: AtomicBool::new(false),
            drain: Mutex::default(),
            host,
        };
        Ok(Some((tunnel, notices)))
    }

    /// Opens a stream to `target` within `limit`. Dropping the future cancels the dial.
    pub async fn open(&self, target: &Target, origin: &str, limit: Duration) -> Result<Stream, DialError> {
        let opened = match &self.carrier {
            Carrier::Mux(mux) => mux.open(target, origin, limit).await,
            Carrier::DirectTcpip(channels) => channels.open(target, limit).await,
        };
        opened.map_err(|error| match error {
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
        })
    }

    /// Whether the other end is a node-agent, which resolves names and reports the causes of failed dials.
    pub fn is_node_agent(&self) -> bool {
        matches!(self.carrier, Carrier::Mux(_))
    }

    /// Returns the kind of the other end, `node-agent` or `sshd`.
    pub fn kind(&self) -> &'static str {
        if self.is_node_agent() { "node-agent" } else { "sshd" }
    }

    /// Returns the multiplexer, if there is one.
    pub(super) fn mux(&self) -> Option<&Mux> {
        match &self.carrier {
            Carrier::Mux(mux) => Some(mux),
            Carrier::DirectTcpip(_) => None,
        }
    }

    /// Returns the number of streams that the master has opened.
    pub fn streams(&self) -> usize {
        match &self.carrier {
            Carrier::Mux(mux) => mux.streams_of(Opener::This),
            Carrier::DirectTcpip(channels) => channels.streams(),
        }
    }

    /// Whether no stream is open in either direction.
    pub fn is_idle(&self) -> bool {
        let of_node = match &self.carrier {
            Carrier::Mux(mux) => mux.streams_of(Opener::Peer),
            Carrier::DirectTcpip(_) => 0,
        };
        self.streams() + of_node + self.front_end.get().map_or(0, Mux::streams_open) == 0
    }

    pub fn round_trip(&self) -> Option<Duration> {
        match &self.carrier {
            Carrier::Mux(mux) => mux.round_trip(),
            Carrier::DirectTcpip(_) => None,
        }
    }

    /// Returns when the certificate that authenticated the master expires.
    pub fn user_expires(&self) -> Option<SystemTime> {
        self.session.user.expires()
    }

    pub fn certificate_expires(&self) -> Option<SystemTime> {
        *self.certificate_expires.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub fn set_certificate_expires(&self, at: SystemTime) {
        *self.certificate_expires.lock().unwrap_or_else(PoisonError::into_inner) = Some(at);
    }

    /// Sends a renewed host certificate, which only a node-agent can take. Returns whether it was sent.
    pub async fn send_certificate(&self, text: &str) -> bool {
        match &self.carrier {
            Carrier::Mux(mux) => mux.send_certificate(text).await,
            Carrier::DirectTcpip(_) => false,
        }
    }

    /// Whether new streams can be opened.
    pub fn is_usable(&self) -> bool {
        !self.is_going_away() && !self.has_ended()
    }

    /// Whether either side has said that it takes no new streams.
    pub fn is_going_away(&self) -> bool {
        match &self.carrier {
            Carrier::Mux(mux) => mux.is_going_away(),
            Carrier::DirectTcpip(_) => false,
        }
    }

    /// Whether the node answers within `limit`.
    pub async fn answers(&self, limit: Duration) -> bool {
        timeout(limit, self.session.handle.send_ping()).await.is_ok_and(|answer| answer.is_ok())
    }

    /// Whether the node left the last ping unanswered, which may only mean that the link is busy.
    pub fn is_suspect(&self) -> bool {
        self.suspect.load(Ordering::Relaxed)
    }

    pub fn set_suspect(&self, suspect: bool) {
        self.suspect.store(suspect, Ordering::Relaxed);
    }

    /// Returns the drain that the node has asked for.
    pub fn drain(&self) -> Option<Drain> {
        *self.drain.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The node asks to be drained within `left`, or no longer, if that is zero.
    pub(super) fn on_drain(&self, left: Duration) {
        let drain = (!left.is_zero()).then(|| Drain::by_node(left));
        *self.drain.lock().unwrap_or_else(PoisonError::into_inner) = drain;
    }

    /// Resets the streams that the master has opened. Returns how many there were. On a plain sshd, these are all channels,
    /// also those of callers of the front end.
    pub fn reset_streams(&self, reason: &str) -> usize {
        match &self.carrier {
            Carrier::Mux(mux) => mux.reset_streams(Opener::This, reason),
            Carrier::DirectTcpip(channels) => channels.reset(reason),
        }
    }

    pub fn has_ended(&self) -> bool {
        self.session.state.ended.is_cancelled()
    }

    /// Waits until the tunnel ends, and returns the reason.
    pub async fn ended(&self) -> String {
        self.session.state.ended.cancelled().await;
        self.session.state.reason()
    }

    /// Returns the kind of reason for which the tunnel has ended.
    pub fn loss(&self) -> Loss {
        self.session.state.end_reason().map_or(Loss::Link, |(loss, _)| loss)
    }

    /// Retires the tunnel, which keeps its streams and gets no new ones.
    pub async fn retire(&self, reason: &str) {
        self.retired.cancel();
        self.go_away(reason).await;
    }

    /// The node has asked for another link.
    pub(super) fn on_relink(&self) {
        self.relink.cancel();
    }

    /// Waits until the node asks for another link in place of this one.
    pub(super) async fn relink_asked(&self) {
        self.relink.cancelled().await;
    }

    /// Asks a node that calls home for another link in place of this one. Returns whether the node understands that.
    pub async fn ask_to_relink(&self) -> bool {
        match &self.carrier {
            Carrier::Mux(mux) if self.direction != Direction::Dialled => mux.ask_to_relink().await,
            Carrier::Mux(_) | Carrier::DirectTcpip(_) => false,
        }
    }

    pub fn is_retired(&self) -> bool {
        self.retired.is_cancelled()
    }

    /// Waits until the tunnel is retired.
    pub async fn retired(&self) {
        self.retired.cancelled().await;
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

    /// Ends the tunnel and resets its streams.
    pub async fn close(&self, reason: &str) {
        self.session.state.end(Loss::ByMaster, reason.to_owned());
        let last_messages = async {
            if let Carrier::Mux(mux) = &self.carrier
                && !mux.is_going_away()
            {
                mux.go_away(reason).await;
            }
        };
        self.session.close_after(last_messages, reason).await;
        self.further.end();
    }
}

#[cfg(test)]
mod tests {
    use proto::mux::Version;

    use super::*;
    use crate::tunnels::testing::Master;

    #[tokio::test(start_paused = true)]
    async fn a_node_agent_of_each_release_is_understood() {
        let mut master = Master::new(Duration::from_secs(3600), 8);
        for version in Version::ALL {
            *master.node.version.lock().unwrap() = version;
            let (tunnel, _notices, node) = master.tunnel().await;
            assert_eq!(tunnel.mux().map(Mux::version), Some(version));
            assert_eq!(node.mux.version(), version);
            let target = "10.0.0.1:80".parse().unwrap();
            let stream = tunnel.open(&target, "test", Duration::from_secs(5)).await.unwrap();
            assert_eq!((tunnel.streams(), tunnel.connections()), (1, 1));
            drop(stream);
            assert!(tunnel.is_idle());
        }
    }

    /// Two tunnels of one session name would take each other's further connections.
    #[tokio::test(start_paused = true)]
    async fn a_node_that_knows_the_session_and_does_not_join_it_gets_no_second_tunnel_of_that_name() {
        let mut master = Master::new(Duration::from_secs(3600), 8);
        let (tunnel, _notices, _node) = master.tunnel().await;
        let second = master.tunnel_beside(Some(&tunnel), &master.tasks).await;
        assert!(matches!(second, Err(TunnelError::NotJoined)));
        assert_eq!(tunnel.connections(), 1);
        assert!(master.tunnel_beside(None, &master.tasks).await.is_ok_and(|second| second.is_some()));
    }
}
