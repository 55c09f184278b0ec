//! Accepts callers of the local endpoint and connects each with a front end.

use std::{
    io::Cursor,
    net::{IpAddr, SocketAddr},
    sync::Arc,
    time::{Duration, Instant},
};

use proto::DialError;
use proto_net::{
    accept::{Acceptor, Listener, Peer, Tuning, UnixPeer},
    listeners::Pausable,
    log_throttle::LogThrottle,
    relay::{Counters, relay},
    stream::Stream,
    tasks::Tasks,
};
use tokio::{
    io::{AsyncRead, AsyncReadExt, AsyncWrite},
    net::{TcpListener, TcpStream, UnixListener, UnixStream},
};
use tokio_util::task::TaskTracker;

use super::{config::LocalEndpointConfig, front_ends::FrontEnds};
use crate::{
    metrics::{self, Metrics},
    shares::{Permit, Shares},
};

/// The most bytes that are kept of a caller until there is a stream. A TLS client says less before it is answered.
const EARLY: usize = 4096;

/// Those who share a part of `max_connections`: a pod, or a user of this host.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Source {
    Address(IpAddr),
    /// `None` where the kernel does not tell.
    User(Option<u32>),
}

/// The callers that there may be at once. One source has half of them at most, so that a pod does not lock the kubelet
/// out.
pub fn callers(config: &LocalEndpointConfig) -> Shares<Source> {
    Shares::new(config.max_connections, config.max_connections.div_ceil(2))
}

/// A peer of one of the listeners.
trait Caller: Peer {
    fn source(self) -> Source;
}

impl Caller for SocketAddr {
    fn source(self) -> Source {
        Source::Address(self.ip().to_canonical())
    }
}

impl Caller for UnixPeer {
    fn source(self) -> Source {
        Source::User(self.0.map(|process| process.uid()))
    }
}

/// Serves the callers of both listeners.
pub struct LocalEndpoint {
    pub front_ends: Arc<FrontEnds>,
    pub callers: Shares<Source>,
    /// Has a token for each caller that waits for a stream.
    pub dials: TaskTracker,
    pub metrics: Arc<Metrics>,
    /// How long a master may take to answer for a stream.
    pub open_timeout: Duration,
    /// After one direction of a stream has ended, how long the other may be silent.
    pub half_closed_timeout: Duration,
    /// The callers' tasks.
    pub tasks: Tasks,
    /// Callers that were closed because there are too many. Every pod may be able to cause them.
    pub turned_away: LogThrottle,
}

impl LocalEndpoint {
    /// Accepts TCP callers until the callers' tasks are cancelled.
    pub async fn accept_tcp(self: Arc<Self>, listener: Pausable<TcpListener>) {
        self.accept(listener, TcpStream::into_split).await;
    }

    /// Accepts callers of the Unix socket until the callers' tasks are cancelled. The socket file's mode and owner decide
    /// who may connect.
    pub async fn accept_unix(self: Arc<Self>, listener: Pausable<UnixListener>) {
        self.accept(listener, UnixStream::into_split).await;
    }

    /// `split` gives the halves of a socket, which share no lock.
    async fn accept<L, R, W>(self: Arc<Self>, listener: L, split: fn(L::Socket) -> (R, W))
    where
        L: Listener<Peer: Caller>,
        R: AsyncRead + Unpin + Send + 'static,
        W: AsyncWrite + Unpin + Send + 'static,
    {
        let serve = |socket: L::Socket, peer: L::Peer, permit: Permit| {
            let (read, write) = split(socket);
            self.clone().serve(read, write, peer.origin(), permit)
        };
        let acceptor = Acceptor::new(listener, Tuning::Caller);
        acceptor.serve(self.tasks.clone(), |peer| self.admit(peer), serve).await;
    }

    /// The permit of a caller, unless there are too many, or too many of the same source.
    fn admit(&self, peer: impl Caller) -> Option<Permit> {
        let permit = self.callers.of(peer.source()).try_take();
        if permit.is_none() {
            self.count("too_many_streams");
            if let Some(callers) = self.turned_away.count(1) {
                let last = peer.origin();
                tracing::warn!(
                    callers,
                    last,
                    "closed callers of the front end: front_end.max_connections reached, or half of it by one source"
                );
            }
        }
        permit
    }

    async fn serve<R, W>(self: Arc<Self>, mut read: R, write: W, caller: String, permit: Permit)
    where
        R: AsyncRead + Unpin,
        W: AsyncWrite + Unpin,
    {
        let dialling = self.dials.token();
        let (stream, early) = match self.open(&mut read, &caller).await {
            Ok(opened) => opened,
            Err(error @ DialError::Cancelled) => {
                self.count(error.kind());
                return;
            }
            Err(error) => {
                self.count(error.kind());
                tracing::warn!(caller, %error, "closed a caller of the front end");
                return;
            }
        };
        self.count("ok");
        let mut record = Record::new(self.metrics.clone(), caller);
        drop(dialling);
        let read = Cursor::new(early).chain(read);
        let (up, down) = (&record.counters.up, &record.counters.down);
        record.outcome = relay(read, write, stream, up, down, self.half_closed_timeout).await.kind();
        drop(permit);
    }

