//! Callers that come through their node's tunnel: for nodes and pods without a route to the front end's port.
//!
//! A node-agent opens streams on a multiplexer of their own, a plain sshd forwarded-tcpip channels for the address
//! that it was asked to listen on. Either way a stream ends at the front end and nowhere else, whatever the node
//! asks for, and TLS begins at the caller. To the front end such a caller is the node's: its limits are shared by
//! all that come from that node, and nothing of what the node says of a caller is believed.

use std::{net::SocketAddr, pin::Pin, sync::Arc, time::Duration};

use access::peer::Peer;
use proto::{DialError, Target, mux::FRONT_END};
use proto_net::{
    dialer::Origin,
    mux::{Events, Incoming},
    relay::{Outcome, relay},
    stream::Stream,
};

use super::{admission::Admission, server::FrontEnd};
use crate::{
    stream::{
        caller::Caller,
        record::{Opened, Record},
        target_socket,
    },
    traces::Span,
    tunnel::Tunnel,
    tunnels::callers::ServeCallers,
};

/// In records and metrics.
const DOOR: &str = "front-end-tunnel";
/// Bytes that wait each way between a stream and the front end.
const PIPE: usize = 16 * 1024;
/// Characters kept of what a node says of a caller.
const ORIGIN: usize = 100;
/// How long until an sshd that refused to listen is asked again. The session before may still hold the address.
const RETRY: Duration = Duration::from_secs(5);

impl ServeCallers for FrontEnd {
    fn serve(
        self: Arc<Self>,
        tunnel: Arc<Tunnel>,
        listen: Option<SocketAddr>,
    ) -> Pin<Box<dyn Future<Output = ()> + Send>> {
        Box::pin(serve(self, tunnel, listen))
    }
}

async fn serve(front_end: Arc<FrontEnd>, tunnel: Arc<Tunnel>, listen: Option<SocketAddr>) {
    if !tunnel.is_node_agent() {
        if let Some(address) = listen {
            serve_forwarded(&front_end, &tunnel, address).await;
        }
        return;
    }
    match tunnel.open_front_end(front_end.config.max_connections_per_node).await {
        Ok(Some(events)) => serve_mux(&front_end, &tunnel, events).await,
        Ok(None) => tracing::debug!(node = %tunnel.node, "the node has no local endpoint"),
        Err(error) => tracing::warn!(node = %tunnel.node, %error, "no streams to the front end"),
    }
}

async fn serve_mux(front_end: &Arc<FrontEnd>, tunnel: &Arc<Tunnel>, mut events: Events) {
    tracing::info!(node = %tunnel.node, "the front end is served through the tunnel");
    let mut told = false;
    while let Some(incoming) = events.incoming.recv().await {
        match admit(front_end, tunnel, &incoming) {
            Ok(admission) => {
                let (front_end, tunnel) = (front_end.clone(), tunnel.clone());
                front_end.clone().connections.spawn(async move {
                    let origin = incoming.origin.clone();
                    if let Some(stream) = incoming.accept().await {
                        carry(&front_end, &tunnel, stream, &origin, admission).await;
                    }
                });
            }
            Err(error) => {
                // A node may ask as often as it likes.
                if matches!(error, DialError::Policy { .. }) && !told {
                    told = true;
                    tracing::warn!(node = %tunnel.node, target = %incoming.target, %error, "a node asks for what it may not have");
                }
                incoming.reject(error);
            }
        }
    }
}

fn admit(front_end: &FrontEnd, tunnel: &Tunnel, incoming: &Incoming) -> Result<Admission, DialError> {
    if incoming.target.to_string() != FRONT_END {
        front_end.refused(&peer(tunnel), &"a node asked for something other than the front end");
        let reason = format!("a node reaches {FRONT_END} through its tunnel, and nothing else");
        return Err(DialError::Policy { rule: "front-end-only".to_owned(), reason });
    }
    if front_end.draining.is_cancelled() {
        let reason = "the master-agent is stopping".to_owned();
        return Err(DialError::TunnelLost { node: String::new(), reason });
    }
    let admitted = front_end.admit(&peer(tunnel));
    admitted.map_err(|reason| DialError::TooManyStreams(format!("the master's front end: {reason}")))
}

async fn serve_forwarded(front_end: &Arc<FrontEnd>, tunnel: &Arc<Tunnel>, address: SocketAddr) {
    let most = front_end.config.max_connections_per_node;
    let mut told = false;
    while !tunnel.has_ended() {
        match tunnel.forward(address, most).await {
            Ok(mut callers) => {
                tracing::info!(node = %tunnel.node, %address, "the front end is served at the node's sshd");
                while let Some(caller) = callers.recv().await {
                    let Ok(admission) = front_end.admit(&peer(tunnel)) else { continue };
                    if front_end.draining.is_cancelled() {
                        continue;
                    }
                    let (front_end, tunnel) = (front_end.clone(), tunnel.clone());
                    front_end.clone().connections.spawn(async move {
                        carry(&front_end, &tunnel, caller.stream, &caller.origin, admission).await;
                        drop(caller.permit);
                    });
                }
            }
            Err(error) if !told => {
                told = true;
                tracing::warn!(node = %tunnel.node, %address, %error, "the node's sshd does not listen for the front end; asking it again and again");
            }
            Err(error) => {
                tracing::debug!(node = %tunnel.node, %address, %error, "the node's sshd still does not listen")
            }
        }
        tokio::time::sleep(RETRY).await;
    }
}

/// Carries one caller's bytes to the front end and back, and leaves a record.
async fn carry(
    front_end: &Arc<FrontEnd>,
    tunnel: &Tunnel,
    stream: Stream,
    origin: &str,
    admission: Admission,
) {
    let Ok(target) = FRONT_END.parse::<Target>() else { return };
    let origin: String = origin.chars().take(ORIGIN).collect();
    let origin = Origin(format!("node {}, which says {origin:?}", tunnel.node));
    let caller = Caller::new(DOOR, origin);
    let node = Some(tunnel.node.clone());
    // Its requests have spans of their own.
    let opened = Opened { caller, target, node, reason: "tunnel".to_owned(), span: Span::default() };
    let mut record = Record::open(front_end.streams.clone(), opened);
    let (near, far) = target_socket::pair_of(PIPE);
    let half_closed = front_end.config.half_closed_timeout;
    let served = front_end.clone().serve_caller(near, peer(tunnel), admission);
    let carried = far.carry(|mut io| async {
        let (read, write) = tokio::io::split(&mut io);
        let counters = record.counters();
        let ended = relay(read, write, stream, &counters.down, &counters.up, half_closed).await;
        record.outcome = ended.kind();
        (io, ended == Outcome::Closed)
    });
    tokio::join!(Box::pin(served), carried);
}

fn peer(tunnel: &Tunnel) -> Peer {
    Peer::Node { name: tunnel.node.clone(), address: tunnel.peer }
}
