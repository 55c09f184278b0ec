//! Accepting connections: the one loop that all listeners of both agents use.
//!
//! Whoever is accepted is admitted or closed at once, without being read: a connection that waited for a permit here would
//! make those behind it in the kernel's queue wait, too. What the limit is, and whether a newcomer beyond it is closed,
//! takes the permit of somebody who has not authenticated ([`handshake`](super::handshake)), or waits in its own task, is
//! for the owner to say.

use std::{
    fmt, io,
    net::{IpAddr, Ipv4Addr, SocketAddr},
    time::Duration,
};

use tokio::{
    io::{AsyncRead, AsyncWrite},
    net::{TcpListener, TcpStream, UnixListener, UnixStream, unix::UCred},
    time::Instant,
};

use super::{socket, tasks::Tasks};

/// How long nothing is accepted after an error that is not one of a single connection.
const PAUSE: Duration = Duration::from_millis(50);
/// How often such errors are logged while they last.
const WARN_INTERVAL: Duration = Duration::from_secs(10);

/// A bound socket that connections are accepted from.
pub trait Listener: Send + Sync + 'static {
    type Socket: AsyncRead + AsyncWrite + Unpin + Send + 'static;
    type Peer: Peer;

    /// Accepts one connection. Cancel-safe.
    fn accept(&self) -> impl Future<Output = io::Result<(Self::Socket, Self::Peer)>> + Send;

    /// Sets the options of an accepted socket.
    fn tune(socket: &Self::Socket, tuning: Tuning);
}

/// Who is at the other end of an accepted connection.
pub trait Peer: Copy + fmt::Debug + Send + Sync + 'static {
    /// The address by which connections are limited.
    fn ip(self) -> IpAddr;

    /// How records name the peer.
    fn origin(self) -> String;
}

/// What an accepted TCP socket is set to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Tuning {
    /// [`socket::tune_link`], for links.
    Link,
    /// [`socket::tune_caller`], for sockets whose bytes are relayed, and for administration.
    Caller,
}

/// The process that has connected to a Unix socket; `None` where the kernel does not say.
#[derive(Clone, Copy, Debug)]
pub struct UnixPeer(pub Option<UCred>);

/// Accepts connections for as long as it is polled, whatever errors occur.
#[derive(Debug)]
pub struct Acceptor<L> {
    listener: L,
    tuning: Tuning,
    /// When an error was last logged.
    warned: Option<Instant>,
}

impl<L: Listener> Acceptor<L> {
    pub fn new(listener: L, tuning: Tuning) -> Self {
        Self { listener, tuning, warned: None }
    }

    /// Serves each connection in a task of `tasks`, until that group is cancelled.
    ///
    /// `admit` takes what the connection counts against, or refuses it with `None`, which closes the connection. It is
    /// called for one connection after the other and must not block.
    pub async fn serve<A, F>(
        mut self,
        tasks: Tasks,
        admit: impl Fn(L::Peer) -> Option<A>,
        serve: impl Fn(L::Socket, L::Peer, A) -> F,
    ) where
        F: Future<Output = ()> + Send + 'static,
    {
        loop {
            let (socket, peer) = tokio::select! {
                accepted = self.next() => accepted,
                () = tasks.cancelled() => return,
            };
            if let Some(admission) = admit(peer) {
                tasks.spawn(serve(socket, peer, admission));
            }
        }
    }

    /// The next connection. Errors are logged and never end this. Cancel-safe.
    pub async fn next(&mut self) -> (L::Socket, L::Peer) {
        loop {
            match self.listener.accept().await {
                Ok((socket, peer)) => {
                    L::tune(&socket, self.tuning);
                    return (socket, peer);
                }
                Err(error) if is_of_one_connection(&error) => {
                    tracing::debug!(%error, "a connection failed before it was accepted");
                }
                Err(error) => {
                    if self.warned.is_none_or(|at| at.elapsed() >= WARN_INTERVAL) {
                        self.warned = Some(Instant::now());
                        tracing::warn!(%error, "accept failed");
                    }
                    tokio::time::sleep(PAUSE).await;
                }
            }
        }
    }
}

