//! A socket that is read in larger parts than its reader asks for.
//!
//! rustls reads at most 4 KiB at a time, while a TLS record has up to 16 KiB. On a connection that carries much, most of
//! its time would go into system calls.

use std::{
    io::{self, IoSlice},
    pin::Pin,
    task::{Context, Poll, ready},
};

use bytes::BytesMut;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};

/// The most bytes that are read at once.
const BUFFER: usize = 64 * 1024;

/// A socket that reads ahead while more comes than its reader asks for, and that holds no memory otherwise.
pub struct ReadAhead<S> {
    socket: S,
    ahead: BytesMut,
    /// The last read has filled the reader's buffer.
    much: bool,
}

impl<S> ReadAhead<S> {
    pub fn new(socket: S) -> Self {
        Self { socket, ahead: BytesMut::new(), much: false }
    }

    pub fn get_mut(&mut self) -> &mut S {
        &mut self.socket
    }
}

impl<S: AsyncRead + Unpin> AsyncRead for ReadAhead<S> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let Self { socket, ahead, much } = &mut *self;
        let asked = buf.remaining();
        if ahead.is_empty() && !*much {
            ready!(Pin::new(socket).poll_read(cx, buf))?;
            *much = buf.remaining() == 0;
            return Poll::Ready(Ok(()));
        }
        if ahead.is_empty() {
            *ahead = BytesMut::with_capacity(BUFFER);
            let read = tokio_util::io::poll_read_buf(Pin::new(socket), cx, ahead);
            if !matches!(read, Poll::Ready(Ok(1..))) {
                *ahead = BytesMut::new();
            }
            *much = ready!(read)? >= asked;
        }
        let n = asked.min(ahead.len());
        buf.put_slice(&ahead.split_to(n));
        if ahead.is_empty() {
            *ahead = BytesMut::new();
        }
        Poll::Ready(Ok(()))
    }
}

impl<S: AsyncWrite + Unpin> AsyncWrite for ReadAhead<S> {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.socket).poll_write(cx, buf)
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.socket).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.socket).poll_shutdown(cx)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.socket).poll_write_vectored(cx, bufs)
    }

    fn is_write_vectored(&self) -> bool {
        self.socket.is_write_vectored()
    }
}

#[cfg(test)]
mod tests {
    use tokio::io::{AsyncReadExt, AsyncWriteExt};

    use super::*;

    #[tokio::test]
    async fn everything_comes_in_order_and_nothing_is_held_afterwards() {
        let (near, mut far) = tokio::io::duplex(3 * BUFFER);
        let mut socket = ReadAhead::new(near);
        let sent: Vec<u8> = (0..2 * BUFFER + 77).map(|i| (i / 7) as u8).collect();
        far.write_all(&sent).await.unwrap();
        let (mut got, mut part, mut read_ahead) = (Vec::new(), [0; 4096], 0);
        while got.len() < sent.len() {
            let n = socket.read(&mut part).await.unwrap();
            got.extend_from_slice(&part[..n]);
            read_ahead = read_ahead.max(socket.ahead.len());
        }
        assert!(got == sent);
        assert_eq!(read_ahead, BUFFER - part.len());
        assert_eq!(socket.ahead.capacity(), 0);
        // Its reader waits for more.
        assert!(tokio::time::timeout(std::time::Duration::ZERO, socket.read(&mut part)).await.is_err());
        assert_eq!(socket.ahead.capacity(), 0);
        drop(far);
        assert_eq!(socket.read(&mut part).await.unwrap(), 0);
    }

    #[tokio::test]
    async fn small_messages_go_straight_to_their_reader() {
        let (near, mut far) = tokio::io::duplex(4096);
        let mut socket = ReadAhead::new(near);
        for _ in 0..3 {
            far.write_all(b"hello").await.unwrap();
            assert_eq!(socket.read(&mut [0; 4096]).await.unwrap(), 5);
            assert!(!socket.much && socket.ahead.capacity() == 0);
        }
    }
}
