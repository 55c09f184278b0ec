//! The kinds of socket that callers connect with.

use std::{net::IpAddr, time::Duration};

use tokio::{
    io::{AsyncRead, AsyncWrite, Interest},
    net::{TcpStream, UnixStream},
};
use tokio_rustls::server::TlsStream;

/// What differs between the kinds of socket.
pub trait CallerSocket: AsyncRead + AsyncWrite + Unpin + Send + 'static {
    /// The reading and the writing half, without a lock where the kind of socket allows it.
    fn halves(self) -> (impl AsyncRead + Unpin + Send, impl AsyncWrite + Unpin + Send);

    /// After the caller has ended its sending direction: completes once it has closed the other one, too.
    fn closed_after_eof(&self) -> impl Future<Output = ()> + Send;

    /// The caller's address; `None` on a Unix socket.
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

    /// TCP does not tell, so a caller that ends its TLS session before the answer counts as gone.
    async fn closed_after_eof(&self) {}

    fn peer(&self) -> Option<IpAddr> {
        self.get_ref().0.peer()
    }
}

impl CallerSocket for TcpStream {
    fn halves(self) -> (impl AsyncRead + Unpin + Send, impl AsyncWrite + Unpin + Send) {
        self.into_split()
    }

    /// TCP does not tell, so a caller that ends its sending direction before the answer counts as gone.
    async fn closed_after_eof(&self) {}

    fn peer(&self) -> Option<IpAddr> {
        self.peer_addr().ok().map(|peer| peer.ip().to_canonical())
    }
}
