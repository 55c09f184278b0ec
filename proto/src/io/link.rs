//! A link as russh needs it.
//!
//! russh writes and reads in one loop and does not read while a write waits. With bulk data in both
//! directions both ends would wait for the other to read: a deadlock. [`Link`] therefore takes every write at
//! once, keeps what the socket did not take, and hands it over whenever it is polled for either direction.
//! What bounds that backlog is [`Gate`]: whoever produces data waits there first.

use std::{
    io,
    pin::Pin,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    task::{Context, Poll, ready},
};

use bytes::{Buf, BytesMut};
use tokio::{
    io::{AsyncRead, AsyncWrite, ReadBuf},
    sync::Notify,
};
use tokio_util::sync::{CancellationToken, WaitForCancellationFutureOwned};

/// Bytes of backlog above which producers of data wait.
const HIGH_WATER: usize = 512 * 1024;
/// Bytes of backlog at which they go on.
const LOW_WATER: usize = 128 * 1024;
/// A backlog that only a fault can reach; the link fails.
const LIMIT: usize = 64 * 1024 * 1024;
/// Small reads (an SSH packet's length) are served from a buffer of this size.
const READ_BUFFER: usize = 8 * 1024;

/// Says when a link has room for more data.
#[derive(Clone, Debug, Default)]
pub struct Gate(Arc<GateState>);

#[derive(Debug, Default)]
struct GateState {
    backlog: AtomicUsize,
    room: Notify,
}

impl Gate {
    /// Waits until the link's backlog is low. Cancel-safe.
    pub async fn room(&self) {
        while self.0.backlog.load(Ordering::Acquire) > HIGH_WATER {
            let notified = self.0.room.notified();
            if self.0.backlog.load(Ordering::Acquire) <= HIGH_WATER {
                return;
            }
            notified.await;
        }
    }

    fn set(&self, backlog: usize) {
        let before = self.0.backlog.swap(backlog, Ordering::AcqRel);
        if before > LOW_WATER && backlog <= LOW_WATER {
            self.0.room.notify_waiters();
        }
    }
}

/// A byte stream between the agents whose writes never wait.
pub struct Link<T> {
    inner: T,
    read: BytesMut,
    backlog: BytesMut,
    gate: Gate,
    cut: Pin<Box<WaitForCancellationFutureOwned>>,
}

impl<T: AsyncRead + AsyncWrite + Unpin> Link<T> {
    /// Cancelling `cut` ends the link, and with it the SSH session that russh runs on it.
    pub fn new(inner: T, cut: CancellationToken) -> (Self, Gate) {
        let gate = Gate::default();
        let link = Self {
            inner,
            read: BytesMut::new(),
            backlog: BytesMut::new(),
            gate: gate.clone(),
            cut: Box::pin(cut.cancelled_owned()),
        };
        (link, gate)
    }

    /// Hands over as much of the backlog as the socket takes now.
    fn drain(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        while !self.backlog.is_empty() {
            let n = ready!(Pin::new(&mut self.inner).poll_write(cx, &self.backlog))?;
            if n == 0 {
                return Poll::Ready(Err(io::ErrorKind::WriteZero.into()));
            }
            self.backlog.advance(n);
            if self.backlog.is_empty() {
                self.backlog = BytesMut::new();
            }
            self.gate.set(self.backlog.len());
        }
        Poll::Ready(Ok(()))
    }
}

impl<T: AsyncRead + AsyncWrite + Unpin> AsyncRead for Link<T> {
    fn poll_read(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let this = self.get_mut();
        if this.cut.as_mut().poll(cx).is_ready() {
            return Poll::Ready(Err(io::Error::new(io::ErrorKind::ConnectionAborted, "the link was cut on purpose")));
        }
        if let Poll::Ready(Err(e)) = this.drain(cx) {
            return Poll::Ready(Err(e));
        }
        if this.read.is_empty() {
            if buf.remaining() >= READ_BUFFER {
                return Pin::new(&mut this.inner).poll_read(cx, buf);
            }
            this.read.reserve(READ_BUFFER);
            let stream = &mut this.inner;
            let poll = tokio_util::io::poll_read_buf(Pin::new(stream), cx, &mut this.read);
            if ready!(poll)? == 0 {
                return Poll::Ready(Ok(()));
            }
        }
        let n = buf.remaining().min(this.read.len());
        buf.put_slice(&this.read.split_to(n));
        Poll::Ready(Ok(()))
    }
}

impl<T: AsyncRead + AsyncWrite + Unpin> AsyncWrite for Link<T> {
    fn poll_write(self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        let this = self.get_mut();
        if let Poll::Ready(Err(e)) = this.drain(cx) {
            return Poll::Ready(Err(e));
        }
        if this.backlog.is_empty()
            && let Poll::Ready(result) = Pin::new(&mut this.inner).poll_write(cx, bytes)
        {
            return Poll::Ready(result);
        }
        if this.backlog.len() + bytes.len() > LIMIT {
            return Poll::Ready(Err(io::Error::other("the peer has stopped reading the link")));
        }
        this.backlog.extend_from_slice(bytes);
        this.gate.set(this.backlog.len());
        Poll::Ready(Ok(bytes.len()))
    }

    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        match self.get_mut().drain(cx) {
            Poll::Ready(Err(e)) => Poll::Ready(Err(e)),
            Poll::Ready(Ok(())) | Poll::Pending => Poll::Ready(Ok(())),
        }
    }

    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let this = self.get_mut();
        // A peer that does not read must not keep a dead link alive, so the backlog gets one try.
        if let Poll::Ready(Err(e)) = this.drain(cx) {
            return Poll::Ready(Err(e));
        }
        Pin::new(&mut this.inner).poll_shutdown(cx)
    }
}

#[cfg(test)]
mod tests {
    use tokio::io::{AsyncReadExt, AsyncWriteExt};

    use super::*;

    #[tokio::test]
    async fn takes_writes_that_the_socket_does_not_and_delivers_them_while_reading() {
        let (near, mut far) = tokio::io::duplex(1000);
        let (mut link, gate) = Link::new(near, CancellationToken::new());
        let sent: Vec<u8> = (0..1_000_000u32).map(|i| (i / 7) as u8).collect();
        link.write_all(&sent).await.unwrap();
        link.flush().await.unwrap();
        assert!(gate.0.backlog.load(Ordering::Relaxed) > HIGH_WATER);
        assert!(tokio::time::timeout(std::time::Duration::from_millis(1), gate.room()).await.is_err());

        let reader = async {
            let mut got = vec![0; sent.len()];
            far.read_exact(&mut got).await.unwrap();
            far.write_all(b"done").await.unwrap();
            got
        };
        let driver = async {
            let mut answer = [0; 4];
            link.read_exact(&mut answer).await.unwrap();
            answer
        };
        let (got, answer, ()) = tokio::join!(reader, driver, gate.room());
        assert!(got == sent);
        assert_eq!(&answer, b"done");
    }
}
