//! HTTP CONNECT, as kube-apiserver speaks it to its egress proxy.

use std::{io, sync::Arc, time::Duration};

use bytes::{Buf, BytesMut};
use proto::{
    DialError, Target,
    connect::{self, HeadError},
};
use tokio::io::{AsyncReadExt, AsyncWriteExt};

use super::{
    early_data::{self, WithEarlyData},
    lingering_close,
    listener::EgressListener,
    outbound::{Dialled, Outbound},
    socket::CallerSocket,
};
use crate::stream::caller::Caller;

/// How long the target's first bytes are kept back for a caller that has not spoken. kube-apiserver refuses an answer that
/// it reads together with them, and itself speaks first; callers who let the target speak first, as SSH does, wait this
/// long. A process that the kernel throttles (cgroup v2 `cpu.max`, periods of 100 ms) still reads the answer alone.
const HEAD_START: Duration = Duration::from_millis(250);

/// The egress listener.
pub struct HttpConnect(pub Outbound);

/// One accepted connection.
struct Call<'a> {
    outbound: &'a Outbound,
    caller: Caller,
}

impl EgressListener for HttpConnect {
    fn outbound(&self) -> &Outbound {
        &self.0
    }

    async fn serve<S: CallerSocket>(self: Arc<Self>, mut socket: S, caller: Caller) {
        // Boxed, so that a long-lived stream does not keep the memory of the handshake.
        let opened = Box::pin(Call { outbound: &self.0, caller }.open(&mut socket)).await;
        if let Some((dialled, early)) = opened {
            let (read, write) = socket.halves();
            self.0.relay(WithEarlyData { early, inner: read }, write, dialled).await;
        }
    }
}

impl Call<'_> {
    /// Reads the request, dials and answers. Returns the connection and the caller's early data if the answer was 200.
    async fn open<S: CallerSocket>(self, socket: &mut S) -> Option<(Dialled, io::Result<BytesMut>)> {
        let (target, early) = self.read_head(socket).await?;
        match early_data::dial(self.outbound, socket, &target, &self.caller, early).await {
            Ok((dialled, mut early)) => {
                socket.write_all(connect::ESTABLISHED).await.ok()?;
                socket.flush().await.ok()?;
                if early.is_empty() {
                    let read = tokio::time::timeout(HEAD_START, socket.read_buf(&mut early)).await;
                    if let Ok(Err(error)) = read {
                        return Some((dialled, Err(error)));
                    }
                }
                if early.is_empty() {
                    early = BytesMut::new();
                }
                Some((dialled, Ok(early)))
            }
            Err(error) => {
                self.outbound.dial_failed(&target, &self.caller, &error);
                if error != DialError::Cancelled {
                    let refusal = connect::refusal(connect::dial_status(&error), &error.to_string());
                    lingering_close::refuse(socket, &refusal).await;
                }
                None
            }
        }
    }

    async fn read_head<S: CallerSocket>(&self, socket: &mut S) -> Option<(Target, BytesMut)> {
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
        let error = match tokio::time::timeout(self.outbound.limits.head_timeout, read).await {
            Ok(Some(Ok(target))) => return Some((target, head)),
            Ok(Some(Err(error))) => error,
            // The caller has left.
            Ok(None) => return None,
            Err(_) => HeadError::Timeout,
        };
        self.outbound.bad_request(self.caller.listener, &self.caller.origin, &error);
        let refusal = connect::refusal(connect::head_status(&error), &error.to_string());
        lingering_close::refuse(socket, &refusal).await;
        None
    }
}

#[cfg(test)]
mod tests {
    use std::{
        pin::Pin,
        sync::Mutex,
        task::{Context, Poll, ready},
    };

    use proto_net::{
        dialer::{Connection, DialFuture, Dialer, Origin},
        tasks::Tasks,
    };
    use tokio::{
        io::{AsyncRead, AsyncWrite, DuplexStream, ReadBuf},
        net::{TcpListener, TcpStream},
        time::Instant,
    };

    use super::*;
    use crate::{
        egress::outbound::CallerLimits, stream::metrics::StreamMetrics, tunnels::registry::Registry,
    };

    const GREETING: &[u8] = b"SSH-2.0-target\r\n";
    const LIMIT: Duration = Duration::from_secs(600);

    /// Dials a connection that there is already.
    struct Ready(Mutex<Option<TcpStream>>);