    /// Opens a stream, and keeps what the caller sends meanwhile. Gives up when the caller leaves. One that has sent
    /// something may only have closed its sending half.
    async fn open<R>(&self, read: &mut R, caller: &str) -> Result<(Stream, Vec<u8>), DialError>
    where
        R: AsyncRead + Unpin,
    {
        let mut early: Vec<u8> = Vec::with_capacity(EARLY);
        let left = async {
            while early.len() < EARLY {
                match read.read_buf(&mut early).await {
                    Ok(0) if !early.is_empty() => break,
                    Ok(0) | Err(_) => return,
                    Ok(_) => {}
                }
            }
            // Whether there is more, or an end, is for the stream to find out.
            std::future::pending().await
        };
        let opened = tokio::select! {
            opened = self.front_ends.open(caller, self.open_timeout) => opened,
            () = left => Err(DialError::Cancelled),
        };
        opened.map(|stream| (stream, early))
    }

    fn count(&self, result: &'static str) {
        self.metrics.front_end_callers.get_or_create(&metrics::ResultLabel { result }).inc();
    }
}

/// Counts and logs a caller's stream when it ends, in whatever way. `up` is what the caller sent.
struct Record {
    metrics: Arc<Metrics>,
    caller: String,
    began: Instant,
    counters: Counters,
    outcome: &'static str,
}

impl Record {
    fn new(metrics: Arc<Metrics>, caller: String) -> Self {
        metrics.front_end_streams.inc();
        Self { metrics, caller, began: Instant::now(), counters: Counters::default(), outcome: "tunnel_lost" }
    }
}

impl Drop for Record {
    fn drop(&mut self) {
        self.metrics.front_end_streams.dec();
        let (up, down) = (*self.counters.up.get_mut(), *self.counters.down.get_mut());
        for (direction, bytes) in [("up", up), ("down", down)] {
            self.metrics.front_end_bytes.get_or_create(&metrics::DirectionLabel { direction }).inc_by(bytes);
        }
        tracing::info!(
            caller = self.caller,
            up,
            down,
            seconds = self.began.elapsed().as_secs_f64(),
            outcome = self.outcome,
            "front end stream ended"
        );
    }
}

#[cfg(test)]
mod tests {
    use tokio::io::AsyncWriteExt;
    use tokio_util::sync::CancellationToken;

    use super::*;

    const MAX: usize = 4;
    const WAIT: Duration = Duration::from_secs(5);

    fn endpoint(draining: CancellationToken) -> Arc<LocalEndpoint> {
        let config = LocalEndpointConfig { tcp: None, unix: None, max_connections: MAX, wait: WAIT };
        Arc::new(LocalEndpoint {
            front_ends: Arc::new(FrontEnds::new(&config, draining)),
            callers: callers(&config),
            dials: TaskTracker::new(),
            metrics: Arc::default(),
            open_timeout: Duration::from_secs(10),
            half_closed_timeout: Duration::from_secs(600),
            tasks: Tasks::new(),
            turned_away: LogThrottle::default(),
        })
    }

    fn address(text: &str) -> SocketAddr {
        text.parse().unwrap()
    }

    #[tokio::test]
    async fn a_source_that_holds_all_that_it_can_keeps_no_other_out() {
        let endpoint = endpoint(CancellationToken::new());
        let mut held = Vec::new();
        for port in 1..=MAX as u16 {
            held.extend(endpoint.admit(SocketAddr::from(([10, 0, 0, 1], port))));
        }
        assert_eq!(held.len(), MAX / 2);
        assert!(endpoint.admit(address("[::ffff:10.0.0.1]:9")).is_none(), "it is the same address");
        held.extend(endpoint.admit(address("10.0.0.2:1")));
        held.extend(endpoint.admit(UnixPeer(None)));
        assert_eq!(held.len(), MAX);
        assert!(endpoint.admit(address("10.0.0.3:1")).is_none(), "there are too many in all");
    }

    #[tokio::test(start_paused = true)]
    async fn a_caller_that_leaves_before_there_is_a_front_end_is_not_waited_for() {
        let endpoint = endpoint(CancellationToken::new());
        // Whoever has sent something may only have closed its sending half.
        for (early, seconds) in [(0, 1), (1, 5)] {
            let (mut caller, socket) = tokio::io::duplex(2 * EARLY);
            caller.write_all(&vec![0; early]).await.unwrap();
            let permit = endpoint.admit(address("10.0.0.1:1")).unwrap();
            let (read, write) = tokio::io::split(socket);
            let began = tokio::time::Instant::now();
            let serving = endpoint.clone().serve(read, write, "test".to_owned(), permit);
            let leaving = async {
                tokio::time::sleep(Duration::from_secs(1)).await;
                drop(caller);
            };
            tokio::join!(serving, leaving);
            assert_eq!(began.elapsed(), Duration::from_secs(seconds), "{early}");
        }
        let left = metrics::ResultLabel { result: "cancelled" };
        assert_eq!(endpoint.metrics.front_end_callers.get_or_create(&left).get(), 1);
    }

    #[tokio::test(start_paused = true)]
    async fn nobody_waits_for_a_front_end_while_the_agent_drains() {
        let draining = CancellationToken::new();
        let endpoint = endpoint(draining.clone());
        let (_caller, socket) = tokio::io::duplex(1);
        let permit = endpoint.admit(address("10.0.0.1:1")).unwrap();
        let (read, write) = tokio::io::split(socket);
        let began = tokio::time::Instant::now();
        let serving = endpoint.clone().serve(read, write, "test".to_owned(), permit);
        let drain = async {
            tokio::time::sleep(Duration::from_secs(1)).await;
            assert_eq!(endpoint.dials.len(), 1, "it is waited for");
            draining.cancel();
        };
        tokio::join!(serving, drain);
        assert_eq!((began.elapsed(), endpoint.dials.len()), (Duration::from_secs(1), 0));
    }
}
