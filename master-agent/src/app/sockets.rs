//! The sockets on which the agent listens. All of them are bound before it serves on any.

use tokio::net::{TcpListener, UnixListener};

use super::{bind, egress::EgressSockets};
use crate::{config::Config, fields::UnixConfig, front_end::config::FrontEndConfig};

/// The sockets of all listeners.
pub(super) struct Sockets {
    pub(super) egress: EgressSockets,
    pub(super) call_home: Option<TcpListener>,
    pub(super) front_end: Option<FrontEndSockets>,
    pub(super) admin: TcpListener,
    pub(super) admin_unix: UnixListener,
}

/// The sockets of the front end.
pub(super) struct FrontEndSockets {
    pub(super) https: TcpListener,
    pub(super) local_unix: Option<UnixListener>,
    pub(super) local_tcp: Option<TcpListener>,
}

impl Sockets {
    pub(super) fn bind(config: &Config) -> anyhow::Result<Self> {
        Ok(Self {
            egress: EgressSockets::bind(config)?,
            call_home: config.call_home.as_ref().map(|call_home| bind::tcp(call_home.listen)).transpose()?,
            front_end: config.front_end.as_ref().map(FrontEndSockets::bind).transpose()?,
            admin: bind::tcp(config.admin.listen)?,
            admin_unix: bind::unix(&UnixConfig {
                path: config.admin.socket.clone(),
                mode: 0o600,
                owner: None,
                group: None,
            })?,
        })
    }
}

impl FrontEndSockets {
    fn bind(config: &FrontEndConfig) -> anyhow::Result<Self> {
        let local = config.local.as_ref();
        Ok(Self {
            local_unix: local.and_then(|local| local.unix.as_ref()).map(bind::unix).transpose()?,
            local_tcp: local.and_then(|local| local.tcp).map(bind::tcp).transpose()?,
            https: bind::tcp(config.listen)?,
        })
    }
}
