//! The kinds of socket that callers come by.

use std::{net::IpAddr, time::Duration};

use tokio::{
    io::{AsyncRead, AsyncWrite, Interest},
    net::{TcpStream, UnixStream},
};
use tokio_rustls::server::TlsStream;

/// What differs between the kinds of socket.
pub trait Socket: AsyncRead + AsyncWrite + Unpin + Send + 'static {
    /// Reading and writing halves without a lock where the kind has them.
    fn halves(self) -> (impl AsyncRead + Unpin + Send, impl AsyncWrite + Unpin + Send);

    /// After the end of what the caller sends: completes once it has closed the other direction too.
    fn closed_after_eof(&self) -> impl Future<Output = ()> + Send;

    /// The caller's address; none on a Unix socket.
    fn peer(&self) -> Option<IpAddr>;
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

    fn peer(&self) -> Option<IpAddr> {
        None
    }
}

impl Socket for TlsStream<TcpStream> {
    fn halves(self) -> (impl AsyncRead + Unpin + Send, impl AsyncWrite + Unpin + Send) {
        tokio::io::split(self)
    }

    /// TCP does not tell; a caller that ends its TLS session before the answer has left.
    async fn closed_after_eof(&self) {}

    fn peer(&self) -> Option<IpAddr> {
        self.get_ref().0.peer()
    }
}

impl Socket for TcpStream {
    fn halves(self) -> (impl AsyncRead + Unpin + Send, impl AsyncWrite + Unpin + Send) {
        self.into_split()
    }

    /// TCP does not tell; a caller that ends its half before the answer has left.
    async fn closed_after_eof(&self) {}

    fn peer(&self) -> Option<IpAddr> {
        self.peer_addr().ok().map(|peer| peer.ip().to_canonical())
    }
}
