//! The socket of a link over the front end's port, which is an HTTP connection that has changed its protocol.

use std::{
    io,
    os::fd::AsFd,
    pin::Pin,
    sync::atomic::{AtomicU64, Ordering},
    task::{Context, Poll, ready},
};

use bytes::Bytes;
use hyper::upgrade::Upgraded;
use hyper_util::rt::TokioIo;
use proto_net::{read_ahead::ReadAhead, write_timeout::WriteTimeout};
use tokio::{
    io::{AsyncRead, AsyncWrite, ReadBuf},
    net::TcpStream,
};
use tokio_rustls::server::TlsStream;

use super::recorder::Recorder;
use crate::http::watched::Watched;

/// A caller's connection, as the listener makes it.
pub(super) type TlsSocket<S> = WriteTimeout<TlsStream<ReadAhead<S>>>;

/// A socket that counts its bytes. Dropping it writes the last audit record of the call home.
pub struct LinkSocket {
    socket: Box<dyn Socket>,
    /// Bytes that the node sent before its connection became a link.
    early: Bytes,
    record: Recorder,
}

trait Socket: AsyncRead + AsyncWrite + Unpin + Send {}

impl<S: AsyncRead + AsyncWrite + Unpin + Send> Socket for S {}

impl LinkSocket {
    /// A caller's own connection is registered with the runtime of this task, so that its bytes don't change threads.
    pub(super) fn new(upgraded: Upgraded, record: Recorder) -> io::Result<Self> {
        match upgraded.downcast::<TokioIo<Watched<TlsSocket<TcpStream>>>>() {
            Ok(parts) => {
                let mut socket = parts.io.into_inner();
                register_here(socket.get_mut().get_mut().get_mut().0.get_mut())?;
                Ok(Self { socket: Box::new(socket), early: parts.read_buf, record })
            }
            // It has come through a tunnel.
            Err(upgraded) => {
                Ok(Self { socket: Box::new(TokioIo::new(upgraded)), early: Bytes::new(), record })
            }
        }
    }
}

/// Takes a socket from the runtime that it is registered with.
fn register_here(socket: &mut TcpStream) -> io::Result<()> {
    let descriptor = socket.as_fd().try_clone_to_owned()?;
    *socket = TcpStream::from_std(descriptor.into())?;
    Ok(())
}

fn count(counter: &AtomicU64, bytes: usize) {
    counter.fetch_add(bytes as u64, Ordering::Relaxed);
}

impl AsyncRead for LinkSocket {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let before = buf.filled().len();
        if !self.early.is_empty() {
            let n = self.early.len().min(buf.remaining());
            buf.put_slice(&self.early.split_to(n));
            count(&self.record.carried.up, n);
            return Poll::Ready(Ok(()));
        }
        ready!(Pin::new(&mut self.socket).poll_read(cx, buf))?;
        count(&self.record.carried.up, buf.filled().len() - before);
        Poll::Ready(Ok(()))
    }
}

impl AsyncWrite for LinkSocket {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        let written = ready!(Pin::new(&mut self.socket).poll_write(cx, buf))?;
        count(&self.record.carried.down, written);
        Poll::Ready(Ok(written))
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.socket).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.socket).poll_shutdown(cx)
    }
}
