//! The plain port: HTTP without TLS and credentials, for control-plane components on the master's own host.
//!
//! It is off unless it is configured, on a Unix socket or a loopback address and nowhere else. All of its callers are
//! the one user that the configuration names. Web pages must not use it through the browser of somebody who works on
//! this host: requests for a host that is not this one, and those of pages, are refused.

use std::sync::Arc;

use access::{
    authn::{Authenticated, Validity},
    peer::Peer,
    user::{AUTHENTICATED, User},
};
use proto_net::{admin::accept_error, socket, write_timeout::WriteTimeout};
use tokio::{
    io::{AsyncRead, AsyncWrite},
    net::{TcpListener, UnixListener},
};

use super::{config::LocalConfig, connection::Connection, server::FrontEnd};

/// Accepts from a Unix socket for ever; who may connect is the socket file's mode and owner.
pub async fn accept_unix(front_end: Arc<FrontEnd>, config: LocalConfig, listener: UnixListener) {
    loop {
        match listener.accept().await {
            Ok((socket, _)) => serve(&front_end, &config, socket, Peer::Local(None)),
            Err(e) => accept_error(&e).await,
        }
    }
}

/// Accepts from a loopback address for ever.
pub async fn accept_tcp(front_end: Arc<FrontEnd>, config: LocalConfig, listener: TcpListener) {
    loop {
        match listener.accept().await {
            Ok((socket, peer)) => {
                socket::tune_caller(&socket);
                serve(&front_end, &config, socket, Peer::Local(Some(peer)));
            }
            Err(e) => accept_error(&e).await,
        }
    }
}

fn serve<S>(front_end: &Arc<FrontEnd>, config: &LocalConfig, socket: S, peer: Peer)
where
    S: AsyncRead + AsyncWrite + Unpin + Send + 'static,
{
    let Ok(admission) = front_end.admit(&peer) else { return };
    let known = Some(caller(config));
    let connection = Arc::new(Connection::new(front_end.clone(), peer, known, admission));
    let socket = WriteTimeout::new(socket, front_end.config.idle_timeout);
    front_end.connections.spawn(connection.served_http1(socket));
}

/// Who its callers are.
fn caller(config: &LocalConfig) -> Authenticated {
    let mut groups = config.groups.clone();
    if !groups.iter().any(|group| group == AUTHENTICATED) {
        groups.push(AUTHENTICATED.to_owned());
    }
    let user = User { name: config.user.clone(), groups, ..User::default() };
    Authenticated { user: Arc::new(user), authenticator: "local", validity: Validity::default() }
}
