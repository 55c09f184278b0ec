//! The local endpoint: what callers on this node use in place of the front end's port, which they may have no route
//! to. Their bytes, TLS from end to end, go through a tunnel to the front end of the master at its other end; this
//! agent can't read them and the master lets nothing else be reached that way.

use std::{sync::Arc, time::Instant};

use proto_net::{
    admin::accept_error,
    relay::{Counters, relay},
    socket,
};
use tokio::{
    io::{AsyncRead, AsyncWrite},
    net::{TcpListener, UnixListener},
    sync::OwnedSemaphorePermit,
};

use crate::{agent::Agent, metrics};

/// Accepts TCP callers for ever.
pub async fn accept_tcp(agent: Arc<Agent>, listener: TcpListener) {
    loop {
        match listener.accept().await {
            Ok((socket, peer)) => {
                socket::tune_caller(&socket);
                let (read, write) = socket.into_split();
                take(&agent, read, write, format!("tcp {peer}"));
            }
            Err(e) => accept_error(&e).await,
        }
    }
}

/// Accepts callers of the Unix socket for ever; who may connect is the socket file's mode and owner.
pub async fn accept_unix(agent: Arc<Agent>, listener: UnixListener) {
    loop {
        match listener.accept().await {
            Ok((socket, _)) => {
                let caller = match socket.peer_cred() {
                    Ok(cred) => format!("unix uid={} pid={}", cred.uid(), cred.pid().unwrap_or_default()),
                    Err(_) => "unix".to_owned(),
                };
                let (read, write) = socket.into_split();
                take(&agent, read, write, caller);
            }
            Err(e) => accept_error(&e).await,
        }
    }
}

/// Serves a caller, unless there are too many.
fn take<R, W>(agent: &Arc<Agent>, read: R, write: W, caller: String)
where
    R: AsyncRead + Unpin + Send + 'static,
    W: AsyncWrite + Unpin + Send + 'static,
{
    let Some(front_ends) = &agent.front_ends else { return };
    match front_ends.place() {
        Some(permit) => {
            agent.sessions.spawn(serve(agent.clone(), read, write, caller, permit));
        }
        None => {
            agent.count_front_end("too_many_streams");
            tracing::warn!(caller, "closed a caller of the front end: front_end.max_connections reached");
        }
    }
}

async fn serve<R, W>(agent: Arc<Agent>, read: R, write: W, caller: String, permit: OwnedSemaphorePermit)
where
    R: AsyncRead + Unpin,
    W: AsyncWrite + Unpin,
{
    let Some(front_ends) = &agent.front_ends else { return };
    let stream = match front_ends.open(&caller, agent.config.limits.dial_timeout).await {
        Ok(stream) => stream,
        Err(error) => {
            agent.count_front_end(error.kind());
            tracing::warn!(caller, %error, "closed a caller of the front end");
            return;
        }
    };
    agent.count_front_end("ok");
    let mut record = Record::new(agent.clone(), caller);
    let (up, down) = (&record.counters.up, &record.counters.down);
    let half_closed = agent.config.half_closed_timeout;
    record.outcome = relay(read, write, stream, up, down, half_closed).await.kind();
    drop(permit);
}

/// A caller's record, left when its stream ends in whatever way. `up` is what the caller sent.
struct Record {
    agent: Arc<Agent>,
    caller: String,
    began: Instant,
    counters: Counters,
    outcome: &'static str,
}

impl Record {
    fn new(agent: Arc<Agent>, caller: String) -> Self {
        agent.metrics.front_end_streams.inc();
        Self { agent, caller, began: Instant::now(), counters: Counters::default(), outcome: "tunnel_lost" }
    }
}

impl Drop for Record {
    fn drop(&mut self) {
        let metrics = &self.agent.metrics;
        metrics.front_end_streams.dec();
        let (up, down) = (*self.counters.up.get_mut(), *self.counters.down.get_mut());
        for (direction, bytes) in [("up", up), ("down", down)] {
            metrics.front_end_bytes.get_or_create(&metrics::Direction { direction }).inc_by(bytes);
        }
        tracing::info!(
            caller = self.caller,
            up,
            down,
            seconds = self.began.elapsed().as_secs_f64(),
            outcome = self.outcome,
            "front end stream ended"
        );
    }
}
