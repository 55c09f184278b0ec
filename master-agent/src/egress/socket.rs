//! The kinds of socket that callers connect with.

use std::{net::IpAddr, time::Duration};

use tokio::{
    io::{AsyncRead, AsyncWrite, Interest},
    net::{TcpStream, UnixStream},
};
use tokio_rustls::server::TlsStream;

/// What differs between the kinds of socket.
pub trait CallerSocket: AsyncRead + AsyncWrite + Unpin + Send + 'static {
    /// Returns the reading and the writing half, which share no lock if the kind of socket allows that.
    fn halves(self) -> (impl AsyncRead + Unpin + Send, impl AsyncWrite + Unpin + Send);

    /// Completes once a caller that has ended its sending direction has closed the other direction, too.
    fn closed_after_eof(&self) -> impl Future<Output = ()> + Send;

    /// Returns the caller's address, or `None` on a Unix socket.
    fn peer(&self) -> Option<IpAddr>;
}

impl CallerSocket for UnixStream {
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

    fn peer(&self) -> Option<IpAddr> {
        None
    }
}

impl CallerSocket for TlsStream<TcpStream> {
    fn halves(self) -> (impl AsyncRead + Unpin + Send, impl AsyncWrite + Unpin + Send) {
        tokio::io::split(self)
    }

    /// TCP does not show whether a peer still reads, so a caller that ends its TLS session before the answer counts as
    /// gone.
    async fn closed_after_eof(&self) {}

    fn peer(&self) -> Option<IpAddr> {
        self.get_ref().0.peer()
    }
}

impl CallerSocket for TcpStream {
    fn halves(self) -> (impl AsyncRead + Unpin + Send, impl AsyncWrite + Unpin + Send) {
        self.into_split()
    }

    /// TCP does not show whether a peer still reads, so a caller that ends its sending direction before the answer
    /// counts as gone.
    async fn closed_after_eof(&self) {}

    fn peer(&self) -> Option<IpAddr> {
        self.peer_addr().ok().map(|peer| peer.ip().to_canonical())
    }
}

#[cfg(test)]
impl CallerSocket for tokio::io::DuplexStream {
    fn halves(self) -> (impl AsyncRead + Unpin + Send, impl AsyncWrite + Unpin + Send) {
        tokio::io::split(self)
    }

    async fn closed_after_eof(&self) {}

    fn peer(&self) -> Option<IpAddr> {
        None
    }
}
