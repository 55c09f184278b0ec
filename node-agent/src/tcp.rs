//! TCP connections to masters, and to the proxies on the way to them.

use std::{io, time::Duration};

use proto::Target;
use proto_net::socket;
use tokio::net::TcpStream;

/// Why there is no connection.
#[derive(Debug, thiserror::Error)]
pub enum ConnectError {
    #[error("{to} did not answer within {}", humantime::format_duration(*limit))]
    TimedOut { to: Target, limit: Duration },
    #[error("can't connect to {to}: {error}")]
    Failed { to: Target, error: io::Error },
}

/// Resolves and connects to a master, or to a proxy on the way to it.
pub async fn connect(to: &Target, timeout: Duration) -> Result<TcpStream, ConnectError> {
    let dial = TcpStream::connect((to.host.to_string(), to.port));
    let socket = tokio::time::timeout(timeout, dial)
        .await
        .map_err(|_| ConnectError::TimedOut { to: to.clone(), limit: timeout })?
        .map_err(|error| ConnectError::Failed { to: to.clone(), error })?;
    socket::tune_link(&socket);
    Ok(socket)
}
