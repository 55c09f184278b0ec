//! HTTP CONNECT, as kube-apiserver speaks it to its egress proxy.

use std::{sync::Arc, time::Duration};

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
    async fn open<S: CallerSocket>(self, socket: &mut S) -> Option<(Dialled, BytesMut)> {
        let (target, early) = self.read_head(socket).await?;
        match early_data::dial(self.outbound, socket, &target, &self.caller, early).await {
            Ok((dialled, mut early)) => {
                socket.write_all(connect::ESTABLISHED).await.ok()?;
                socket.flush().await.ok()?;
                if early.is_empty() {
                    // An error shows again when the socket is next read.
                    let _ = tokio::time::timeout(HEAD_START, socket.read_buf(&mut early)).await;
                }
                if early.is_empty() {
                    early = BytesMut::new();
                }
                Some((dialled, early))
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
    use std::sync::Mutex;

    use proto_net::{
        dialer::{Connection, DialFuture, Dialer, Origin},
        tasks::Tasks,
    };
    use tokio::{
        io::DuplexStream,
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

    /// A caller whose request leads to a target that has sent [`GREETING`].
    async fn call(request: &[u8]) -> (DuplexStream, TcpStream, Tasks) {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let near = TcpStream::connect(listener.local_addr().unwrap()).await.unwrap();
        let (mut target, _) = listener.accept().await.unwrap();
        target.write_all(GREETING).await.unwrap();
        near.readable().await.unwrap();
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
        tasks.spawn(Arc::new(HttpConnect(outbound)).serve(far, who));
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
            let (mut caller, mut target, _tasks) = call(REQUEST).await;
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
        let (mut caller, mut target, _tasks) = call(&[REQUEST, b"early"].concat()).await;
        let mut early = [0; 5];
        target.read_exact(&mut early).await.unwrap();
        let mut heard = vec![0; connect::ESTABLISHED.len() + GREETING.len()];
        caller.read_exact(&mut heard).await.unwrap();
        assert_eq!((&early, heard), (b"early", [connect::ESTABLISHED, GREETING].concat()));
    }
}