/// Whether an error is that of the connection which would have been accepted (accept(2)), so that the next one may be
/// accepted at once. Others, such as `EMFILE`, last for a while, and the listener stays readable meanwhile.
fn is_of_one_connection(error: &io::Error) -> bool {
    matches!(
        error.raw_os_error(),
        Some(
            libc::ECONNABORTED
                | libc::ECONNRESET
                | libc::EINTR
                | libc::EPROTO
                | libc::ENOPROTOOPT
                | libc::ENETDOWN
                | libc::ENETUNREACH
                | libc::EHOSTDOWN
                | libc::EHOSTUNREACH
                | libc::ENONET
        )
    )
}

impl Listener for TcpListener {
    type Socket = TcpStream;
    type Peer = SocketAddr;

    async fn accept(&self) -> io::Result<(TcpStream, SocketAddr)> {
        Self::accept(self).await
    }

    fn tune(socket: &TcpStream, tuning: Tuning) {
        match tuning {
            Tuning::Link => socket::tune_link(socket),
            Tuning::Caller => socket::tune_caller(socket),
        }
    }
}

impl Listener for UnixListener {
    type Socket = UnixStream;
    type Peer = UnixPeer;

    async fn accept(&self) -> io::Result<(UnixStream, UnixPeer)> {
        let (socket, _) = Self::accept(self).await?;
        let peer = UnixPeer(socket.peer_cred().ok());
        Ok((socket, peer))
    }

    fn tune(_: &UnixStream, _: Tuning) {}
}

impl Peer for SocketAddr {
    fn ip(self) -> IpAddr {
        Self::ip(&self)
    }

    fn origin(self) -> String {
        format!("tcp {self}")
    }
}

impl Peer for UnixPeer {
    fn ip(self) -> IpAddr {
        Ipv4Addr::LOCALHOST.into()
    }

