//! Hands the tunnels over to whoever serves the callers that come through them: the front end.

use std::{net::SocketAddr, pin::Pin, sync::Arc};

use proto_net::tasks::Tasks;
use tokio::sync::mpsc;

use super::tunnel::Tunnel;

/// Tunnels that wait to be taken over.
const WAITING: usize = 64;

/// Serves the callers who come through tunnels.
pub trait ServeCallers: Send + Sync {
    /// Serves those of one tunnel until it ends. `listen` is where a plain sshd is to listen for them, if anywhere.
    fn serve(
        self: Arc<Self>,
        tunnel: Arc<Tunnel>,
        listen: Option<SocketAddr>,
    ) -> Pin<Box<dyn Future<Output = ()> + Send>>;
}

/// A tunnel through which callers may come, and where a plain sshd is to listen for them.
type Opened = (Arc<Tunnel>, Option<SocketAddr>);

/// The end at which tunnels are handed over.
#[derive(Clone)]
pub struct CallerTunnels(mpsc::Sender<Opened>);

/// The end at which they are taken over.
pub struct TakenOver(mpsc::Receiver<Opened>);

pub fn hand_over() -> (CallerTunnels, TakenOver) {
    let (sender, receiver) = mpsc::channel(WAITING);
    (CallerTunnels(sender), TakenOver(receiver))
}

impl CallerTunnels {
    pub(super) async fn add(&self, tunnel: Arc<Tunnel>, listen: Option<SocketAddr>) {
        // Nobody takes tunnels over any more once the agent stops.
        let _ = self.0.send((tunnel, listen)).await;
    }
}

impl TakenOver {
    /// Has `callers` serve every tunnel until it ends, each in a task of `tasks`.
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
