//! Binds the sockets that the agent listens on, or takes those of the process before.

use std::net::SocketAddr;

use anyhow::Context;
use proto_net::listeners::{Listeners, Pausable, Stage};
use tokio::net::{TcpListener, UnixListener};

use crate::fields::UnixConfig;

pub(super) fn tcp(
    listeners: &mut Listeners,
    address: SocketAddr,
    stage: Stage,
) -> anyhow::Result<Pausable<TcpListener>> {
    listeners.tcp(address, stage).with_context(|| format!("can't listen on {address}"))
}

pub(super) fn unix(
    listeners: &mut Listeners,
    config: &UnixConfig,
    stage: Stage,
) -> anyhow::Result<Pausable<UnixListener>> {
    let UnixConfig { path, mode, owner, group } = config;
    let access = (*mode, *owner, *group);
    listeners.unix(path, access, stage).with_context(|| format!("can't listen on {}", path.display()))
}
