//! HTTP CONNECT, as kube-apiserver speaks it to its egress proxy.

use std::{
    io,
    pin::Pin,
    sync::Arc,
    task::{Context, Poll},
    time::Duration,
};

use bytes::{Buf, BytesMut};
use proto::{
    DialError, Target,
    connect::{self, HeadError},
    io::dialer::Connection,
};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWriteExt, ReadBuf};

use super::{Caller, Common, FrontDoor, listen::Socket};

/// Bytes a caller may send before the dial has been answered.
const EARLY: usize = 64 * 1024;
/// How long a refused caller has to read its refusal.
const LINGER: Duration = Duration::from_secs(2);

/// The front door.
pub struct HttpConnect(pub Common);

/// One accepted connection.
struct Call<'a> {
    common: &'a Common,
    caller: &'a Caller,
}

impl FrontDoor for HttpConnect {
    fn common(&self) -> &Common {
        &self.0
    }

    async fn serve<S: Socket>(self: Arc<Self>, mut socket: S, caller: Caller) {
        // Boxed, so that a long-lived stream does not keep the room that the beginning needed.
        let begun = Box::pin(Call { common: &self.0, caller: &caller }.begin(&mut socket)).await;
        if let Some((target, connection, early)) = begun {
            let (read, write) = socket.halves();
            self.0.relay(WithEarly { early, inner: read }, write, connection, target, caller).await;
        }
    }
}

impl Call<'_> {
    /// Up to the answer: the connection if it was 200, and what the caller has sent already.
    async fn begin<S: Socket>(&self, socket: &mut S) -> Option<(Target, Connection, BytesMut)> {
        let (target, early) = self.read_head(socket).await?;
        match self.dial(socket, &target, early).await {
            Ok((connection, early)) => {
                socket.write_all(connect::ESTABLISHED).await.ok()?;
                socket.flush().await.ok()?;
                Some((target, connection, early))
            }
            Err(error) => {
                self.common.dial_failed(&target, self.caller, &error);
                if error != DialError::Cancelled {
                    let refusal = connect::refusal(connect::dial_status(&error), &error.to_string());
                    answer(socket, &refusal).await;
                }
                None
            }
        }
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
        let error = match tokio::time::timeout(self.common.head_timeout, read).await {
            Ok(Some(Ok(target))) => return Some((target, head)),
            Ok(Some(Err(error))) => error,
            // Nobody there to be answered.
            Ok(None) => return None,
            Err(_) => HeadError::Timeout,
        };
        self.common.bad_request(self.caller.door, &self.caller.origin, &error);
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
        let dial = self.common.dial(target, self.caller);
        tokio::select! {
            biased;
            connection = dial => connection.map(|connection| (connection, early)),
            () = gone(socket, &mut early) => Err(DialError::Cancelled),
        }
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
