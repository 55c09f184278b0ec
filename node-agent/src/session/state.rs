//! What a session's handler shares with the task that supervises the session.

use std::sync::{
    Mutex, MutexGuard, OnceLock, PoisonError,
    atomic::{AtomicBool, Ordering},
};

use proto::mux::frame::Hello;
use proto_net::{channel::Channels, mux::Mux};
use tokio::sync::{mpsc, watch};
use tokio_util::sync::CancellationToken;

/// The state of one session.
pub(super) struct SessionState {
    /// The streams that are channels of their own.
    pub(super) channels: Channels,
    muxes: Mutex<Muxes>,
    /// The multiplexer of another session that this one has joined.
    joined: watch::Sender<Option<Mux>>,
    /// Where the master's calls for further connections go.
    pub(super) calls: mpsc::Sender<()>,
    /// Cancelled once the master has asked for another link in place of this one.
    pub(super) relink: CancellationToken,
    replaced: AtomicBool,
    /// Whether the peer has dialled this node, rather than been called home.
    is_dialled: bool,
    /// Whether the master has been asked for another link.
    asked_for_link: AtomicBool,
    /// Why an authenticated master does not want the link.
    pub(super) refusal: OnceLock<String>,
}

#[derive(Default)]
struct Muxes {
    /// The multiplexer of the tunnel.
    of_master: Option<Mux>,
    /// The multiplexer on which this node opens streams to the front end of a master of an earlier release.
    of_node: Option<Mux>,
}

impl SessionState {
    pub(super) fn new(channels: Channels, calls: mpsc::Sender<()>, is_dialled: bool) -> Self {
        Self {
            channels,
            muxes: Mutex::default(),
            joined: watch::Sender::new(None),
            calls,
            relink: CancellationToken::new(),
            replaced: AtomicBool::new(false),
            is_dialled,
            asked_for_link: AtomicBool::new(false),
            refusal: OnceLock::new(),
        }
    }

    pub(super) fn set_joined(&self, mux: Mux) {
        self.joined.send_replace(Some(mux));
    }

    pub(super) fn is_joined(&self) -> bool {
        self.joined.borrow().is_some()
    }

    /// Waits until the session that this one has joined has ended. Never completes for a session of its own.
    pub(super) async fn joined_ended(&self) {
        let mut joined = self.joined.subscribe();
        let mux = joined.wait_for(Option::is_some).await.ok().and_then(|mux| mux.clone());
        match mux {
            Some(mux) => mux.closed().await,
            None => std::future::pending().await,
        }
    }

    pub(super) fn set_master_mux(&self, mux: Mux) {
        self.muxes().of_master = Some(mux);
    }

    pub(super) fn set_node_mux(&self, mux: Mux) {
        self.muxes().of_node = Some(mux);
    }

    /// Notes that another link serves new streams: the master opens none here, or this node has made another link.
    pub(super) fn set_replaced(&self) {
        self.replaced.store(true, Ordering::Relaxed);
    }

    pub(super) fn is_replaced(&self) -> bool {
        self.replaced.load(Ordering::Relaxed)
    }

    /// Whether the master can have a link to another process of this agent. It has to make that link itself if it dials
    /// this node, which masters of an earlier release do not do.
    pub(super) fn is_replaceable(&self) -> bool {
        let understands = |mux: &Mux| mux.peer().is_some_and(|peer| peer.can(Hello::RELINK));
        !self.is_dialled || self.muxes().of_master.as_ref().is_some_and(understands)
    }

    /// Whether the master can't be told of a drain. A further connection belongs to a session that knows.
    pub(super) fn is_deaf_to_drains(&self) -> bool {
        !self.is_joined() && !self.muxes().of_master.as_ref().is_some_and(Mux::understands_drain)
    }

    /// Asks a master that dials this node for another link, the first time that this is called.
    pub(super) async fn ask_for_link(&self) {
        let mux = self.muxes().of_master.clone().filter(|_| self.is_dialled);
        if let Some(mux) = mux
            && !self.asked_for_link.swap(true, Ordering::Relaxed)
        {
            mux.ask_to_relink().await;
        }
    }

    pub(super) fn streams_open(&self) -> usize {
        let muxes = self.muxes();
        let in_muxes = muxes.of_master.iter().chain(&muxes.of_node).map(Mux::streams_open);
        self.channels.len() + in_muxes.sum::<usize>()
    }

    pub(super) fn has_further_connections(&self) -> bool {
        self.muxes().of_master.as_ref().is_some_and(|mux| mux.further_connections() > 0)
    }

    /// Tells the master that no new streams are accepted or opened.
    pub(super) async fn go_away(&self, reason: &str) {
        let muxes: Vec<_> = {
            let muxes = self.muxes();
            muxes.of_master.iter().chain(&muxes.of_node).cloned().collect()
        };
        for mux in muxes {
            mux.go_away(reason).await;
        }
    }

    fn muxes(&self) -> MutexGuard<'_, Muxes> {
        self.muxes.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
