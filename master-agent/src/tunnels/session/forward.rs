//! The connections to the front end that arrive at an address on which a plain sshd was asked to listen (RFC 4254,
//! section 7.1).

use std::{
    sync::Arc,
    time::{Duration, Instant},
};

use proto_net::stream::Stream;
use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc};

/// The number of channels that a plain sshd may open in [`OPENS_WINDOW`]. Each of them costs an answer, and the queue
/// of answers is unbounded during a key exchange.
const MAX_OPENS: u32 = 10_000;
const OPENS_WINDOW: Duration = Duration::from_secs(10);

/// A connection to the address that a plain sshd listens on.
pub struct Forwarded {
    pub stream: Stream,
    /// The caller's address, as the sshd reports it.
    pub origin: String,
    /// Counts this connection against the node's limit until it is dropped.
    pub permit: OwnedSemaphorePermit,
}

/// A reserved place for one connection.
pub(super) struct Reserved {
    pub(super) callers: mpsc::OwnedPermit<Forwarded>,
    pub(super) permit: OwnedSemaphorePermit,
}

/// The address on which a plain sshd was asked to listen, and the receiver of its connections.
pub struct Forward {
    host: String,
    port: u32,
    callers: mpsc::Sender<Forwarded>,
    permits: Arc<Semaphore>,
    /// When the current window began, and how many channels were opened since then.
    opens: (Instant, u32),
}

impl Forward {
    /// Also returns the receiver of the connections, of which there are at most `max_connections` at once.
    pub(crate) fn new(host: String, port: u32, max_connections: usize) -> (Self, mpsc::Receiver<Forwarded>) {
        let (callers, received) = mpsc::channel(max_connections.max(1));
        let permits = Arc::new(Semaphore::new(max_connections));
        (Self { host, port, callers, permits, opens: (Instant::now(), 0) }, received)
    }

    pub(super) fn listens_on(&self, host: &str, port: u32) -> bool {
        self.host == host && self.port == port
    }

    /// Counts a channel that the node opens. Returns `false` if there are too many.
    pub(super) fn count_open(&mut self, now: Instant) -> bool {
        let (since, count) = &mut self.opens;
        if now.duration_since(*since) > OPENS_WINDOW {
            (*since, *count) = (now, 0);
        }
        *count += 1;
        *count <= MAX_OPENS
    }

    /// Reserves a place for a connection. Returns `None` if all places are taken.
    pub(super) fn reserve(&self) -> Option<Reserved> {
        let permit = self.permits.clone().try_acquire_owned().ok();
        let callers = self.callers.clone().try_reserve_owned().ok();
        callers.zip(permit).map(|(callers, permit)| Reserved { callers, permit })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_node_may_open_so_many_channels_in_a_window_and_again_in_the_next() {
        let (mut forward, _received) = Forward::new("127.0.0.1".to_owned(), 6443, 1);
        let began = forward.opens.0;
        assert!((0..MAX_OPENS).all(|_| forward.count_open(began)));
        assert!(!forward.count_open(began + OPENS_WINDOW));
        assert!(forward.count_open(began + OPENS_WINDOW + Duration::from_millis(1)));
    }

    #[test]
    fn no_more_connections_are_reserved_than_allowed() {
        let (forward, _received) = Forward::new("127.0.0.1".to_owned(), 6443, 2);
        let both = (forward.reserve().unwrap(), forward.reserve().unwrap());
        assert!(forward.reserve().is_none());
        drop(both);
        assert!(forward.reserve().is_some());
    }
}
