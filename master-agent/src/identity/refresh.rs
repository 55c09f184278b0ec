//! Reads what other processes change in the store, and reports whether the store can be read.
//!
//! The refresh has a thread of its own. Name look-ups and other work that blocks share the threads of the runtime, and
//! neither is to wait for the other. While the store can't be read, what was read last stays in force.

use std::{
    convert::Infallible,
    io,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        mpsc::{self, RecvTimeoutError},
    },
    thread,
    time::Duration,
};

use proto_net::log_throttle::LogThrottle;
use tokio::time::Instant;

use super::store::Store;

/// How often changes by other processes are looked for. They take effect within two seconds.
const REFRESH_INTERVAL: Duration = Duration::from_secs(1);
/// How long a refresh may take before that is remarked on. It waits for transactions, of which each takes up to 5 s.
const SLOW: Duration = Duration::from_secs(15);

/// Whether the store can be read.
pub struct StoreHealth {
    state: Mutex<State>,
    log: LogThrottle,
}

struct State {
    /// When the store was last read.
    read: Instant,
    /// Why it could not be read since.
    error: Option<String>,
}

/// The thread that refreshes. It ends by itself some time after this has been dropped.
pub struct Refresher {
    _stop: mpsc::Sender<Infallible>,
}

impl StoreHealth {
    /// The health of a store that has just been read.
    pub fn new() -> Self {
        Self { state: Mutex::new(State { read: Instant::now(), error: None }), log: LogThrottle::default() }
    }

    /// Returns for how long the store has not been readable, and why, or `None` if it is readable.
    pub fn remark(&self) -> Option<String> {
        let state = self.state();
        let age = state.read.elapsed();
        let seconds = age.as_secs();
        let stays = "what was read last stays in force";
        match &state.error {
            Some(error) => Some(format!("store: not readable for {seconds} s, {stays}: {error}")),
            None if age >= SLOW => Some(format!("store: no answer for {seconds} s, {stays}")),
            None => None,
        }
    }

    fn record(&self, refreshed: anyhow::Result<bool>) {
        let mut state = self.state();
        match refreshed {
            Ok(_) => {
                if state.error.is_some() {
                    tracing::info!("the store can be read again");
                }
                *state = State { read: Instant::now(), error: None };
            }
            Err(error) => {
                let error = format!("{error:#}");
                if let Some(times) = self.log.count(1) {
                    tracing::error!(error, times, "can't read the store; what was read last stays in force");
                }
                state.error = Some(error);
            }
        }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Default for StoreHealth {
    fn default() -> Self {
        Self::new()
    }
}

impl Refresher {
    /// Starts the thread.
    pub fn start(store: Arc<dyn Store>, health: Arc<StoreHealth>) -> io::Result<Self> {
        let (stop, stopped) = mpsc::channel();
        thread::Builder::new().name("store".into()).spawn(move || {
            loop {
                health.record(store.refresh());
                if stopped.recv_timeout(REFRESH_INTERVAL) != Err(RecvTimeoutError::Timeout) {
                    return;
                }
            }
        })?;
        Ok(Self { _stop: stop })
    }
}

#[cfg(test)]
mod tests {
    use proto::NodeName;

    use super::*;
    use crate::identity::{
        fingerprint,
        sqlite::SqliteStore,
        tests::{TempDir, new_key},
    };

    #[test]
    fn changes_of_another_process_are_known_while_the_runtime_has_no_thread_for_blocking_work() {
        let dir = TempDir::new();
        let store: Arc<dyn Store> = Arc::new(SqliteStore::open(&dir.0).unwrap());
        let other = SqliteStore::open(&dir.0).unwrap();
        let node: NodeName = "n1".parse().unwrap();
        store.remember_node(&node, new_key().public_key(), &[]).unwrap();
        let runtime = tokio::runtime::Builder::new_current_thread().max_blocking_threads(1).build().unwrap();
        let (release, released) = mpsc::channel::<()>();
        runtime.spawn_blocking(move || released.recv());
        let mut changes = store.changes();
        let _refresher = Refresher::start(store.clone(), Arc::default()).unwrap();
        let key = new_key();
        other.remember_node(&node, key.public_key(), &[]).unwrap();
        runtime.block_on(changes.changed()).unwrap();
        assert_eq!(store.joined_key(&node), Some(fingerprint(key.public_key())));
        drop(release);
    }

    #[tokio::test(start_paused = true)]
    async fn a_store_that_cannot_be_read_is_remarked_on_until_it_can() {
        let health = StoreHealth::new();
        let pass = |seconds| tokio::time::advance(Duration::from_secs(seconds));
        assert_eq!(health.remark(), None);
        pass(3).await;
        health.record(Err(anyhow::anyhow!("disk I/O error")));
        let remark = |seconds| {
            format!("store: not readable for {seconds} s, what was read last stays in force: disk I/O error")
        };
        assert_eq!(health.remark(), Some(remark(3)));
        pass(20).await;
        health.record(Err(anyhow::anyhow!("disk I/O error")));
        assert_eq!(health.remark(), Some(remark(23)));
        health.record(Ok(false));
        assert_eq!(health.remark(), None);
    }

    #[tokio::test(start_paused = true)]
    async fn a_refresh_that_hangs_is_remarked_on() {
        let health = StoreHealth::new();
        tokio::time::advance(SLOW).await;
        let remark = "store: no answer for 15 s, what was read last stays in force";
        assert_eq!(health.remark().as_deref(), Some(remark));
    }
}
