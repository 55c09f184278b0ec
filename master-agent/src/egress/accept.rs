//! How callers are accepted: over plain sockets, and over TCP with mutual TLS.

use std::{
    net::{IpAddr, SocketAddr},
    sync::Arc,
    time::Duration,
};

use proto_net::{
    accept::{Acceptor, Listener, Peer, Tuning},
    descriptors,
    dialer::Origin,
    handshake::{HandshakePermit, HandshakePermits},
    listeners::Pausable,
    log_throttle::LogThrottle,
};
use tokio::{
    io::{AsyncRead, AsyncWrite},
    net::TcpListener,
    sync::{OwnedSemaphorePermit, Semaphore},
    time::timeout,
};
use tokio_rustls::server::TlsStream;

use super::{
    listener::EgressListener,
    outbound::{LOG_BURST, Outbound},
    socket::CallerSocket,
    tls::{CallerTls, TlsRefusal},
};
use crate::stream::caller::Caller;

/// The maximum number of TLS handshakes at once on one listener, so that a burst of kube-apiserver's need not wait. Each
/// takes a descriptor, and up to 64 KiB for a message that has not arrived whole.
const HANDSHAKES: usize = 4096;
/// The maximum number of connections that wait for their handshake to begin. Nothing is read from them meanwhile.
const WAITING: usize = 8192;
const EVICTED: &str = "evicted by a newer handshake";

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
/// verified, a caller holds a place among [`Strangers`], and nothing of its request is read. Unauthenticated callers
/// therefore can't exhaust `max_connections`.
pub async fn tls<E>(egress: Arc<E>, name: &'static str, listener: Pausable<TcpListener>, tls: Arc<CallerTls>)
where
    E: EgressListener,
{
    let strangers = Arc::new(Strangers::new(name, descriptors::limit()));
    let permits = Arc::new(Permits::new(&*egress, name));
    let tasks = egress.outbound().tasks.clone();
    let admit = |peer: SocketAddr| Some(strangers.waiting.take(peer.ip()));
    Acceptor::new(listener, Tuning::Caller)
        .serve(tasks, admit, |socket, peer, place| {
            let (served, tls) = (egress.clone(), tls.clone());
            let (strangers, permits) = (strangers.clone(), permits.clone());
            async move {
                let time = served.outbound().limits.head_timeout;
                // Boxed, so that a long-lived stream does not keep the memory of the handshake.
                let accepted = Box::pin(strangers.handshake(&tls, socket, peer.ip(), place, time)).await;
                let (stream, caller) = match accepted {
                    Ok(accepted) => accepted,
                    Err(error) => return strangers.refuse(served.outbound(), peer, &error),
                };
                let Some(_permit) = permits.take() else { return };
                served.serve(stream, Caller::new(name, Origin(format!("tls {caller} {peer}")))).await;
            }
        })
        .await;
}

/// The connections of one listener whose callers have not shown a good certificate. A burst of callers beyond the number
/// of handshakes waits, each in its own task, so that those of other networks are accepted and served meanwhile.
struct Strangers {
    egress: &'static str,
    handshakes: HandshakePermits,
    waiting: HandshakePermits,
    refused: LogThrottle,
}

impl Strangers {
    /// The strangers of both listeners leave more than a third of the `descriptors` to others.
    fn new(egress: &'static str, descriptors: usize) -> Self {
        Self {
            egress,
            handshakes: HandshakePermits::new(HANDSHAKES.min(descriptors / 4)),
            waiting: HandshakePermits::new(WAITING.min(descriptors / 16)),
            refused: LogThrottle::with_burst(LOG_BURST),
        }
    }

    /// Waits for the caller's turn, performs the handshake and verifies the certificate. Returns the caller's name, too.
    async fn handshake<S>(
        &self,
        tls: &CallerTls,
        socket: S,
        peer: IpAddr,
        place: HandshakePermit,
        time: Duration,
    ) -> Result<(TlsStream<S>, String), TlsRefusal>
    where
        S: AsyncRead + AsyncWrite + Unpin,
    {
        let permit = self.turn(peer, place).await?;
        tokio::select! {
            handshake = timeout(time, tls.handshake(socket, || permit.begun())) => {
                handshake.unwrap_or_else(|_| Err(TlsRefusal::stranger("no TLS handshake in time")))
            }
            () = permit.evicted.cancelled() => Err(TlsRefusal::stranger(EVICTED)),
        }
    }

    /// Exchanges a place among those who wait for a permit.
    async fn turn(&self, peer: IpAddr, place: HandshakePermit) -> Result<HandshakePermit, TlsRefusal> {
        tokio::select! {
            biased;
            () = place.evicted.cancelled() => Err(TlsRefusal::stranger(EVICTED)),
            permit = self.handshakes.acquire(peer) => Ok(permit),
        }
    }

    fn refuse(&self, outbound: &Outbound, peer: SocketAddr, error: &TlsRefusal) {
        match error {
            TlsRefusal::Stranger(_) => outbound.bad_requests(&self.refused, self.egress, &peer, error),
            TlsRefusal::NotAllowed(_) => outbound.bad_request(self.egress, &peer, error),
        }
    }
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

#[cfg(test)]
mod tests {
    use futures_util::future::join_all;
    use tokio::time::Instant;

    use super::*;

    fn strangers(handshakes: usize, waiting: usize) -> Strangers {
        let (handshakes, waiting) = (HandshakePermits::new(handshakes), HandshakePermits::new(waiting));
        Strangers { handshakes, waiting, ..Strangers::new("accept-test", usize::MAX) }
    }

    #[tokio::test(start_paused = true)]
    async fn those_who_wait_are_few_and_nobody_of_another_network_waits_for_them() {
        let strangers = strangers(2, 3);
        let arrive = |peer: &str| {
            let peer = peer.parse().unwrap();
            strangers.turn(peer, strangers.waiting.take(peer))
        };
        let held = join_all(["10.0.0.1", "10.0.0.2"].map(arrive)).await;
        for permit in &held {
            permit.as_ref().unwrap().begun();
        }
        let start = Instant::now();
        let waiting = join_all((0..5).map(|i| arrive(&format!("10.0.0.{i}"))));
        assert_eq!(strangers.waiting.in_use(), 3);
        let other = async {
            // It takes the place of one more.
            assert!(arrive("10.1.0.1").await.is_ok());
            assert_eq!(start.elapsed(), Duration::ZERO);
        };
        let (waited, ()) = tokio::join!(waiting, other);
        assert_eq!(waited.iter().filter(|permit| permit.is_ok()).count(), 2);
        assert_eq!((strangers.waiting.in_use(), strangers.handshakes.in_use()), (0, 2));
    }

    #[test]
    fn strangers_of_two_listeners_leave_descriptors_to_others() {
        for descriptors in [256, 1024, 4096, 65_536, 1_048_576] {
            let strangers = Strangers::new("accept-test", descriptors);
            let peer = |i: usize| IpAddr::from([10, 0, (i >> 8) as u8, i as u8]);
            let held: Vec<_> = (0..descriptors.min(16_384))
                .map(|i| (strangers.handshakes.take(peer(i)), strangers.waiting.take(peer(i))))
                .collect();
            let most = strangers.handshakes.in_use() + strangers.waiting.in_use();
            assert!(most <= (HANDSHAKES + WAITING).min(descriptors * 5 / 16), "{most} of {descriptors}");
            drop(held);
        }
    }
}
