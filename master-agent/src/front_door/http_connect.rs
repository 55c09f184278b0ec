//! HTTP CONNECT on a Unix socket, and on TCP with mutual TLS.

use std::{
    io,
    pin::Pin,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    task::{Context, Poll},
    time::{Duration, Instant},
};

use bytes::{Buf, BytesMut};
use proto::{
    DialError, Fault, Target,
    connect::{self, HeadError},
    io::{
        admin::accept_error,
        dialer::{Connection, Dialer, Origin},
        handshake::Places,
        relay::relay,
        socket,
        tasks::Tasks,
    },
};
use rustls::pki_types::CertificateDer;
use tokio::{
    io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt, Interest, ReadBuf},
    net::{TcpListener, TcpStream, UnixListener, UnixStream},
    sync::{OwnedSemaphorePermit, Semaphore},
};
use tokio_rustls::{TlsAcceptor, server::TlsStream};

use crate::metrics::{Door, DoorDirection, Metrics, Outcome};

/// Bytes a caller may send before the dial has been answered.
const EARLY: usize = 64 * 1024;
/// How long a refused caller has to read its refusal.
const LINGER: Duration = Duration::from_secs(2);
/// TLS handshakes at once.
const HANDSHAKES: usize = 256;

/// What both listeners share.
pub struct HttpConnect {
    pub dialer: Arc<dyn Dialer>,
    pub metrics: Metrics,
    pub head_timeout: Duration,
    pub half_closed_timeout: Duration,
    /// Callers at once on each listener.
    pub max_connections: usize,
    /// Connections; drained at the end.
    pub connections: Tasks,
}

/// Names in a client certificate that may call; empty allows every certificate of the client CA.
#[derive(Clone, Debug, Default)]
pub struct AllowedNames(pub Vec<String>);

impl HttpConnect {
    /// Accepts from a Unix socket for ever; who may connect is the socket file's mode and owner.
    pub async fn serve_unix(self: Arc<Self>, listener: UnixListener) {
        let permits = Arc::new(Semaphore::new(self.max_connections));
        loop {
            let socket = match listener.accept().await {
                Ok((socket, _)) => socket,
                Err(e) => {
                    accept_error(&e).await;
                    continue;
                }
            };
            let Some(permit) = permit(&permits) else { continue };
            let door = self.clone();
            self.connections.spawn(async move {
                let origin = match socket.peer_cred() {
                    Ok(cred) => {
                        Origin(format!("unix uid={} pid={}", cred.uid(), cred.pid().unwrap_or_default()))
                    }
                    Err(_) => Origin("unix".to_owned()),
                };
                Call { door, name: "connect-unix", origin, _permit: permit }.run(socket).await;
            });
        }
    }

    /// Accepts TLS connections with client certificates for ever.
    pub async fn serve_tls(
        self: Arc<Self>,
        listener: TcpListener,
        acceptor: TlsAcceptor,
        allowed: AllowedNames,
    ) {
        let allowed = Arc::new(allowed);
        // Who has not shown a certificate can't take the places of those who have.
        let permits = Arc::new(Semaphore::new(self.max_connections));
        let handshakes = Places::new(HANDSHAKES);
        loop {
            let (socket, peer) = match listener.accept().await {
                Ok(accepted) => accepted,
                Err(e) => {
                    accept_error(&e).await;
                    continue;
                }
            };
            socket::tune_caller(&socket);
            let place = handshakes.take(peer.ip());
            let (door, acceptor, allowed, permits) =
                (self.clone(), acceptor.clone(), allowed.clone(), permits.clone());
            self.connections.spawn(async move {
                let handshake = Box::pin(tokio::time::timeout(door.head_timeout, acceptor.accept(socket)));
                let tls = tokio::select! {
                    handshake = handshake => match handshake {
                        Ok(Ok(tls)) => tls,
                        Ok(Err(error)) => return door.bad_request("connect-tls", &peer, &error),
                        Err(_) => return door.bad_request("connect-tls", &peer, &"no TLS handshake in time"),
                    },
                    () = place.evicted.cancelled() => {
                        return door.bad_request("connect-tls", &peer, &"gave its place to a newer handshake");
                    }
                };
                drop(place);
                let name = match allowed.check(tls.get_ref().1.peer_certificates()) {
                    Ok(name) => name,
                    Err(error) => return door.bad_request("connect-tls", &peer, &error),
                };
                let Some(permit) = permit(&permits) else { return };
                let origin = Origin(format!("tls {name} {peer}"));
                Call { door, name: "connect-tls", origin, _permit: permit }.run(tls).await;
            });
        }
    }

