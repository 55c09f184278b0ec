//! How callers are accepted: over plain sockets, and over TCP with mutual TLS.

use std::{net::SocketAddr, sync::Arc};

use futures_util::FutureExt;
use proto_net::{
    accept::{Acceptor, Listener, Peer, Tuning},
    dialer::Origin,
    handshake::HandshakePermits,
    log_throttle::LogThrottle,
};
use tokio::{
    net::TcpListener,
    sync::{OwnedSemaphorePermit, Semaphore},
};

use super::{listener::EgressListener, socket::CallerSocket, tls::CallerTls};
use crate::stream::caller::Caller;

/// The maximum number of concurrent TLS handshakes. It is far above a burst of kube-apiserver's, so that strangers hardly
/// ever make it wait; each takes a descriptor, and some 20 KB once the caller has begun.
const HANDSHAKES: usize = 4096;

/// Accepts plain connections until the callers' tasks are cancelled. On a Unix socket, the mode and owner of the socket
/// file decide who may connect; on TCP, everybody who can reach the address.
pub async fn plain<E, L>(egress: Arc<E>, name: &'static str, listener: L)
where
    E: EgressListener,
    L: Listener,
    L::Socket: CallerSocket,
{
    let permits = Permits::new(&*egress, name);
    let tasks = egress.outbound().tasks.clone();
    let serve = |socket: L::Socket, peer: L::Peer, permit: OwnedSemaphorePermit| {
        let served = egress.clone();
        async move {
            served.serve(socket, Caller::new(name, Origin(peer.origin()))).await;
            drop(permit);
        }
    };
    Acceptor::new(listener, Tuning::Caller).serve(tasks, |_| permits.take(), serve).await;
}

/// Accepts TLS connections with client certificates until the callers' tasks are cancelled. Until its certificate has been
/// verified, a caller holds one of the handshake permits, and nothing of its request is read. Unauthenticated callers
/// therefore can't exhaust `max_connections`, and a burst of callers waits for permits rather than being turned away.
pub async fn tls<E>(egress: Arc<E>, name: &'static str, listener: TcpListener, tls: Arc<CallerTls>)
where
    E: EgressListener,
{
    let permits = Arc::new(Permits::new(&*egress, name));
    let handshakes = HandshakePermits::new(HANDSHAKES);
    let tasks = egress.outbound().tasks.clone();
    let admit = |peer: SocketAddr| handshakes.acquire(peer.ip()).map(Some);
    Acceptor::new(listener, Tuning::Caller)
        .serve_in_turn(tasks, admit, |socket, peer, handshake_permit| {
            let (served, tls, permits) = (egress.clone(), tls.clone(), permits.clone());
            async move {
                let outbound = served.outbound();
                let handshake = tls.handshake(socket, || handshake_permit.begun());
                let handshake = tokio::time::timeout(outbound.limits.head_timeout, handshake);
                let (stream, caller) = tokio::select! {
                    handshake = Box::pin(handshake) => match handshake {
                        Ok(Ok(accepted)) => accepted,
                        Ok(Err(error)) => return outbound.bad_request(name, &peer, &error),
                        Err(_) => return outbound.bad_request(name, &peer, &"no TLS handshake in time"),
                    },
                    () = handshake_permit.evicted.cancelled() => {
                        // Strangers can cause any number of these.
                        outbound.metrics.bad_request(name);
                        return tracing::debug!(egress = name, %peer, "evicted by a newer handshake");
                    }
                };
                drop(handshake_permit);
                let Some(_permit) = permits.take() else { return };
                served.serve(stream, Caller::new(name, Origin(format!("tls {caller} {peer}")))).await;
            }
        })
        .await;
}

/// Bounds the callers that one listener serves at once.
struct Permits {
    egress: &'static str,
    free: Arc<Semaphore>,
    refused: LogThrottle,
}

impl Permits {
    fn new(egress: &impl EgressListener, name: &'static str) -> Self {
        let free = Arc::new(Semaphore::new(egress.outbound().limits.max_connections));
        Self { egress: name, free, refused: LogThrottle::default() }
    }

    fn take(&self) -> Option<OwnedSemaphorePermit> {
        let permit = self.free.clone().try_acquire_owned().ok();
        if permit.is_none()
            && let Some(times) = self.refused.count(1)
        {
            tracing::warn!(egress = self.egress, times, "connection refused: max_connections reached");
        }
        permit
    }
}
