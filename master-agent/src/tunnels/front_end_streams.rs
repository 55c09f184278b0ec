//! The streams that a node opens to the master's front end. A node opens none unless the master asks it to.
//!
//! What the node is asked for can't be taken back, so the answer is awaited as long as the tunnel lives: a node that
//! agrees late must find the master ready.

use std::net::SocketAddr;

use proto_net::mux::Events;
use tokio::sync::mpsc;

use super::{
    session::{
        error::TunnelError,
        forward::{Forward, Forwarded},
        multiplexer::Opener,
    },
    tunnel::Tunnel,
};

impl Tunnel {
    /// Lets a node-agent open streams to the front end, at most `max_streams` at once. Returns `None` if the node-agent
    /// declines, because it has no local endpoint.
    pub async fn open_front_end(&self, max_streams: usize) -> Result<Option<Events>, TunnelError> {
        let started = self.session.start_multiplexer(Opener::Node, max_streams).await?;
        Ok(started.map(|(mux, events)| {
            let _ = self.front_end.set(mux);
            events
        }))
    }

    /// Asks a plain sshd to listen on an address, and returns the receiver of the connections to it, of which there are
    /// at most `max_connections` at once.
    pub async fn forward(
        &self,
        address: SocketAddr,
        max_connections: usize,
    ) -> Result<mpsc::Receiver<Forwarded>, TunnelError> {
        let (host, port) = (address.ip().to_string(), u32::from(address.port()));
        let (forward, connections) = Forward::new(host.clone(), port, max_connections);
        let state = &self.session.state;
        // Connections may arrive before the answer.
        *state.forward() = Some(forward);
        match self.session.handle.tcpip_forward(host, port).await {
            Ok(_) => Ok(connections),
            Err(error) => {
                *state.forward() = None;
                let is_denied = matches!(error, russh::Error::RequestDenied);
                Err(if is_denied { TunnelError::NotListening(address) } else { error.into() })
            }
        }
    }
}
