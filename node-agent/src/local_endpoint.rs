//! The local endpoint: what callers on this node use in place of the front end's port, which they may have no route
//! to. Their bytes, TLS from end to end, go through a tunnel to the front end of the master at its other end; this
//! agent can't read them and the master lets nothing else be reached that way.

use std::{
    sync::{
        Arc,
        atomic::{AtomicU64, AtomicUsize, Ordering},
    },
    time::{Duration, Instant},
};

use proto::{
    DialError, Target,
    io::{
        admin::accept_error,
        mux::{Events, Mux, Notice},
        relay::{Counters, relay},
        socket,
        stream::Stream,
    },
    mux::FRONT_END,
};
use tokio::{
    io::{AsyncRead, AsyncWrite},
    net::{TcpListener, UnixListener},
    sync::{OwnedSemaphorePermit, Semaphore, watch},
};

use crate::{agent::Agent, config::LocalEndpointConfig, metrics};

/// The masters whose front end can be reached now, in the order in which they came.
pub struct FrontEnds {
    offers: watch::Sender<Vec<(u64, Mux)>>,
    next: AtomicUsize,
    ids: AtomicU64,
    permits: Arc<Semaphore>,
    wait: Duration,
}

impl FrontEnds {
    pub fn new(config: &LocalEndpointConfig) -> Self {
        Self {
            offers: watch::Sender::new(Vec::new()),
            next: AtomicUsize::new(0),
            ids: AtomicU64::new(0),
            permits: Arc::new(Semaphore::new(config.max_connections)),
            wait: config.wait,
        }
    }

    /// Opens a stream to one of them in turn. Waits a short time for one to come.
    async fn open(&self, origin: &str, timeout: Duration) -> Result<Stream, DialError> {
        let target: Target = FRONT_END.parse().map_err(|_| DialError::BadTarget(FRONT_END.to_owned()))?;
        let deadline = tokio::time::Instant::now() + self.wait;
        let mut offers = self.offers.subscribe();
        let mut failed = None;
        loop {
            let usable = offers.borrow_and_update().iter().map(|(_, mux)| mux.clone()).collect::<Vec<_>>();
            let first = self.next.fetch_add(1, Ordering::Relaxed) % usable.len().max(1);
            let in_turn = usable.iter().cycle().skip(first).take(usable.len());
            for mux in in_turn.filter(|mux| !mux.is_going_away()) {
                match mux.open(&target, origin, timeout).await {
                    Ok(stream) => return Ok(stream),
                    Err(error) if error.retry_elsewhere() => failed = Some(error),
                    Err(error) => return Err(error),
                }
            }
            if let Some(error @ DialError::TooManyStreams(_)) = failed {
                return Err(error);
            }
            let changed = tokio::time::timeout_at(deadline, offers.changed()).await;
            if !matches!(changed, Ok(Ok(()))) {
                return Err(failed.unwrap_or_else(|| self.none()));
            }
        }
    }

    fn none(&self) -> DialError {
        DialError::NoTunnel {
            node: "this".to_owned(),
            state: format!(
                "within {} no master offered its front end; a master does that where it has `front_end:` with `through_tunnels`",
                humantime::format_duration(self.wait)
            ),
        }
    }
}

/// Offers a master's front end to callers for as long as its multiplexer lives, or until the master's certificate has
/// `expired`.
pub async fn offer(agent: Arc<Agent>, mux: Mux, mut events: Events, expired: impl Future<Output = ()>) {
    let Some(front_ends) = &agent.front_ends else { return };
    let id = front_ends.ids.fetch_add(1, Ordering::Relaxed);
    front_ends.offers.send_modify(|offers| offers.push((id, mux)));
    let _withdrawn = Withdrawn { front_ends, id };
    tracing::info!("the master offers its front end");
    tokio::pin!(expired);
    loop {
        let notice = tokio::select! {
            notice = events.notices.recv() => notice,
            () = &mut expired => return,
        };
        let Some(notice) = notice else { return };
        match notice {
            Notice::GoAway(reason) => tracing::info!(reason, "the master's front end takes no new callers"),
            Notice::Certificate(_) => tracing::warn!("a certificate came where none is expected; ignored"),
        }
    }
}

struct Withdrawn<'a> {
    front_ends: &'a FrontEnds,
    id: u64,
}

impl Drop for Withdrawn<'_> {
    fn drop(&mut self) {
        self.front_ends.offers.send_modify(|offers| offers.retain(|(id, _)| *id != self.id));
    }
}

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
    match front_ends.permits.clone().try_acquire_owned() {
        Ok(permit) => {
            agent.sessions.spawn(serve(agent.clone(), read, write, caller, permit));
        }
        Err(_) => {
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
