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

use proto::{DialError, NodeName, Target};
use proto_net::{
    mux::{Events, Mux},
    stream::Stream,
};
use tokio::time::{Instant, timeout};
use tokio_util::sync::CancellationToken;

use super::{
    config::TunnelsConfig,
    session::{
        direct_tcpip::DirectTcpip, error::TunnelError, handshake::Session, multiplexer::Opener, state::Loss,
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
    /// The multiplexer on which the node opens streams to the front end, once it has been asked for.
    pub(super) front_end: OnceLock<Mux>,
    /// The longest time for answers of the node to requests that are neither dials nor keep-alives.
    pub(super) answer_timeout: Duration,
    carrier: Carrier,
    /// Cancelled when another tunnel has replaced this one. A retired tunnel keeps its streams.
    retired: CancellationToken,
    /// When the node's certificate expires. Renewals change it.
    certificate_expires: Mutex<Option<SystemTime>>,
    suspect: AtomicBool,
}

impl Tunnel {
    /// Establishes a tunnel on a session with `host`. Also returns the events of the multiplexer, if the node offers
    /// one.
    pub async fn establish(
        session: Session,
        host: VerifiedHost,
        direction: Direction,
        peer: Option<SocketAddr>,
        config: &TunnelsConfig,
    ) -> Result<(Self, Option<Events>), TunnelError> {
        let (limit, max_streams) = (config.handshake_timeout, config.max_streams_per_tunnel);
        let started = timeout(limit, session.start_multiplexer(Opener::Master, max_streams)).await;
        let (carrier, events) = match started.map_err(|_| TunnelError::Timeout(limit))?? {
            Some((mux, events)) => (Carrier::Mux(mux), Some(events)),
            None => (Carrier::DirectTcpip(DirectTcpip::new(&session, max_streams)), None),
        };
        let tunnel = Self {
            id: NEXT_ID.fetch_add(1, Ordering::Relaxed),
            node: host.node.clone(),
            direction,
            peer,
            established: Instant::now(),
            since: SystemTime::now(),
            session,
            front_end: OnceLock::new(),
            answer_timeout: limit,
            carrier,
            retired: CancellationToken::new(),
            certificate_expires: Mutex::new(host.not_after),
            suspect: AtomicBool::new(false),
            host,
        };
        Ok((tunnel, events))
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

    pub fn streams(&self) -> usize {
        match &self.carrier {
            Carrier::Mux(mux) => mux.streams_open(),
            Carrier::DirectTcpip(channels) => channels.streams(),
        }
    }

    /// Whether no stream is open in either direction.
    pub fn is_idle(&self) -> bool {
        self.streams() + self.front_end.get().map_or(0, Mux::streams_open) == 0
    }

    pub fn round_trip(&self) -> Option<Duration> {
        match &self.carrier {
            Carrier::Mux(mux) => mux.round_trip(),
            Carrier::DirectTcpip(_) => None,
        }
    }

    /// Returns when the certificate that authenticated the master expires.
    pub fn user_expires(&self) -> Option<SystemTime> {
        self.session.user_expires
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
    }
}
