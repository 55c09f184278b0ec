//! The further connections of a session, over which the bytes of heavy streams go.

use std::sync::{
    Arc, Mutex, MutexGuard, PoisonError,
    atomic::{AtomicU32, AtomicUsize, Ordering},
};

use tokio::sync::Notify;

use super::connection::Connection;

/// The most further connections that a session may have at once.
const MOST: usize = 8;

/// The further connections of a session.
#[derive(Default)]
pub(super) struct Further {
    connections: Mutex<Vec<Arc<Connection>>>,
    ever: AtomicU32,
    /// Streams that send or receive much.
    heavy: AtomicUsize,
    /// Tells of changes of that number, and of the connections.
    changed: Notify,
}

impl Further {
    fn lock(&self) -> MutexGuard<'_, Vec<Arc<Connection>>> {
        self.connections.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The connection for the next bytes of a heavy stream that has used `current` so far: another one only if there is no
    /// room on that. `None` if there is none.
    pub(super) fn choose(&self, current: &Arc<Connection>) -> Option<Arc<Connection>> {
        let connections = self.lock();
        let usable =
            || connections.iter().filter(|other| other.round_trip.is_measured() && !other.gate.is_closed());
        let present = usable().find(|other| Arc::ptr_eq(other, current));
        let free = |other: &&Arc<Connection>| other.gate.is_free();
        present.filter(free).or_else(|| usable().find(free)).or(present).or_else(|| usable().next()).cloned()
    }

    /// The number for another connection, and the place for it; `None` if there are enough of them.
    pub(super) fn add(&self, start: impl FnOnce(u32) -> Arc<Connection>) -> Option<Arc<Connection>> {
        let mut connections = self.lock();
        if connections.len() >= MOST {
            return None;
        }
        let number = self.ever.fetch_add(1, Ordering::Relaxed).checked_add(1)?;
        let connection = start(number);
        connections.push(connection.clone());
        self.changed.notify_one();
        Some(connection)
    }

    pub(super) fn remove(&self, connection: &Arc<Connection>) {
        self.lock().retain(|other| !Arc::ptr_eq(other, connection));
        self.changed.notify_one();
    }

    pub(super) fn len(&self) -> usize {
        self.lock().len()
    }

    /// The number of streams that send or receive much.
    pub(super) fn heavy(&self) -> usize {
        self.heavy.load(Ordering::Relaxed)
    }

    /// Waits until the load or the number of connections has changed since the last time. Cancel-safe.
    pub(super) async fn changed(&self) {
        self.changed.notified().await;
    }

    /// Counts a stream as heavy, or no longer.
    fn count_heavy(&self, heavy: bool) {
        if heavy {
            self.heavy.fetch_add(1, Ordering::Relaxed);
        } else {
            self.heavy.fetch_sub(1, Ordering::Relaxed);
        }
        self.changed.notify_one();
    }
}

/// Counts one direction of a stream among the heavy ones, while it is.
pub(super) struct HeavyMark {
    further: Arc<Further>,
    is_heavy: bool,
}

impl HeavyMark {
    pub(super) fn new(further: &Arc<Further>) -> Self {
        Self { further: further.clone(), is_heavy: false }
    }

    pub(super) fn set(&mut self, is_heavy: bool) {
        if is_heavy != self.is_heavy {
            self.is_heavy = is_heavy;
            self.further.count_heavy(is_heavy);
        }
    }
}

impl Drop for HeavyMark {
    fn drop(&mut self) {
        self.set(false);
    }
}