    fn bad_request(
        &self,
        front_door: &'static str,
        caller: &dyn std::fmt::Display,
        error: &dyn std::fmt::Display,
    ) {
        self.metrics.bad_requests.get_or_create(&Door { front_door }).inc();
        tracing::info!(front_door, %caller, %error, "refused a caller");
    }
}

fn permit(permits: &Arc<Semaphore>) -> Option<OwnedSemaphorePermit> {
    let permit = permits.clone().try_acquire_owned().ok();
    if permit.is_none() {
        tracing::warn!("refused a connection: http_connect.max_connections reached");
    }
    permit
}

impl AllowedNames {
    /// Gives the caller's name for the records.
    fn check(&self, certificates: Option<&[CertificateDer<'_>]>) -> Result<String, String> {
        let first = certificates.and_then(<[_]>::first).ok_or("no client certificate")?;
        let names = certificate_names(first)?;
        if self.0.is_empty() || names.iter().any(|name| self.0.contains(name)) {
            return Ok(names.into_iter().next().unwrap_or_else(|| "without a name".to_owned()));
        }
        Err(format!("certificate for {} is not in http_connect.tls.allowed_names", names.join(", ")))
    }
}

/// The common names of the subject, then the DNS names.
fn certificate_names(der: &CertificateDer<'_>) -> Result<Vec<String>, String> {
    use x509_parser::{extensions::GeneralName, prelude::FromDer};
    let (_, certificate) = x509_parser::certificate::X509Certificate::from_der(der)
        .map_err(|e| format!("client certificate: {e}"))?;
    let common =
        certificate.subject().iter_common_name().filter_map(|cn| cn.as_str().ok().map(str::to_owned));
    let mut names: Vec<String> = common.collect();
    if let Ok(Some(san)) = certificate.subject_alternative_name() {
        for name in &san.value.general_names {
            if let GeneralName::DNSName(dns) = name {
                names.push((*dns).to_owned());
            }
        }
    }
    Ok(names)
}

/// One accepted connection.
struct Call {
    door: Arc<HttpConnect>,
    name: &'static str,
    origin: Origin,
    _permit: OwnedSemaphorePermit,
}

impl Call {
    async fn run<S: Socket>(self, mut socket: S) {
        // Boxed, so that a long-lived stream does not keep the room that the beginning needed.
        let Some((target, early)) = Box::pin(self.read_head(&mut socket)).await else { return };
        let began = Instant::now();
        let (connection, early) = match Box::pin(self.dial(&mut socket, &target, early)).await {
            Ok(dialled) => dialled,
            Err(error) => return Box::pin(self.refuse_dial(socket, &target, &error)).await,
        };
        self.door.metrics.dial_seconds.observe(began.elapsed().as_secs_f64());
        self.count("ok", "none".to_owned());
        if socket.write_all(connect::ESTABLISHED).await.is_err() || socket.flush().await.is_err() {
            return;
        }
        self.relay(socket, target, connection, early).await;
    }

    async fn read_head<S: Socket>(&self, socket: &mut S) -> Option<(Target, BytesMut)> {
        let mut head = BytesMut::with_capacity(1024);
        let read = async {
            loop {
                match connect::parse(&head) {
                    Ok(Some(request)) => {
                        head.advance(request.head_len);
                        return Some(Ok(request.target));
                    }
                    Ok(None) => {}
                    Err(e) => return Some(Err(e)),
                }
                match socket.read_buf(&mut head).await {
                    Ok(0) | Err(_) => return None,
                    Ok(_) => {}
                }
            }
        };
        let error = match tokio::time::timeout(self.door.head_timeout, read).await {
            Ok(Some(Ok(target))) => return Some((target, head)),
            Ok(Some(Err(error))) => error,
            // Nobody there to be answered.
            Ok(None) => return None,
            Err(_) => HeadError::Timeout,
        };
        self.door.bad_request(self.name, &self.origin, &error);
        answer(socket, &connect::refusal(connect::head_status(&error), &error.to_string())).await;
        None
    }

    /// Dials while watching whether the caller is still there.
    async fn dial<S: Socket>(
        &self,
        socket: &mut S,
        target: &Target,
        mut early: BytesMut,
    ) -> Result<(Connection, BytesMut), DialError> {
        let dial = self.door.dialer.dial(target, &self.origin);
        tokio::select! {
            biased;
            connection = dial => connection.map(|connection| (connection, early)),
            () = gone(socket, &mut early) => Err(DialError::Cancelled),
        }
    }

