//! The byte stream below an SSH session, in the form that russh needs.
//!
//! russh writes and reads in one loop and does not read while a write waits. With bulk data in both directions, both ends
//! would wait for the other to read: a deadlock. [`Link`] therefore accepts every write at once, keeps what the socket
//! does not take, and hands it over whenever it is polled for either direction. [`Gate`] bounds that backlog: whoever
//! produces data reserves room there first.

use std::{
    io,
    pin::Pin,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    task::{Context, Poll, Waker, ready},
    time::Duration,
};

use bytes::{Buf, BytesMut};
use tokio::{
    io::{AsyncRead, AsyncWrite, ReadBuf},
    time::Sleep,
};
use tokio_util::sync::{CancellationToken, WaitForCancellationFutureOwned};

use super::{burst::Burst, gate::Gate};

/// How long a link that is being closed waits for the socket to take more of the backlog.
const CLOSING: Duration = Duration::from_secs(1);
/// The largest backlog, which is only reached by a fault. The link then fails.
const LIMIT: usize = 64 * 1024 * 1024;
/// The size of the buffer that serves small reads, such as that of an SSH packet's length.
const READ_BUFFER: usize = 8 * 1024;

/// A byte stream between the agents on which writing never waits.
pub struct Link<T: AsyncRead + AsyncWrite + Unpin> {
    inner: T,
    read: BytesMut,
    backlog: BytesMut,
    /// The socket may hold bytes itself, as TLS does, and was not flushed since they were written.
    unflushed: bool,
    gate: Gate,
    received: Arc<AtomicUsize>,
    burst: Burst,
    /// The length of the backlog when the socket last took some of it, while the link is being closed, and the time left.
    closing: Option<(usize, Pin<Box<Sleep>>)>,
    cut: Pin<Box<WaitForCancellationFutureOwned>>,
}

impl<T: AsyncRead + AsyncWrite + Unpin> Link<T> {
    /// Cancelling `cut` ends the link, and with it the SSH session that russh runs on it. `received` counts the bytes of
    /// small reads, which are what a handshake consists of.
    pub fn new(inner: T, cut: CancellationToken, received: Arc<AtomicUsize>) -> (Self, Gate) {
        let gate = Gate::default();
        let link = Self {
            inner,
            read: BytesMut::new(),
            backlog: BytesMut::new(),
            unflushed: false,
            gate: gate.clone(),
            received,
            burst: Burst::default(),
            closing: None,
            cut: Box::pin(cut.cancelled_owned()),
        };
        (link, gate)
    }

    /// Hands over as much of the backlog as the socket takes without waiting, and flushes the socket after that.
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
            self.gate.set_backlog(self.backlog.len());
            self.note_sent(n);
        }
        if self.unflushed {
            ready!(Pin::new(&mut self.inner).poll_flush(cx))?;
            self.unflushed = false;
        }
        Poll::Ready(Ok(()))
    }

    /// Notes that the socket has taken bytes.
    fn note_sent(&mut self, bytes: usize) {
        self.unflushed = true;
        if let Some(traffic) = self.gate.traffic() {
            traffic.on_sent();
        }
        self.gate.release(bytes);
    }

    /// Notes that something has come.
    fn note_received(&self) {
        if let Some(traffic) = self.gate.traffic() {
            traffic.on_received();
        }
    }

    fn read_some(&mut self, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        if self.read.is_empty() {
            if buf.remaining() >= READ_BUFFER {
                ready!(Pin::new(&mut self.inner).poll_read(cx, buf))?;
                self.note_received();
                return Poll::Ready(Ok(()));
            }
            self.read.reserve(READ_BUFFER);
            let poll = tokio_util::io::poll_read_buf(Pin::new(&mut self.inner), cx, &mut self.read);
            match ready!(poll)? {
                0 => return Poll::Ready(Ok(())),
                n => self.received.fetch_add(n, Ordering::Relaxed),
            };
            self.note_received();
        }
        let n = buf.remaining().min(self.read.len());
        buf.put_slice(&self.read.split_to(n));
        Poll::Ready(Ok(()))
    }
}

impl<T: AsyncRead + AsyncWrite + Unpin> Drop for Link<T> {
    fn drop(&mut self) {
        // The backlog may end with SSH_MSG_DISCONNECT, which says why.
        let _ = self.drain(&mut Context::from_waker(Waker::noop()));
        self.gate.close();
    }
}

impl<T: AsyncRead + AsyncWrite + Unpin> AsyncRead for Link<T> {
    fn poll_read(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let this = self.get_mut();
        if this.cut.as_mut().poll(cx).is_ready() {
            return Poll::Ready(Err(io::Error::new(
                io::ErrorKind::ConnectionAborted,
                "the link was cut on purpose",
            )));
        }
        if let Poll::Ready(Err(e)) = this.drain(cx) {
            return Poll::Ready(Err(e));
        }
        ready!(this.burst.poll_pause(cx));
        let before = buf.filled().len();
        let read = this.read_some(cx, buf);
        this.burst.add(buf.filled().len() - before);
        read
    }
}

