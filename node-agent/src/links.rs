//! Where links come from: masters that dial this node, and masters that this node dials (call home,
//! RFC 8071). Above the link both are the same session.

use std::{net::SocketAddr, sync::Arc, time::Duration};

use proto::{
    backoff::Backoff,
    call_home::{Master, Purpose},
};
use proto_net::{admin::accept_error, socket};
use tokio::{
    io::{AsyncRead, AsyncWrite},
    net::TcpListener,
    sync::oneshot,
    task::{JoinError, JoinHandle},
};

use crate::{
    agent::Agent,
    https,
    session::{self, Authenticated, SessionError},
    tcp,
};

/// How long a link has to hold until the one that it replaces takes no new streams.
const SETTLE: Duration = Duration::from_secs(1);

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

/// Keeps a link to a master, for ever. One whose session comes to its end with the master's certificate is replaced
/// before: the next link is made first, and the former one is then left to the streams that it has.
pub async fn call_home(agent: Arc<Agent>, master: Master) {
    let mut backoff = Backoff::new(Duration::from_millis(250), Duration::from_secs(2));
    let mut former: Option<Called> = None;
    while !agent.draining.is_cancelled() {
        let started = tokio::time::Instant::now();
        let ended = match call(&agent, &master).await {
            Ok(mut called) => {
                tracing::info!(%master, "called home");
                match hold(&agent, &mut called, &mut former).await {
                    Some(ended) => ended,
                    None => {
                        backoff.reset();
                        former = Some(called);
                        continue;
                    }
                }
            }
            Err(error) => Err(error),
        };
        match ended {
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

/// A session that a master has authenticated in.
struct Called {
    served: JoinHandle<Option<Result<(), SessionError>>>,
    authenticated: Authenticated,
}

/// Waits until a session has ended, or until there should be another one: `None`. The former one is retired once this one
/// has held for a moment, as a master that has enough links closes the next one at once.
async fn hold(agent: &Agent, called: &mut Called, former: &mut Option<Called>) -> Option<Result<(), String>> {
    let relink = called.authenticated.relink;
    let settle = tokio::time::sleep(SETTLE);
    tokio::pin!(settle);
    let due = async {
        match relink {
            Some(after) => tokio::time::sleep(after.max(SETTLE)).await,
            None => std::future::pending().await,
        }
    };
    tokio::pin!(due);
    loop {
        tokio::select! {
            served = &mut called.served => return Some(outcome(served)),
            () = &mut settle, if former.is_some() => {
                if let Some(former) = former.take() {
                    former.authenticated.retire.cancel();
                }
            }
            () = &mut due, if former.is_none() => return None,
            () = agent.draining.cancelled() => return None,
        }
    }
}

fn outcome(served: Result<Option<Result<(), SessionError>>, JoinError>) -> Result<(), String> {
    match served {
        Ok(Some(result)) => result.map_err(|error| error.to_string()),
        Ok(None) => Ok(()),
        Err(error) => Err(error.to_string()),
    }
}

async fn call(agent: &Arc<Agent>, master: &Master) -> Result<Called, String> {
    let timeout = agent.config.limits.dial_timeout;
    match master {
        Master::Tcp(address) => {
            let socket = tcp::connect(address, timeout).await?;
            let peer = socket.peer_addr().ok();
            begin(agent, socket, peer).await
        }
        Master::Https(front_end) => {
            let Some(node) = agent.dialer.scope().node.clone() else {
                return Err("this host has no name yet: join it (`node-agent join`)".to_owned());
            };
            let config = &agent.config.call_home_https;
            let link = https::connect(config, front_end, Some(&node), Purpose::Link, None, timeout).await?;
            begin(agent, link.stream, link.peer).await
        }
    }
}

/// Waits until the master has authenticated.
async fn begin<T>(agent: &Arc<Agent>, socket: T, peer: Option<SocketAddr>) -> Result<Called, String>
where
    T: AsyncRead + AsyncWrite + Unpin + Send + 'static,
{
    let (authenticated, proof) = oneshot::channel();
    let served = agent.sessions.spawn(session::serve(agent.clone(), socket, peer, None, authenticated));
    match proof.await {
        Ok(authenticated) => Ok(Called { served, authenticated }),
        Err(_) => Err(match outcome(served.await) {
            Ok(()) => "the master closed the session before it had authenticated".to_owned(),
            Err(error) => error,
        }),
    }
}
