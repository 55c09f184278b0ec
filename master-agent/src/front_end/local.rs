//! The plain port: HTTP without TLS and credentials, for control-plane components on the master's own host.
//!
//! The port is off by default, and it listens on a Unix socket or a loopback address only. All of its callers are the
//! one user that the configuration names. A web page must not reach the port through the browser of somebody who works
//! on this host, so requests for another host and requests that a page makes are rejected (`browser.rs`).

use std::sync::Arc;

use access::{
    authn::{Authenticated, Validity},
    peer::Peer,
    user::{AUTHENTICATED, User},
};
use proto_net::{
    accept::{Acceptor, Listener, Tuning},
    listeners::Pausable,
    write_timeout::WriteTimeout,
};
use tokio::net::{TcpListener, UnixListener};

use super::{admission::Admission, config::LocalConfig, connection::Connection, server::FrontEnd};

/// Accepts callers on a Unix socket until the task is cancelled. The mode and owner of the socket file decide who may
/// connect.
pub async fn accept_unix(front_end: Arc<FrontEnd>, config: LocalConfig, listener: Pausable<UnixListener>) {
    accept(&front_end, &config, listener, |_| Peer::Local(None)).await;
}

/// Accepts callers on a loopback address until the task is cancelled.
pub async fn accept_tcp(front_end: Arc<FrontEnd>, config: LocalConfig, listener: Pausable<TcpListener>) {
    accept(&front_end, &config, listener, |address| Peer::Local(Some(address))).await;
}

async fn accept<L: Listener>(
    front_end: &Arc<FrontEnd>,
    config: &LocalConfig,
    listener: L,
    peer: impl Fn(L::Peer) -> Peer + Send + Sync,
) {
    let known = caller(config);
    let admit = |from: L::Peer| front_end.admit(&peer(from)).ok();
    let serve = |socket: L::Socket, from: L::Peer, admission: Admission| {
        let connection = Connection::plain(front_end.clone(), peer(from), known.clone(), admission);
        let socket = WriteTimeout::new(socket, front_end.config.idle_timeout);
        Arc::new(connection).serve_http1(socket)
    };
    let acceptor = Acceptor::new(listener, Tuning::Caller);
    acceptor.serve(front_end.connections.clone(), admit, serve).await;
}

/// Returns the identity of all callers.
fn caller(config: &LocalConfig) -> Authenticated {
    let mut groups = config.groups.clone();
    if !groups.iter().any(|group| group == AUTHENTICATED) {
        groups.push(AUTHENTICATED.to_owned());
    }
    let user = User { name: config.user.clone(), groups, ..User::default() };
    Authenticated { user: Arc::new(user), authenticator: "local", validity: Validity::default() }
}
