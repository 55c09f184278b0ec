//! Links that masters and people dial to this node. [`crate::call_home`] dials the others; above the link both are the
//! same session.

use std::net::SocketAddr;

use proto_net::{
    accept::{Acceptor, Tuning},
    handshake::{HandshakePermit, HandshakePermits},
    tasks::Tasks,
};
use tokio::{
    net::{TcpListener, TcpStream},
    sync::oneshot,
};

use crate::session::{error::SessionError, serve::SessionServer};

/// Accepts links, and serves a session on each in a task of `tasks`, until that group is cancelled.
pub async fn accept(
    server: SessionServer,
    handshakes: HandshakePermits,
    tasks: Tasks,
    listener: TcpListener,
) {
    let admit = |peer: SocketAddr| Some(handshakes.take(peer.ip()));
    let serve = |socket, peer, permit| serve_link(server.clone(), socket, peer, permit);
    Acceptor::new(listener, Tuning::Link).serve(tasks, admit, serve).await;
}

async fn serve_link(server: SessionServer, socket: TcpStream, peer: SocketAddr, permit: HandshakePermit) {
    // Nobody waits for the peer of an accepted link to authenticate.
    let (authenticated, _) = oneshot::channel();
    match server.serve(socket, Some(peer), Some(permit), authenticated).await {
        Ok(()) => {}
        // Anybody can cause any number of these. They are counted.
        Err(error @ SessionError::Evicted) => tracing::debug!(%peer, %error, "session ended"),
        Err(error) => tracing::info!(%peer, %error, "session ended"),
    }
}
