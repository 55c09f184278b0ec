//! Serves callers that come through their node's tunnel, because they have no route to the front end's port.
//!
//! A node-agent opens streams on a multiplexer of their own. A plain sshd opens forwarded-tcpip channels for the
//! address on which it was asked to listen. In both cases, a stream always ends at the front end, whatever the node
//! asks for, and TLS begins at the caller. All callers of a node share the node's limits, and nothing that the node
//! says about a caller is trusted.
//!
//! The runtime of the tunnels only carries a stream's bytes to a pipe. A worker thread (`workers.rs`) serves the other
//! end of the pipe, since callers who have not authenticated must not delay tunnels by TLS handshakes.

use std::{net::SocketAddr, pin::Pin, sync::Arc, time::Duration};

use access::peer::Peer;
use proto::{DialError, Target, mux::FRONT_END};
use proto_net::{
    dialer::Origin,
    mux::Incoming,
    relay::{Outcome, relay},
    stream::Stream,
};

use tokio::sync::mpsc;

use super::{admission::Admission, server::FrontEnd};
use crate::{
    admin_api::FRONT_END_TUNNEL,
    stream::{
        caller::Caller,
        record::{Opened, Record},
        target_socket,
    },
    traces::Span,
    tunnels::{callers::ServeCallers, tunnel::Tunnel},
};

/// The number of bytes that are buffered in each direction between a stream and the front end.
const BUFFER: usize = 16 * 1024;
/// The number of characters that are kept of what a node says about a caller.
const MAX_ORIGIN: usize = 100;
/// The pause before an sshd that refused to listen is asked again. The previous session may still hold the address.
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
    match tunnel.front_end_streams().await {
        Ok(Some(streams)) => serve_streams(&front_end, &tunnel, streams).await,
        Ok(None) => tracing::debug!(node = %tunnel.node, "node has no local endpoint"),
        Err(error) => tracing::warn!(node = %tunnel.node, %error, "no streams to the front end"),
    }
}

async fn serve_streams(
    front_end: &Arc<FrontEnd>,
    tunnel: &Arc<Tunnel>,
    mut streams: mpsc::Receiver<Incoming>,
) {
    tracing::info!(node = %tunnel.node, "front end served through the tunnel");
    let mut logged = false;
    while let Some(incoming) = streams.recv().await {
        match admit(front_end, tunnel, &incoming) {
            Ok(admission) => {
                let (front_end, tunnel) = (front_end.clone(), tunnel.clone());
                front_end.clone().connections.spawn(async move {
                    let origin = incoming.origin.clone();
                    if let Some(stream) = incoming.accept().await {
                        carry(&front_end, &peer(&tunnel), stream, &origin, admission).await;
                    }
                });
            }
            Err(error) => {
                // This is logged once for each tunnel, so that a node can't flood the log.
                if matches!(error, DialError::Policy { .. }) && !logged {
                    logged = true;
                    let target = &incoming.target;
                    tracing::warn!(node = %tunnel.node, %target, %error, "node asked for more than the front end");
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
    if front_end.generations.present().draining.is_cancelled() {
        let reason = "the master-agent is stopping".to_owned();
        return Err(DialError::TunnelLost { node: String::new(), reason });
    }
    let admitted = front_end.admit(&peer(tunnel));
    admitted.map_err(|reason| DialError::TooManyStreams(format!("the master's front end: {reason}")))
}

async fn serve_forwarded(front_end: &Arc<FrontEnd>, tunnel: &Arc<Tunnel>, address: SocketAddr) {
    let most = front_end.config.max_connections_per_node;
    let mut logged = false;
    while !tunnel.has_ended() {
        match tunnel.forward(address, most).await {
            Ok(mut callers) => {
                tracing::info!(node = %tunnel.node, %address, "front end served at the node's sshd");
                while let Some(caller) = callers.recv().await {
                    let Ok(admission) = front_end.admit(&peer(tunnel)) else { continue };
                    if front_end.generations.present().closing.is_cancelled() {
                        continue;
                    }
                    let (front_end, tunnel) = (front_end.clone(), tunnel.clone());
                    front_end.clone().connections.spawn(async move {
                        carry(&front_end, &peer(&tunnel), caller.stream, &caller.origin, admission).await;
                        drop(caller.permit);
                    });
                }
            }
            Err(error) if !logged => {
                logged = true;
                tracing::warn!(node = %tunnel.node, %address, %error, "the node's sshd does not listen for the front end");
            }
            Err(error) => {
                tracing::debug!(node = %tunnel.node, %address, %error, "the node's sshd still does not listen")
            }
        }
        tokio::time::sleep(RETRY).await;
    }
}

/// Carries the bytes of one caller to the front end and back, and writes the record of the stream. It completes once
/// the stream and the caller's connection have both ended.
pub(super) async fn carry(
    front_end: &Arc<FrontEnd>,
    peer: &Peer,
    stream: Stream,
    origin: &str,
    mut admission: Admission,
) {
    let (Ok(target), Peer::Node { name: node, .. }) = (FRONT_END.parse::<Target>(), peer) else { return };
    let (runtime, load) = match front_end.workers.pick() {
        Ok(picked) => picked,
        Err(error) => return front_end.refused(peer, &error),
    };
    admission.load = Some(load);
    let origin: String = origin.chars().take(MAX_ORIGIN).collect();
    let origin = Origin(format!("node {node}, which says {origin:?}"));
    let caller = Caller::new(FRONT_END_TUNNEL, origin);
    // The requests have spans of their own.
    let opened = Opened {
        caller,
        target,
        node: Some(node.clone()),
        reason: "tunnel".to_owned(),
        span: Span::default(),
    };
    let mut record = Record::open(front_end.streams.clone(), opened);
    let (near, far) = target_socket::pair_of(BUFFER);
    let half_closed = front_end.config.half_closed_timeout;
    // Each of the two ends when the other one has dropped its end of the pipe, or their group is cancelled.
    let served = front_end.clone().serve_caller(near, peer.clone(), admission);
    let served = front_end.connections.spawn_on(served, &runtime);
    let carried = far.carry(|mut io| async {
        let (read, write) = tokio::io::split(&mut io);
        let counters = record.counters();
        let ended = relay(read, write, stream, &counters.down, &counters.up, half_closed).await;
        record.outcome = ended.kind();
        (io, ended == Outcome::Closed)
    });
    carried.await;
    // A connection that has failed has been logged.
    let _ = served.await;
}

fn peer(tunnel: &Tunnel) -> Peer {
    Peer::Node { name: tunnel.node.clone(), address: tunnel.peer }
}
