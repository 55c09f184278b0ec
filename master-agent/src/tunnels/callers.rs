//! The channel that passes new tunnels to the front end, which serves the callers that come through them.

use std::{net::SocketAddr, pin::Pin, sync::Arc};

use proto_net::tasks::Tasks;
use tokio::sync::mpsc;

use super::tunnel::Tunnel;

/// The number of tunnels that the channel can hold.
const CAPACITY: usize = 64;

/// Serves the callers who come through tunnels.
pub trait ServeCallers: Send + Sync {
    /// Serves the callers of one tunnel until it ends. `listen` is the address on which a plain sshd is asked to listen
    /// for them.
    fn serve(
        self: Arc<Self>,
        tunnel: Arc<Tunnel>,
        listen: Option<SocketAddr>,
    ) -> Pin<Box<dyn Future<Output = ()> + Send>>;
}

/// A tunnel through which callers may come, and the address on which a plain sshd is asked to listen for them.
type CallerTunnel = (Arc<Tunnel>, Option<SocketAddr>);

/// The sending half of the channel.
#[derive(Clone)]
pub struct CallerTunnelSender {
    tunnels: mpsc::Sender<CallerTunnel>,
    /// The most callers of one node at once.
    pub(super) max_callers: usize,
}

/// The receiving half of the channel.
pub struct CallerTunnelReceiver(mpsc::Receiver<CallerTunnel>);

/// The channel for tunnels of which each brings at most `max_callers` callers at once.
pub fn caller_tunnels(max_callers: usize) -> (CallerTunnelSender, CallerTunnelReceiver) {
    let (tunnels, receiver) = mpsc::channel(CAPACITY);
    (CallerTunnelSender { tunnels, max_callers }, CallerTunnelReceiver(receiver))
}

impl CallerTunnelSender {
    pub(super) async fn send(&self, tunnel: Arc<Tunnel>, listen: Option<SocketAddr>) {
        // The receiver is gone once the agent stops.
        let _ = self.tunnels.send((tunnel, listen)).await;
    }
}

impl CallerTunnelReceiver {
    /// Serves every tunnel with `callers` until the tunnel ends, each in a task of `tasks`.
    pub async fn serve(mut self, callers: Arc<dyn ServeCallers>, tasks: Tasks) {
        while let Some((tunnel, listen)) = self.0.recv().await {
            let served = callers.clone().serve(tunnel.clone(), listen);
            tasks.spawn(async move {
                tokio::select! {
                    () = served => {}
                    _ = tunnel.ended() => {}
                }
            });
        }
    }
}
