//! What every TCP socket of the agents is set to.

use std::{io, net::SocketAddr, time::Duration};

use socket2::{SockRef, TcpKeepalive};
use tokio::net::{TcpListener, TcpSocket, TcpStream};

/// Bytes that a caller's socket may hold unsent. With more, a slow caller would seem to take nothing for long and
/// then very much.
const UNSENT: u32 = 256 * 1024;

/// Connections that may wait to be accepted, as far as the kernel lets them (`net.core.somaxconn`). Of a burst beyond
/// that it forgets some, who learn of it only when they say something.
pub(super) const BACKLOG: u32 = 4096;

const PRIVILEGED_PORT: &str = "permission denied: ports below 1024 need the capability CAP_NET_BIND_SERVICE, which \
    the drop-in privileged-port.conf gives the systemd unit (deploy/systemd)";

/// Listens, also where connections of an earlier process linger.
pub fn listen(address: SocketAddr) -> io::Result<TcpListener> {
    let socket = if address.is_ipv4() { TcpSocket::new_v4()? } else { TcpSocket::new_v6()? };
    socket.set_reuseaddr(true)?;
    socket.bind(address).map_err(|e| {
        if e.kind() == io::ErrorKind::PermissionDenied && address.port() < 1024 {
            io::Error::new(e.kind(), PRIVILEGED_PORT)
        } else {
            e
        }
    })?;
    socket.listen(BACKLOG)
}

/// As [`tune`], for the sockets of callers.
pub fn tune_caller(socket: &TcpStream) {
    tune(socket);
    let _ = SockRef::from(socket).set_tcp_notsent_lowat(UNSENT);
}

/// Sends small messages at once, and finds out within two minutes that an idle peer is gone for good.
pub fn tune(socket: &TcpStream) {
    let keepalive = TcpKeepalive::new()
        .with_time(Duration::from_secs(60))
        .with_interval(Duration::from_secs(15))
        .with_retries(4);
    // A socket that fails here fails at its next use, and says so there.
    let _ = socket.set_nodelay(true);
    let _ = SockRef::from(socket).set_tcp_keepalive(&keepalive);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_burst_of_silent_connections_is_accepted_to_the_last() {
        let most =
            std::fs::read_to_string("/proc/sys/net/core/somaxconn").unwrap().trim().parse::<usize>().unwrap();
        let listener = listen("127.0.0.1:0".parse().unwrap()).unwrap();
        let address = listener.local_addr().unwrap();
        let burst = async {
            let mut silent = Vec::new();
            for _ in 0..most.min(400) {
                silent.push(TcpStream::connect(address).await.unwrap());
            }
            for _ in &silent {
                listener.accept().await.unwrap();
            }
        };
        tokio::time::timeout(Duration::from_secs(20), burst).await.unwrap();
    }
}
