//! Callers who come through their node's tunnel.

use std::{net::SocketAddr, pin::Pin, sync::Arc};

use crate::tunnel::Tunnel;

/// Serves the callers who come through tunnels: the front end.
pub trait ServeCallers: Send + Sync {
    /// Serves those of one tunnel until it ends. `listen` is where a plain sshd is to listen for them, if anywhere.
    fn serve(
        self: Arc<Self>,
        tunnel: Arc<Tunnel>,
        listen: Option<SocketAddr>,
    ) -> Pin<Box<dyn Future<Output = ()> + Send>>;
}
