//! TCP sockets: how they listen, and the options that they are set to.

use std::{io, net::SocketAddr, time::Duration};

use socket2::{SockRef, TcpKeepalive};
use tokio::net::{TcpListener, TcpSocket, TcpStream};

/// The most unsent bytes in a caller's socket. With more, a slow caller would seem to take nothing for a long time and then
/// very much at once.
const UNSENT: u32 = 256 * 1024;
/// The most unsent bytes in the socket of a link. What is there can't be overtaken any more.
const UNSENT_ON_LINK: u32 = 128 * 1024;
/// How long bytes on a link may stay unacknowledged, or the peer's window closed, before the kernel gives the link up. An
/// agent reads its links whatever its streams do.
const UNACKNOWLEDGED_ON_LINK: Duration = Duration::from_secs(9);

/// The most connections that wait to be accepted, if the kernel allows as many (`net.core.somaxconn`). It drops
/// connections of a larger burst, and their peers learn of it only when they send something.
pub(super) const BACKLOG: u32 = 4096;

const PRIVILEGED_PORT: &str = "permission denied: ports below 1024 need the capability CAP_NET_BIND_SERVICE, which \
    the drop-in privileged-port.conf gives the systemd unit (deploy/systemd)";

/// Listens, even if connections of an earlier process linger on the port.
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

/// Sets what [`tune`] sets, and a limit on unsent bytes: for sockets whose bytes are relayed, and for administration.
pub fn tune_caller(socket: &TcpStream) {
    tune(socket);
    let _ = SockRef::from(socket).set_tcp_notsent_lowat(UNSENT);
}

/// Sets what [`tune`] sets, a limit on unsent bytes, and one on the time in which bytes must be acknowledged: for links.
pub fn tune_link(socket: &TcpStream) {
    tune(socket);
    let socket = SockRef::from(socket);
    let _ = socket.set_tcp_notsent_lowat(UNSENT_ON_LINK);
    let _ = socket.set_tcp_user_timeout(Some(UNACKNOWLEDGED_ON_LINK));
}

/// Makes the socket send small messages at once, and detect within two minutes that an idle peer is gone.
pub fn tune(socket: &TcpStream) {
    let keepalive = TcpKeepalive::new()
        .with_time(Duration::from_secs(60))
        .with_interval(Duration::from_secs(15))
        .with_retries(4);
    // A socket on which this fails also fails at its next use, which reports the error.
    let _ = socket.set_nodelay(true);
    let _ = SockRef::from(socket).set_tcp_keepalive(&keepalive);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn the_kernel_gives_up_links_and_no_other_connections() {
        let listener = listen("127.0.0.1:0".parse().unwrap()).unwrap();
        let socket = TcpStream::connect(listener.local_addr().unwrap()).await.unwrap();
        let timeout = || SockRef::from(&socket).tcp_user_timeout().unwrap();
        tune_caller(&socket);
        assert_eq!(timeout(), None);
        tune_link(&socket);
        assert_eq!(timeout(), Some(UNACKNOWLEDGED_ON_LINK));
    }

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
