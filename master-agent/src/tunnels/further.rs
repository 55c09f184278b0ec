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
/// The pauses between attempts to make a connection that fail.
const BACKOFF: (Duration, Duration) = (Duration::from_secs(1), Duration::from_secs(60));

/// The pauses between attempts to make a further connection.
pub(super) struct Attempts(Backoff);

impl Default for Attempts {
    fn default() -> Self {
        Self(Backoff::new(BACKOFF.0, BACKOFF.1))
    }
}

impl Attempts {
    /// Waits if an attempt has failed.
    pub(super) async fn after(&mut self, tunnel: &Tunnel, attempt: Result<(), TunnelError>) {
        match attempt {
            Ok(()) => self.0.reset(),
            Err(error) => {
                tracing::info!(node = %tunnel.node, %error, "no further connection");
                sleep(self.0.next_delay(rand::random())).await;
            }
        }
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
            match mux.heavy_streams() == 0 && mux.further_connections() > 0 {
                true => sleep(UNUSED).await,
                false => std::future::pending().await,
            }
        };
        tokio::select! {
            () = mux.load_changed() => {}
            () = unused => self.further.end(),
        }
    }

    /// Makes a session with the same node a further connection of this tunnel.
    pub(super) async fn join(&self, session: Session) -> Result<(), TunnelError> {
        let limit = self.answer_timeout;
        let started = timeout(limit, session.start_multiplexer(self.limits, self.mux())).await;
        match started.map_err(|_| TunnelError::Timeout(limit))?? {
            Started::Joined => {
                tracing::info!(node = %self.node, "further connection established");
                let mut sessions = self.further.sessions();
                sessions.retain(|other| !other.state.ended.is_cancelled());
                sessions.push(session);
                Ok(())
            }
            Started::New(..) | Started::Nothing => Err(TunnelError::NotJoined),
        }
    }

    /// Asks the node to dial a further connection, and waits until it has.
    pub(super) async fn call_node(&self) -> Result<(), TunnelError> {
        let Some(mux) = self.mux() else { return Err(TunnelError::NotJoined) };
        let before = mux.further_connections();
        *self.further.called() = Some(Instant::now() + CALLED);
        if !mux.call().await {
            return Err(TunnelError::Closed);
        }
        let come = async {
            while mux.further_connections() <= before {
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
