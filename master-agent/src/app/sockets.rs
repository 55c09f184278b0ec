//! The sockets on which the agent listens. All of them are bound before it serves on any.

use proto_net::listeners::{Listeners, Pausable, Stage};
use tokio::net::{TcpListener, UnixListener};

use super::{bind, egress::EgressSockets};
use crate::{config::Config, fields::UnixConfig, front_end::config::FrontEndConfig};

/// The sockets of all listeners.
pub(super) struct Sockets {
    pub(super) egress: EgressSockets,
    pub(super) call_home: Option<Pausable<TcpListener>>,
    pub(super) front_end: Option<FrontEndSockets>,
    pub(super) admin: Pausable<TcpListener>,
    pub(super) admin_unix: Pausable<UnixListener>,
}

/// The sockets of the front end.
pub(super) struct FrontEndSockets {
    pub(super) https: Pausable<TcpListener>,
    pub(super) local_unix: Option<Pausable<UnixListener>>,
    pub(super) local_tcp: Option<Pausable<TcpListener>>,
}

impl Sockets {
    pub(super) fn bind(config: &Config, listeners: &mut Listeners) -> anyhow::Result<Self> {
        let stage = if config.calls_over_https() { Stage::Links } else { Stage::Callers };
        let call_home = config.call_home.as_ref();
        let front_end = config.front_end.as_ref();
        Ok(Self {
            egress: EgressSockets::bind(config, listeners)?,
            call_home: call_home.map(|c| bind::tcp(listeners, c.listen, Stage::Links)).transpose()?,
            front_end: front_end.map(|f| FrontEndSockets::bind(f, listeners, stage)).transpose()?,
            admin: bind::tcp(listeners, config.admin.listen, Stage::Callers)?,
            admin_unix: bind::unix(
                listeners,
                &UnixConfig { path: config.admin.socket.clone(), mode: 0o600, owner: None, group: None },
                Stage::Callers,
            )?,
        })
    }
}

impl FrontEndSockets {
    /// `stage` is that of the HTTPS port, over which nodes may call home.
    fn bind(config: &FrontEndConfig, listeners: &mut Listeners, stage: Stage) -> anyhow::Result<Self> {
        let local = config.local.as_ref();
        let (unix, tcp) = (local.and_then(|local| local.unix.as_ref()), local.and_then(|local| local.tcp));
        Ok(Self {
            local_unix: unix.map(|unix| bind::unix(listeners, unix, Stage::Callers)).transpose()?,
            local_tcp: tcp.map(|tcp| bind::tcp(listeners, tcp, Stage::Callers)).transpose()?,
            https: bind::tcp(listeners, config.listen, stage)?,
        })
    }
}