impl<T: AsyncRead + AsyncWrite + Unpin> AsyncWrite for Link<T> {
    fn poll_write(self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        let this = self.get_mut();
        if this.backlog.len() + bytes.len() > LIMIT {
            return Poll::Ready(Err(io::Error::other("the peer has stopped reading the link")));
        }
        if !this.backlog.is_empty()
            && let Poll::Ready(Err(e)) = this.drain(cx)
        {
            return Poll::Ready(Err(e));
        }
        if this.backlog.is_empty()
            && let Poll::Ready(result) = Pin::new(&mut this.inner).poll_write(cx, bytes)
        {
            return Poll::Ready(result.inspect(|n| {
                this.note_sent(*n);
                this.burst.add(*n);
            }));
        }
        this.burst.add(bytes.len());
        this.backlog.extend_from_slice(bytes);
        this.gate.set_backlog(this.backlog.len());
        Poll::Ready(Ok(bytes.len()))
    }

    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let this = self.get_mut();
        match this.drain(cx) {
            Poll::Ready(Err(e)) => Poll::Ready(Err(e)),
            Poll::Ready(Ok(())) | Poll::Pending => this.burst.poll_pause(cx).map(Ok),
        }
    }

    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let this = self.get_mut();
        // A peer that is dead or does not read must not keep the link open.
        while this.cut.as_mut().poll(cx).is_pending() && this.drain(cx)?.is_pending() {
            let left = this.backlog.len();
            match &mut this.closing {
                Some((before, timer)) if *before == left => {
                    ready!(timer.as_mut().poll(cx));
                    break;
                }
                closing => *closing = Some((left, Box::pin(tokio::time::sleep(CLOSING)))),
            }
        }
        Pin::new(&mut this.inner).poll_shutdown(cx)
    }
}

#[cfg(test)]
mod tests {
    use tokio::io::{AsyncReadExt, AsyncWriteExt};

    use super::*;
    use crate::{gate::ROOM, keep_alive::Pings};

    #[tokio::test]
    async fn takes_writes_that_the_socket_does_not_and_delivers_them_while_reading() {
        let (near, mut far) = tokio::io::duplex(1000);
        let (mut link, gate) = Link::new(near, CancellationToken::new(), Arc::default());
        let sent: Vec<u8> = (0..1_000_000u32).map(|i| (i / 7) as u8).collect();
        let mut turn = gate.turn();
        gate.reserve(&mut turn, ROOM).await.unwrap().used();
        link.write_all(&sent).await.unwrap();
        link.flush().await.unwrap();
        assert!(tokio::time::timeout(Duration::from_millis(1), gate.reserve(&mut turn, ROOM)).await.is_err());

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
        let (got, answer, reserved) = tokio::join!(reader, driver, gate.reserve(&mut turn, ROOM));
        assert!(got == sent && reserved.is_some());
        assert_eq!(&answer, b"done");
    }

    #[tokio::test]
    async fn what_the_socket_holds_itself_leaves_while_nothing_more_is_written() {
        let (near, mut far) = tokio::io::duplex(1000);
        let near = tokio::io::BufWriter::with_capacity(5000, near);
        let (mut link, _gate) = Link::new(near, CancellationToken::new(), Arc::default());
        link.write_all(&[7; 4000]).await.unwrap();
        link.flush().await.unwrap();
        let reader = async {
            far.read_exact(&mut [0; 4000]).await.unwrap();
            far.write_all(b"done").await.unwrap();
        };
        let mut answer = [0; 4];
        let (read, ()) = tokio::join!(link.read_exact(&mut answer), reader);
        read.unwrap();
        assert_eq!(&answer, b"done");
    }

    #[tokio::test(start_paused = true)]
    async fn what_passes_keeps_the_link_alive() {
        const QUIET: Duration = Duration::from_secs(6);
        let (near, mut far) = tokio::io::duplex(1000);
        let (mut link, gate) = Link::new(near, CancellationToken::new(), Arc::default());
        gate.keep_alive(QUIET);
        let mut pings = Pings::new(gate.traffic().cloned());
        pings.due().await;
        for _ in 0..4 {
            tokio::time::sleep(QUIET / 2).await;
            link.write_all(b"?").await.unwrap();
            far.read_u8().await.unwrap();
            far.write_all(b"!").await.unwrap();
            link.read_u8().await.unwrap();
            assert!(tokio::time::timeout(Duration::ZERO, pings.due()).await.is_err());
        }
        let began = tokio::time::Instant::now();
        pings.due().await;
        let (waited, second) = (began.elapsed(), Duration::from_secs(1));
        assert!(waited > QUIET - second && waited < QUIET + second, "{waited:?}");
    }

    #[tokio::test]
    async fn what_is_left_leaves_with_the_link() {
        let (near, mut far) = tokio::io::duplex(10);
        let (mut link, _gate) = Link::new(near, CancellationToken::new(), Arc::default());
        link.write_all(b"0123456789bye").await.unwrap();
        let mut got = [0; 10];
        far.read_exact(&mut got).await.unwrap();
        drop(link);
        assert_eq!(far.read(&mut got).await.unwrap(), 3);
    }

    #[tokio::test(start_paused = true)]
    async fn closing_waits_for_a_peer_that_reads_and_not_for_one_that_does_not() {
        let (near, mut far) = tokio::io::duplex(10);
        let (mut link, _gate) = Link::new(near, CancellationToken::new(), Arc::default());
        link.write_all(&[7; 100]).await.unwrap();
        let slow = async {
            let mut got = Vec::new();
            while got.len() < 50 {
                tokio::time::sleep(CLOSING / 2).await;
                got.push(far.read_u8().await.unwrap());
            }
            got.len()
        };
        let began = tokio::time::Instant::now();
        let (closed, got) = tokio::join!(link.shutdown(), slow);
        closed.unwrap();
        assert_eq!(got, 50);
        assert!(began.elapsed() >= CLOSING * 25 && began.elapsed() < CLOSING * 28, "{:?}", began.elapsed());
    }
}
