//! Links that masters and people dial to this node. [`crate::call_home`] dials the others; above the link both are the
//! same session.

use std::net::SocketAddr;

use proto_net::{
    accept::{Acceptor, Tuning},
    handshake::{HandshakePermit, HandshakePermits},
    listeners::Pausable,
    tasks::Tasks,
};
use tokio::{
    net::{TcpListener, TcpStream},
    sync::oneshot,
};

use crate::session::{
    error::SessionError,
    serve::{Direction, SessionServer},
};

/// Accepts links, and serves a session on each in a task of `tasks`, until that group is cancelled.
pub async fn accept(
    server: SessionServer,
    handshakes: HandshakePermits,
    tasks: Tasks,
    listener: Pausable<TcpListener>,
) {
    let admit = |peer: SocketAddr| Some(handshakes.take(peer.ip()));
    let serve = |socket, peer, permit| serve_link(server.clone(), socket, peer, permit);
    Acceptor::new(listener, Tuning::Link).serve(tasks, admit, serve).await;
}

async fn serve_link(server: SessionServer, socket: TcpStream, peer: SocketAddr, permit: HandshakePermit) {
    let (authenticated, mut proof) = oneshot::channel();
    let direction = Direction::Dialled(permit);
    let served = server.clone().serve(socket, Some(peer), direction, authenticated).await;
    let is_stranger = proof.try_recv().is_err();
    match served {
        Ok(()) => {}
        // Anybody can cause any number of these. They are counted.
        Err(error @ (SessionError::Evicted | SessionError::Stopping)) => {
            tracing::debug!(%peer, %error, "session ended");
        }
        Err(error) if is_stranger => {
            if let Some(times) = server.log_throttle().count(1) {
                tracing::info!(%peer, %error, times, "session ended before its peer had authenticated");
            }
        }
        Err(error) => tracing::info!(%peer, %error, "session ended"),
    }
}
