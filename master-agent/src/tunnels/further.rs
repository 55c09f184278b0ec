//! The further connections of a tunnel, over which the bytes of streams go that carry much. They are made when such
//! streams come, and ended some time after the last of them.

use std::{thread, time::Duration};

use proto::{
    backoff::Backoff,
    mux::{frame::Hello, load::connections_for},
};
use proto_net::mux::Mux;
use tokio::time::{Instant, sleep, timeout};

use super::{
    session::{error::TunnelError, handshake::Session, multiplexer::Started},
    tunnel::Tunnel,
};

/// How long further connections stay without a stream that carries much. It is longer than a node takes to learn that all
/// of its bytes have arrived, so that no stream ends with them.
const UNUSED: Duration = Duration::from_secs(150);
/// How long a node may take to dial a connection that it was asked for.
const CALLED: Duration = Duration::from_secs(10);
/// The pauses between two attempts to make a connection, which grow unless the last attempt was long ago.
const BACKOFF: (Duration, Duration) = (Duration::from_millis(250), Duration::from_secs(60));

/// The attempts to make further connections of one tunnel. A node may close those at once that have been made.
pub(super) struct Attempts {
    backoff: Backoff,
    last: Instant,
}

impl Default for Attempts {
    fn default() -> Self {
        Self { backoff: Backoff::new(BACKOFF.0, BACKOFF.1), last: Instant::now() }
    }
}

impl Attempts {
    /// Waits until there may be another attempt.
    pub(super) async fn after(&mut self, tunnel: &Tunnel, attempt: Result<(), TunnelError>) {
        if let Err(error) = attempt {
            tracing::info!(node = %tunnel.node, %error, "no further connection");
        }
        if self.last.elapsed() > UNUSED {
            self.backoff.reset();
        }
        sleep(self.backoff.next_delay(rand::random())).await;
        self.last = Instant::now();
    }
}

impl Tunnel {
    /// Waits until a further connection is worth having. Never completes for a tunnel that can't have any.
    pub(super) async fn wants_further(&self) {
        let Some(mux) =
            self.mux().filter(|mux| self.further.most > 0 && mux.peer().is_some_and(can_have_more))
        else {
            return std::future::pending().await;
        };
        while !self.lacks_connection(mux) {
            self.load_changed(mux).await;
        }
    }

    /// Returns the number of connections.
    pub(super) fn connections(&self) -> usize {
        1 + self.mux().map_or(0, Mux::further_connections)
    }

    fn lacks_connection(&self, mux: &Mux) -> bool {
        let threads = thread::available_parallelism().map_or(1, usize::from);
        let round_trip = mux.round_trip().unwrap_or_default();
        let wanted = connections_for(mux.heavy_streams(), round_trip, threads, self.further.most);
        !self.is_going_away() && mux.further_connections() < wanted
    }

    /// Waits until the load has changed. Ends the further connections if nothing has used them for a while.
    async fn load_changed(&self, mux: &Mux) {
        let unused = async {
            while mux.further_connections() == 0 || mux.unused_for() < UNUSED {
                sleep(UNUSED.saturating_sub(mux.unused_for()).max(UNUSED / 10)).await;
            }
        };
        tokio::select! {
            () = mux.load_changed() => {}
            () = unused => {
                self.further.end();
                // They are still counted until their tasks have ended.
                let _ = timeout(UNUSED / 10, mux.load_changed()).await;
            }
        }
    }

    /// Makes a session with the same node a further connection of this tunnel.
    pub(super) async fn join(&self, session: Session) -> Result<(), TunnelError> {
        let limit = self.answer_timeout;
        let started = timeout(limit, session.start_multiplexer(self.limits, self.mux())).await;
        match started.map_err(|_| TunnelError::Timeout(limit))?? {
            Started::Joined => {
                self.add_further(session);
                Ok(())
            }
            Started::New(..) | Started::Nothing => Err(TunnelError::NotJoined),
        }
    }

    /// Keeps the session on a further connection.
    pub(super) fn add_further(&self, session: Session) {
        tracing::debug!(node = %self.node, "further connection established");
        let mut sessions = self.further.sessions();
        sessions.retain(|other| !other.state.ended.is_cancelled());
        sessions.push(session);
    }

    /// Asks the node to dial a further connection, and waits until it has.
    pub(super) async fn call_node(&self) -> Result<(), TunnelError> {
        let Some(mux) = self.mux() else { return Err(TunnelError::NotJoined) };
        let before = mux.further_connections_ever();
        *self.further.called() = Some(Instant::now() + CALLED);
        if !mux.call().await {
            return Err(TunnelError::Closed);
        }
        let come = async {
            while mux.further_connections_ever() == before {
                mux.load_changed().await;
            }
        };
        timeout(CALLED, come).await.map_err(|_| TunnelError::Timeout(CALLED))
    }

    /// Whether a link that the node has dialled is to be a further connection. One call asks for one link.
    pub(super) fn takes_call(&self) -> bool {
        self.further.called().take().is_some_and(|until| Instant::now() < until)
    }
}

fn can_have_more(peer: &Hello) -> bool {
    peer.can(Hello::CONNECTIONS)
}
