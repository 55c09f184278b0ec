//! What every TCP socket of the agents is set to.

use std::time::Duration;

use socket2::{SockRef, TcpKeepalive};
use tokio::net::TcpStream;

/// Bytes that a caller's socket may hold unsent. With more, a slow caller would seem to take nothing for long and
/// then very much.
const UNSENT: u32 = 256 * 1024;

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
