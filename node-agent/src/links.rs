//! Links that masters and people dial to this node. [`crate::call_home`] dials the others; above the link both are the
//! same session.

use proto_net::{admin::accept_error, handshake::HandshakePermits, socket, tasks::Tasks};
use tokio::{net::TcpListener, sync::oneshot};

use crate::session::{error::SessionError, serve::SessionServer};

/// Accepts links for ever, and serves a session on each in a task of its own.
pub async fn accept(
    server: SessionServer,
    handshakes: HandshakePermits,
    tasks: Tasks,
    listener: TcpListener,
) {
    loop {
        let (socket, peer) = match listener.accept().await {
            Ok(accepted) => accepted,
            Err(e) => {
                accept_error(&e).await;
                continue;
            }
        };
        socket::tune(&socket);
        let permit = handshakes.take(peer.ip());
        let (authenticated, _) = oneshot::channel();
        let served = server.clone().serve(socket, Some(peer), Some(permit), authenticated);
        tasks.spawn(async move {
            match served.await {
                Ok(()) => {}
                // Anybody can cause any number of these. They are counted.
                Err(error @ SessionError::Evicted) => tracing::debug!(%peer, %error, "session ended"),
                Err(error) => tracing::info!(%peer, %error, "session ended"),
            }
        });
    }
}
