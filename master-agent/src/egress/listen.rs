//! Accepting callers: on Unix sockets, on TCP with mutual TLS, and on loopback TCP.

use std::{sync::Arc, time::SystemTime};

use proto_net::{admin::accept_error, dialer::Origin, handshake::Places, socket};
use rustls::pki_types::CertificateDer;
use tokio::{
    net::{TcpListener, UnixListener},
    sync::{OwnedSemaphorePermit, Semaphore},
};
use tokio_rustls::TlsAcceptor;

use super::door::EgressListener;
use crate::{client_certificates::ClientVerifier, stream::caller::Caller};

/// TLS handshakes at once.
const HANDSHAKES: usize = 256;

/// Whose client certificates may call.
pub struct Callers {
    pub verifier: ClientVerifier,
    /// Names in a certificate; empty allows every certificate of the client CA.
    pub allowed_names: Vec<String>,
}

/// Accepts from a Unix socket for ever; who may connect is the socket file's mode and owner.
pub async fn unix<D: EgressListener>(door: Arc<D>, name: &'static str, listener: UnixListener) {
    let permits = Arc::new(Semaphore::new(door.common().max_connections));
    loop {
        let socket = match listener.accept().await {
            Ok((socket, _)) => socket,
            Err(e) => {
                accept_error(&e).await;
                continue;
            }
        };
        let Some(permit) = permit(&permits, name) else { continue };
        let served = door.clone();
        door.common().connections.spawn(async move {
            let origin = match socket.peer_cred() {
                Ok(cred) => Origin(format!("unix uid={} pid={}", cred.uid(), cred.pid().unwrap_or_default())),
                Err(_) => Origin("unix".to_owned()),
            };
            served.serve(socket, Caller::new(name, origin)).await;
            drop(permit);
        });
    }
}

/// Accepts plain TCP connections for ever, from whoever can reach the address.
pub async fn tcp<D: EgressListener>(door: Arc<D>, name: &'static str, listener: TcpListener) {
    let permits = Arc::new(Semaphore::new(door.common().max_connections));
    loop {
        let (socket, peer) = match listener.accept().await {
            Ok(accepted) => accepted,
            Err(e) => {
                accept_error(&e).await;
                continue;
            }
        };
        let Some(permit) = permit(&permits, name) else { continue };
        socket::tune_caller(&socket);
        let served = door.clone();
        door.common().connections.spawn(async move {
            served.serve(socket, Caller::new(name, Origin(format!("tcp {peer}")))).await;
            drop(permit);
        });
    }
}

/// Accepts TLS connections with client certificates for ever. Until its certificate has been verified, a caller has one of
/// the few places for handshakes, and none of its bytes is read.
pub async fn tls<D: EgressListener>(
    door: Arc<D>,
    name: &'static str,
    listener: TcpListener,
    acceptor: TlsAcceptor,
    callers: Callers,
) {
    let callers = Arc::new(callers);
    // Who has not shown a certificate can't take the places of those who have.
    let permits = Arc::new(Semaphore::new(door.common().max_connections));
    let handshakes = Places::new(HANDSHAKES);
    loop {
        let (socket, peer) = match listener.accept().await {
            Ok(accepted) => accepted,
            Err(e) => {
                accept_error(&e).await;
                continue;
            }
        };
        socket::tune_caller(&socket);
        let place = handshakes.take(peer.ip());
        let (served, acceptor, callers, permits) =
            (door.clone(), acceptor.clone(), callers.clone(), permits.clone());
        door.common().connections.spawn(async move {
            let common = served.common();
            let handshake = async {
                let tls = acceptor.accept(socket).await.map_err(|error| error.to_string())?;
                let caller = callers.check(tls.get_ref().1.peer_certificates()).await?;
                Ok::<_, String>((tls, caller))
            };
            let handshake = Box::pin(tokio::time::timeout(common.head_timeout, handshake));
            let (tls, caller) = tokio::select! {
                handshake = handshake => match handshake {
                    Ok(Ok(accepted)) => accepted,
                    Ok(Err(error)) => return common.bad_request(name, &peer, &error),
                    Err(_) => return common.bad_request(name, &peer, &"no TLS handshake in time"),
                },
                () = place.evicted.cancelled() => {
                    return common.bad_request(name, &peer, &"gave its place to a newer handshake");
                }
            };
            drop(place);
            let Some(_permit) = permit(&permits, name) else { return };
            served.serve(tls, Caller::new(name, Origin(format!("tls {caller} {peer}")))).await;
        });
    }
}

fn permit(permits: &Arc<Semaphore>, egress: &'static str) -> Option<OwnedSemaphorePermit> {
    let permit = permits.clone().try_acquire_owned().ok();
    if permit.is_none() {
        tracing::warn!(egress, "refused a connection: max_connections reached");
    }
    permit
}

impl Callers {
    /// Verifies a caller's chain; gives the caller's name for the records.
    async fn check(&self, chain: Option<&[CertificateDer<'static>]>) -> Result<String, String> {
        let chain: Arc<[_]> = chain.unwrap_or_default().into();
        self.verifier.verify(&chain, SystemTime::now()).await.map_err(|error| error.to_string())?;
        let names = certificate_names(chain.first().ok_or("no client certificate")?)?;
        if self.allowed_names.is_empty() || names.iter().any(|name| self.allowed_names.contains(name)) {
            return Ok(names.into_iter().next().unwrap_or_else(|| "without a name".to_owned()));
        }
        Err(format!("certificate for {} is not in allowed_names", names.join(", ")))
    }
}

/// The common names of the subject, then the DNS names.
fn certificate_names(der: &CertificateDer<'_>) -> Result<Vec<String>, String> {
    use x509_parser::{extensions::GeneralName, prelude::FromDer};
    let (_, certificate) = x509_parser::certificate::X509Certificate::from_der(der)
        .map_err(|e| format!("client certificate: {e}"))?;
    let common =
        certificate.subject().iter_common_name().filter_map(|cn| cn.as_str().ok().map(str::to_owned));
    let mut names: Vec<String> = common.collect();
    if let Ok(Some(san)) = certificate.subject_alternative_name() {
        for name in &san.value.general_names {
            if let GeneralName::DNSName(dns) = name {
                names.push((*dns).to_owned());
            }
        }
    }
    Ok(names)
}
