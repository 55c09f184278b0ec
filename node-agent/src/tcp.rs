//! TCP connections to masters, and to the proxies on the way to them.

use std::time::Duration;

use proto::Target;
use proto_net::socket;
use tokio::net::TcpStream;

/// Connects to a master, or to what is on the way to it.
pub async fn connect(master: &Target, timeout: Duration) -> Result<TcpStream, String> {
    let dial = TcpStream::connect((master.host.to_string(), master.port));
    let socket = tokio::time::timeout(timeout, dial)
        .await
        .map_err(|_| format!("{master} did not answer within {}", humantime::format_duration(timeout)))?
        .map_err(|e| format!("can't connect to {master}: {e}"))?;
    socket::tune(&socket);
    Ok(socket)
}
