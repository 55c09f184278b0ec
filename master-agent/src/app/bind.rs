//! Binds the sockets that the agent listens on.

use std::net::SocketAddr;

use anyhow::Context;
use proto_net::{socket, unix as unix_socket};
use tokio::net::{TcpListener, UnixListener};

use crate::fields::UnixConfig;

pub(super) fn tcp(address: SocketAddr) -> anyhow::Result<TcpListener> {
    socket::listen(address).with_context(|| format!("can't listen on {address}"))
}

pub(super) fn unix(config: &UnixConfig) -> anyhow::Result<UnixListener> {
    let UnixConfig { path, mode, owner, group } = config;
    unix_socket::bind(path, *mode, *owner, *group)
        .with_context(|| format!("can't listen on {}", path.display()))
}