    impl Dialer for Ready {
        fn dial<'a>(&'a self, _: &'a Target, _: &'a Origin) -> DialFuture<'a> {
            let stream = self.0.lock().unwrap().take().unwrap().into();
            Box::pin(async { Ok(Connection { stream, node: None, reason: "test".to_owned(), permit: None }) })
        }
    }

    /// A caller's socket that reports once, as on Linux, that its caller has reset it.
    struct Reset {
        inner: DuplexStream,
        reported: bool,
    }

    impl AsyncRead for Reset {
        fn poll_read(
            mut self: Pin<&mut Self>,
            cx: &mut Context<'_>,
            buf: &mut ReadBuf<'_>,
        ) -> Poll<io::Result<()>> {
            let before = buf.filled().len();
            ready!(Pin::new(&mut self.inner).poll_read(cx, buf))?;
            let ended = buf.filled().len() == before;
            if ended && !std::mem::replace(&mut self.reported, true) {
                return Poll::Ready(Err(io::ErrorKind::ConnectionReset.into()));
            }
            Poll::Ready(Ok(()))
        }
    }

    impl AsyncWrite for Reset {
        fn poll_write(
            mut self: Pin<&mut Self>,
            cx: &mut Context<'_>,
            bytes: &[u8],
        ) -> Poll<io::Result<usize>> {
            Pin::new(&mut self.inner).poll_write(cx, bytes)
        }

        fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
            Pin::new(&mut self.inner).poll_flush(cx)
        }

        fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
            Pin::new(&mut self.inner).poll_shutdown(cx)
        }
    }

    impl CallerSocket for Reset {
        fn halves(self) -> (impl AsyncRead + Unpin + Send, impl AsyncWrite + Unpin + Send) {
            tokio::io::split(self)
        }

        async fn closed_after_eof(&self) {}

        fn peer(&self) -> Option<std::net::IpAddr> {
            None
        }
    }

    /// A caller whose request leads to a target that has sent a greeting.
    async fn call<S: CallerSocket>(
        request: &[u8],
        greeting: &[u8],
        socket: impl FnOnce(DuplexStream) -> S,
    ) -> (DuplexStream, TcpStream, Tasks) {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let near = TcpStream::connect(listener.local_addr().unwrap()).await.unwrap();
        let (mut target, _) = listener.accept().await.unwrap();
        if !greeting.is_empty() {
            target.write_all(greeting).await.unwrap();
            near.readable().await.unwrap();
        }
        let tasks = Tasks::new();
        let outbound = Outbound {
            dialer: Arc::new(Ready(Mutex::new(Some(near)))),
            metrics: StreamMetrics::new(Arc::new(Registry::new(1))),
            limits: CallerLimits { head_timeout: LIMIT, half_closed_timeout: LIMIT, max_connections: 1 },
            tasks: tasks.clone(),
        };
        let (mut caller, far) = tokio::io::duplex(64 * 1024);
        caller.write_all(request).await.unwrap();
        let who = Caller::new("connect-test", Origin("test".to_owned()));
        tasks.spawn(Arc::new(HttpConnect(outbound)).serve(socket(far), who));
        (caller, target, tasks)
    }

    /// What is there to read after everything has had its turn, without any time passing.
    async fn read_at_once(caller: &mut DuplexStream) -> Vec<u8> {
        for _ in 0..10_000 {
            tokio::task::yield_now().await;
        }
        let mut bytes = vec![0; 4096];
        let n = caller.read(&mut bytes).await.unwrap();
        bytes.truncate(n);
        bytes
    }

    const REQUEST: &[u8] = b"CONNECT n1:22 HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n";

    #[tokio::test(start_paused = true)]
    async fn a_target_that_speaks_first_is_heard_after_the_answer_and_never_with_it() {
        // The caller speaks, waits for the target, or has sent early data.
        for speaks in [true, false] {
            let (mut caller, mut target, _tasks) = call(REQUEST, GREETING, |socket| socket).await;
            assert_eq!(read_at_once(&mut caller).await, connect::ESTABLISHED, "{speaks}");
            let began = Instant::now();
            if speaks {
                caller.write_all(b"x").await.unwrap();
                assert_eq!(target.read_u8().await.unwrap(), b'x');
            }
            let mut greeting = [0; GREETING.len()];
            caller.read_exact(&mut greeting).await.unwrap();
            assert_eq!(greeting, GREETING);
            assert_eq!(began.elapsed() >= HEAD_START, !speaks, "{:?}", began.elapsed());
        }
        let request = [REQUEST, b"early"].concat();
        let (mut caller, mut target, _tasks) = call(&request, GREETING, |socket| socket).await;
        let mut early = [0; 5];
        target.read_exact(&mut early).await.unwrap();
        let mut heard = vec![0; connect::ESTABLISHED.len() + GREETING.len()];
        caller.read_exact(&mut heard).await.unwrap();
        assert_eq!((&early, heard), (b"early", [connect::ESTABLISHED, GREETING].concat()));
    }

    #[tokio::test(start_paused = true)]
    async fn a_reset_before_the_first_byte_resets_the_stream() {
        let socket = |inner| Reset { inner, reported: false };
        let (mut caller, _target, tasks) = call(REQUEST, b"", socket).await;
        assert_eq!(read_at_once(&mut caller).await, connect::ESTABLISHED);
        let began = Instant::now();
        drop(caller);
        assert_eq!(tasks.drain(LIMIT).await, 0);
        // Taken for an orderly end, it would leave the target's direction open.
        assert_eq!(began.elapsed(), Duration::ZERO);
    }
}
