//! Where links come from: masters that dial this node, and masters that this node dials (call home,
//! RFC 8071). Above the link both are the same session.

use std::{net::SocketAddr, sync::Arc, time::Duration};

use proto::{
    Target,
    backoff::Backoff,
    call_home::{Master, Purpose},
    io::{admin::accept_error, socket},
};
use tokio::{
    io::{AsyncRead, AsyncWrite},
    net::{TcpListener, TcpStream},
    sync::oneshot,
};

use crate::{
    agent::Agent,
    https,
    session::{self, SessionError},
};

/// Accepts links until the group of sessions is cancelled.
pub async fn accept(agent: Arc<Agent>, listener: TcpListener) {
    loop {
        let (socket, peer) = match listener.accept().await {
            Ok(accepted) => accepted,
            Err(e) => {
                accept_error(&e).await;
                continue;
            }
        };
        if agent.draining.is_cancelled() {
            continue;
        }
        socket::tune(&socket);
        let place = agent.handshakes.take(peer.ip());
        let (authenticated, _) = oneshot::channel();
        let served = session::serve(agent.clone(), socket, Some(peer), Some(place), authenticated);
        agent.sessions.spawn(async move {
            match served.await {
                Ok(()) => {}
                // As many as anybody likes to send; they are counted.
                Err(error @ SessionError::Evicted) => tracing::debug!(%peer, %error, "session ended"),
                Err(error) => tracing::info!(%peer, %error, "session ended"),
            }
        });
    }
}

/// Keeps one link to a master, for ever.
pub async fn call_home(agent: Arc<Agent>, master: Master) {
    let mut backoff = Backoff::new(Duration::from_millis(250), Duration::from_secs(2));
    while !agent.draining.is_cancelled() {
        let started = tokio::time::Instant::now();
        match call_once(&agent, &master).await {
            Ok(()) => tracing::info!(%master, "the master closed the tunnel"),
            Err(error) => match agent.expired() {
                Some(at) => {
                    let at = humantime::format_rfc3339_seconds(at);
                    tracing::error!(%master, %error, "this node's certificate expired at {at}: join it again with a new token");
                }
                None => tracing::warn!(%master, %error, "no tunnel to the master"),
            },
        }
        // A session that held proves that the master is well; one that fails at once does not.
        if started.elapsed() > Duration::from_secs(10) {
            backoff.reset();
        }
        tokio::select! {
            () = tokio::time::sleep(backoff.next_delay(rand::random())) => {}
            () = agent.draining.cancelled() => {}
        }
    }
}

async fn call_once(agent: &Arc<Agent>, master: &Master) -> Result<(), String> {
    let timeout = agent.config.limits.dial_timeout;
    match master {
        Master::Tcp(address) => {
            let socket = connect(address, timeout).await?;
            let peer = socket.peer_addr().ok();
            serve(agent, master, socket, peer).await
        }
        Master::Https(front_end) => {
            let Some(node) = agent.dialer.scope().node.clone() else {
                return Err("this host has no name yet: join it (`node-agent join`)".to_owned());
            };
            let config = &agent.config.call_home_https;
            let link = https::connect(config, front_end, Some(&node), Purpose::Link, None, timeout).await?;
            serve(agent, master, link.stream, link.peer).await
        }
    }
}

async fn serve<T>(
    agent: &Arc<Agent>,
    master: &Master,
    socket: T,
    peer: Option<SocketAddr>,
) -> Result<(), String>
where
    T: AsyncRead + AsyncWrite + Unpin + Send + 'static,
{
    let (authenticated, proof) = oneshot::channel();
    let served = session::serve(agent.clone(), socket, peer, None, authenticated);
    tokio::pin!(served);
    tokio::select! {
        result = &mut served => return result.map_err(|e| e.to_string()),
        proof = proof => if proof.is_ok() { tracing::info!(%master, "called home") },
    }
    served.await.map_err(|e| e.to_string())
}

/// Connects to a master, or to what is on the way to it.
pub async fn connect(master: &Target, timeout: Duration) -> Result<TcpStream, String> {
    let dial = TcpStream::connect((master.host.to_string(), master.port));
    let socket = tokio::time::timeout(timeout, dial)
        .await
        .map_err(|_| format!("{master} did not answer within {}", humantime::format_duration(timeout)))?
        .map_err(|e| format!("can't connect to {master}: {e}"))?;
    socket::tune(&socket);
    Ok(socket)
}
