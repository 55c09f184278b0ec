//! The streams that a node opens to the master's front end. A node opens none unless the master offers its front end.

use std::{net::SocketAddr, sync::PoisonError};

use proto::mux::Version;
use proto_net::mux::Incoming;
use tokio::sync::mpsc;

use super::{
    session::{
        error::TunnelError,
        forward::{Forward, Forwarded},
    },
    tunnel::Tunnel,
};

impl Tunnel {
    /// Returns the receiver of the streams that a node-agent opens to the front end. Returns `None` if there are none,
    /// because the node-agent has no local endpoint, or because they have been taken.
    pub async fn front_end_streams(&self) -> Result<Option<mpsc::Receiver<Incoming>>, TunnelError> {
        let Some(max_streams) = self.limits.to_front_end else { return Ok(None) };
        if self.mux().is_some_and(|mux| mux.version() == Version::V2) {
            return Ok(self.callers.lock().unwrap_or_else(PoisonError::into_inner).take());
        }
        // What the node is asked for can't be taken back, so the answer is awaited as long as the tunnel lives: a node
        // that agrees late must find the master ready.
        let started = self.session.start_front_end(max_streams).await?;
        Ok(started.map(|(mux, events)| {
            let _ = self.front_end.set(mux);
            events.incoming
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