    fn origin(self) -> String {
        match self.0 {
            Some(cred) => format!("unix uid={} pid={}", cred.uid(), cred.pid().unwrap_or_default()),
            None => "unix".to_owned(),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use tokio::{
        io::{AsyncReadExt, AsyncWriteExt, DuplexStream},
        sync::{Mutex, Semaphore, mpsc},
    };

    use super::*;

    type Accepted = io::Result<DuplexStream>;

    /// Accepts what a test sends.
    struct Script(Mutex<mpsc::UnboundedReceiver<Accepted>>);

    impl Script {
        fn new() -> (mpsc::UnboundedSender<Accepted>, Self) {
            let (sender, receiver) = mpsc::unbounded_channel();
            (sender, Self(Mutex::new(receiver)))
        }

        /// Fails with each of these codes, and then accepts a connection.
        fn failing(codes: impl IntoIterator<Item = i32>) -> (DuplexStream, Self) {
            let (sender, script) = Self::new();
            for code in codes {
                sender.send(Err(io::Error::from_raw_os_error(code))).unwrap();
            }
            let (near, far) = tokio::io::duplex(1);
            sender.send(Ok(near)).unwrap();
            (far, script)
        }
    }

    impl Listener for Script {
        type Socket = DuplexStream;
        type Peer = SocketAddr;

        async fn accept(&self) -> io::Result<(DuplexStream, SocketAddr)> {
            let Some(next) = self.0.lock().await.recv().await else { return std::future::pending().await };
            next.map(|socket| (socket, SocketAddr::from(([192, 0, 2, 1], 1000))))
        }

        fn tune(_: &DuplexStream, _: Tuning) {}
    }

    async fn echo<S: AsyncRead + AsyncWrite + Unpin>(mut socket: S) {
        let (mut read, mut write) = tokio::io::split(&mut socket);
        let _ = tokio::io::copy(&mut read, &mut write).await;
    }

    #[tokio::test(start_paused = true)]
    async fn errors_of_one_connection_hold_up_nobody() {
        let (_far, script) = Script::failing([libc::ECONNABORTED, libc::EPROTO, libc::EHOSTUNREACH]);
        let began = Instant::now();
        Acceptor::new(script, Tuning::Link).next().await;
        assert_eq!(began.elapsed(), Duration::ZERO);
    }

    #[tokio::test(start_paused = true)]
    async fn a_lack_of_descriptors_is_waited_out_without_spinning() {
        let (_far, script) = Script::failing([[libc::EMFILE; 50], [libc::ENFILE; 50]].concat());
        let began = Instant::now();
        Acceptor::new(script, Tuning::Link).next().await;
        assert!(began.elapsed() >= 100 * PAUSE);
    }

    #[tokio::test(start_paused = true)]
    async fn what_is_not_admitted_is_closed_and_a_free_permit_admits_the_next() {
        let (connections, script) = Script::new();
        let (permits, tasks) = (Arc::new(Semaphore::new(1)), Tasks::new());
        let semaphore = permits.clone();
        tasks.spawn(Acceptor::new(script, Tuning::Link).serve(
            tasks.clone(),
            move |_| semaphore.clone().try_acquire_owned().ok(),
            |socket, _, permit| async move {
                echo(socket).await;
                drop(permit);
            },
        ));
        let connect = || {
            let (near, far) = tokio::io::duplex(16);
            connections.send(Ok(near)).unwrap();
            far
        };
        let (mut first, mut second) = (connect(), connect());
        assert_eq!(second.read(&mut [0; 1]).await.unwrap(), 0, "a connection beyond the limit is open");
        first.write_all(b"a").await.unwrap();
        assert_eq!(first.read_u8().await.unwrap(), b'a');
        drop(first);
        drop(permits.acquire().await.unwrap());
        let mut third = connect();
        third.write_all(b"b").await.unwrap();
        assert_eq!(third.read_u8().await.unwrap(), b'b');
    }

    #[tokio::test]
    async fn the_loop_and_its_connections_end_with_their_group() {
        let listener = socket::listen("127.0.0.1:0".parse().unwrap()).unwrap();
        let address = listener.local_addr().unwrap();
        let (root, connections) = (Tasks::new(), Tasks::new());
        let acceptor = Acceptor::new(listener, Tuning::Link);
        let serving = acceptor.serve(connections.clone(), |_| Some(()), |socket, _, ()| echo(socket));
        let accepting = root.spawn(serving);
        let mut socket = TcpStream::connect(address).await.unwrap();
        socket.write_all(b"a").await.unwrap();
        assert_eq!(socket.read_u8().await.unwrap(), b'a');
        connections.drain(Duration::ZERO).await;
        assert_eq!(accepting.await.unwrap(), Some(()));
        assert_eq!(socket.read(&mut [0; 1]).await.unwrap_or(0), 0);
        assert!(TcpStream::connect(address).await.is_err(), "the listener is still open");
    }

    #[tokio::test]
    async fn accepted_sockets_send_small_messages_at_once() {
        for tuning in [Tuning::Link, Tuning::Caller] {
            let listener = socket::listen("127.0.0.1:0".parse().unwrap()).unwrap();
            let _client = TcpStream::connect(listener.local_addr().unwrap()).await.unwrap();
            let (socket, peer) = Acceptor::new(listener, tuning).next().await;
            assert!(socket.nodelay().unwrap());
            assert_eq!(peer.origin(), format!("tcp {}", socket.peer_addr().unwrap()));
        }
    }

    #[tokio::test]
    async fn records_name_the_process_at_a_unix_socket() {
        let directory = std::env::temp_dir().join(format!("accept-{}", std::process::id()));
        let path = directory.join("test.sock");
        let listener = crate::unix::bind(&path, 0o600, None, None).unwrap();
        let _client = UnixStream::connect(&path).await.unwrap();
        let (_, peer) = Acceptor::new(listener, Tuning::Caller).next().await;
        let uid = rustix::process::getuid().as_raw();
        assert_eq!(peer.origin(), format!("unix uid={uid} pid={}", std::process::id()));
        assert!(peer.ip().is_loopback());
        std::fs::remove_dir_all(directory).unwrap();
    }
}
