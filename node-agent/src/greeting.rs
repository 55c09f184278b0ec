//! What a master says first on a link that this host has dialled: its SSH identification (RFC 4253 §4.2). russh does not
//! pass it on unless the whole handshake succeeds.
//!
//! Anybody in the master's place can say it, so it decides about the time of the next call alone.

use std::{
    io,
    pin::Pin,
    sync::{Arc, OnceLock},
    task::{Context, Poll, ready},
    time::Duration,
};

use proto::refusal;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};

/// The longest identification in bytes, with its line end.
const MAX_LINE: usize = 255;

/// What a master says first.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Greeting {
    /// It begins a handshake.
    Hello,
    /// It takes no call at the moment. The next one is to come after this time.
    ComeAgain(Duration),
}

/// Knows what was said first on a link.
#[derive(Clone, Debug, Default)]
pub struct Heard(Arc<OnceLock<Greeting>>);

/// A link whose first line is overheard while it is read.
#[derive(Debug)]
pub struct Overheard<T> {
    link: T,
    /// The part of the line that has come; `None` once it is complete.
    line: Option<Vec<u8>>,
    heard: Heard,
}

impl Greeting {
    fn read(line: &[u8]) -> Option<Self> {
        let line = String::from_utf8_lossy(line);
        if !line.starts_with("SSH-") {
            return None;
        }
        Some(refusal::retry_after(&line).map_or(Self::Hello, Self::ComeAgain))
    }
}

impl Heard {
    /// The greeting; `None` if no SSH client has said anything.
    pub fn greeting(&self) -> Option<Greeting> {
        self.0.get().copied()
    }
}

impl<T> Overheard<T> {
    pub fn new(link: T) -> (Self, Heard) {
        let heard = Heard::default();
        (Self { link, line: Some(Vec::new()), heard: heard.clone() }, heard)
    }

    fn hear(&mut self, bytes: &[u8]) {
        let Some(line) = &mut self.line else { return };
        let room = MAX_LINE.saturating_sub(line.len());
        let part = bytes.iter().take(room).take_while(|byte| **byte != b'\n');
        let before = line.len();
        line.extend(part);
        let is_complete = line.len() - before < bytes.len() || line.len() >= MAX_LINE;
        if is_complete
            && let Some(line) = self.line.take()
            && let Some(greeting) = Greeting::read(&line)
        {
            let _ = self.heard.0.set(greeting);
        }
    }
}

impl<T: AsyncRead + Unpin> AsyncRead for Overheard<T> {
    fn poll_read(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let this = self.get_mut();
        let before = buf.filled().len();
        ready!(Pin::new(&mut this.link).poll_read(cx, buf))?;
        if this.line.is_some() {
            this.hear(buf.filled().get(before..).unwrap_or_default());
        }
        Poll::Ready(Ok(()))
    }
}

impl<T: AsyncWrite + Unpin> AsyncWrite for Overheard<T> {
    fn poll_write(self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.get_mut().link).poll_write(cx, bytes)
    }

    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.get_mut().link).poll_flush(cx)
    }

    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.get_mut().link).poll_shutdown(cx)
    }
}

#[cfg(test)]
mod tests {
    use tokio::io::{AsyncReadExt, AsyncWriteExt};

    use super::*;

    /// What is heard of bytes that come in pieces of this size.
    async fn heard(bytes: &[u8], size: usize) -> Option<Greeting> {
        let (near, mut far) = tokio::io::duplex(4096);
        let (mut link, heard) = Overheard::new(near);
        let mut read = Vec::new();
        for piece in bytes.chunks(size) {
            far.write_all(piece).await.unwrap();
            let mut buffer = vec![0; piece.len()];
            link.read_exact(&mut buffer).await.unwrap();
            read.extend(buffer);
        }
        assert_eq!(read, bytes, "the session gets every byte");
        assert!(link.line.is_none_or(|line| line.len() < MAX_LINE));
        heard.greeting()
    }

    #[tokio::test]
    async fn the_first_line_is_heard_in_whatever_pieces_it_comes() {
        let five = Duration::from_secs(5);
        let endless = [b"SSH-2.0-".as_slice(), &[b'x'; 1000]].concat();
        for (bytes, expected) in [
            (refusal::come_again(five), Some(Greeting::ComeAgain(five))),
            (
                b"SSH-2.0-master-agent\r\nSSH-2.0-master-agent retry-after=5\r\n".to_vec(),
                Some(Greeting::Hello),
            ),
            (b"SSH-2.0-OpenSSH_9.9\n\0\0\0\x0c".to_vec(), Some(Greeting::Hello)),
            (endless, Some(Greeting::Hello)),
            (b"SSH-2.0-master-agent".to_vec(), None),
            (b"HTTP/1.1 400 Bad Request\r\nSSH-2.0-master-agent\r\n".to_vec(), None),
            (b"\n\n".to_vec(), None),
        ] {
            for size in [1, 7, 2000] {
                assert_eq!(heard(&bytes, size).await, expected, "{}", String::from_utf8_lossy(&bytes));
            }
        }
    }

    #[tokio::test]
    async fn what_this_side_says_goes_through() {
        let (near, mut far) = tokio::io::duplex(64);
        let (mut link, _) = Overheard::new(near);
        link.write_all(b"SSH-2.0-node-agent\r\n").await.unwrap();
        link.shutdown().await.unwrap();
        let mut read = Vec::new();
        far.read_to_end(&mut read).await.unwrap();
        assert_eq!(read, b"SSH-2.0-node-agent\r\n");
    }
}