    async fn refuse_dial<S: Socket>(&self, mut socket: S, target: &Target, error: &DialError) {
        self.count(error.kind(), error.fault().to_string());
        let (origin, fault) = (&self.origin, error.fault());
        match fault {
            Fault::Caller | Fault::Policy | Fault::Target => {
                tracing::info!(front_door = self.name, %origin, %target, %error, %fault, "dial failed");
            }
            Fault::Route | Fault::Tunnel => {
                tracing::warn!(front_door = self.name, %origin, %target, %error, %fault, "dial failed");
            }
        }
        if *error != DialError::Cancelled {
            answer(&mut socket, &connect::refusal(connect::dial_status(error), &error.to_string())).await;
        }
    }

    async fn relay<S: Socket>(self, socket: S, target: Target, connection: Connection, early: BytesMut) {
        let began = Instant::now();
        let Connection { stream, node, reason, permit } = connection;
        let streams = self.door.metrics.streams.get_or_create_owned(&Door { front_door: self.name });
        streams.inc();
        let (up, down) = (AtomicU64::new(0), AtomicU64::new(0));
        let (read, write) = socket.halves();
        let read = WithEarly { early, inner: read };
        let outcome = relay(read, write, stream, &up, &down, self.door.half_closed_timeout).await;
        drop(permit);
        streams.dec();
        let (up, down) = (up.load(Ordering::Relaxed), down.load(Ordering::Relaxed));
        for (direction, bytes) in [("up", up), ("down", down)] {
            self.door
                .metrics
                .bytes
                .get_or_create(&DoorDirection { front_door: self.name, direction })
                .inc_by(bytes);
        }
        tracing::info!(
            front_door = self.name,
            origin = %self.origin,
            %target,
            node = node.as_ref().map(|n| n.as_str()),
            route = reason,
            up,
            down,
            seconds = began.elapsed().as_secs_f64(),
            outcome = outcome.kind(),
            "stream ended"
        );
    }

    fn count(&self, result: &'static str, fault: String) {
        self.door.metrics.dials.get_or_create(&Outcome { front_door: self.name, result, fault }).inc();
    }
}

/// Completes when the caller is no longer there; bytes that it sends early are kept.
async fn gone<S: Socket>(socket: &mut S, early: &mut BytesMut) {
    loop {
        if early.len() >= EARLY {
            return std::future::pending().await;
        }
        match socket.read_buf(early).await {
            Ok(0) => return socket.closed_after_eof().await,
            Ok(_) => {}
            Err(_) => return,
        }
    }
}

/// Sends a refusal and gives the caller time to read it: closing a socket with unread bytes resets it.
async fn answer<S: Socket>(socket: &mut S, bytes: &[u8]) {
    let send = async {
        socket.write_all(bytes).await?;
        socket.flush().await?;
        socket.shutdown().await?;
        let mut rest = [0; 1024];
        let mut left = EARLY;
        while left > 0 {
            match socket.read(&mut rest).await? {
                0 => break,
                n => left = left.saturating_sub(n),
            }
        }
        io::Result::Ok(())
    };
    let _ = tokio::time::timeout(LINGER, send).await;
}

/// What differs between the kinds of socket.
trait Socket: AsyncRead + AsyncWrite + Unpin + Send + 'static {
    /// Reading and writing halves without a lock where the kind has them.
    fn halves(self) -> (impl AsyncRead + Unpin + Send, impl AsyncWrite + Unpin + Send);

    /// After the end of what the caller sends: completes once it has closed the other direction too.
    fn closed_after_eof(&self) -> impl Future<Output = ()> + Send;
}

impl Socket for UnixStream {
    fn halves(self) -> (impl AsyncRead + Unpin + Send, impl AsyncWrite + Unpin + Send) {
        self.into_split()
    }

    async fn closed_after_eof(&self) {
        loop {
            match self.ready(Interest::WRITABLE).await {
                Ok(ready) if !ready.is_write_closed() => tokio::time::sleep(Duration::from_millis(100)).await,
                Ok(_) | Err(_) => return,
            }
        }
    }
}

impl Socket for TlsStream<TcpStream> {
    fn halves(self) -> (impl AsyncRead + Unpin + Send, impl AsyncWrite + Unpin + Send) {
        tokio::io::split(self)
    }

    /// TCP does not tell; a caller that ends its TLS session before the answer has left.
    async fn closed_after_eof(&self) {}
}

/// Gives the bytes that came with the head before those that follow.
struct WithEarly<R> {
    early: BytesMut,
    inner: R,
}

impl<R: AsyncRead + Unpin> AsyncRead for WithEarly<R> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        if self.early.is_empty() {
            return Pin::new(&mut self.inner).poll_read(cx, buf);
        }
        let n = self.early.len().min(buf.remaining());
        buf.put_slice(&self.early.split_to(n));
        if self.early.is_empty() {
            self.early = BytesMut::new();
        }
        Poll::Ready(Ok(()))
    }
}
