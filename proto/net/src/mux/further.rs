//! The further connections of a session, over which the bytes of heavy streams go.

use std::{
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicU32, AtomicUsize, Ordering},
    },
    time::{Duration, Instant},
};

use tokio::sync::Notify;

use super::connection::Connection;

/// After this time, a stream that says nothing no longer counts as heavy.
const LATELY: Duration = Duration::from_secs(10);
/// The most further connections that a session may have at once.
const MOST: usize = 8;

/// The further connections of a session.
#[derive(Default)]
pub(super) struct Further {
    connections: Mutex<Vec<Arc<Connection>>>,
    ever: AtomicU32,
    /// Streams that send or receive much, and when one of them last did.
    heavy: AtomicUsize,
    used: Mutex<Option<Instant>>,
    /// Tells of changes of that number, and of the connections.
    changed: Notify,
}

impl Further {
    fn lock(&self) -> MutexGuard<'_, Vec<Arc<Connection>>> {
        self.connections.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The connection for the next bytes of a heavy stream that has used `current` so far: another one only if there is no
    /// room on that, and not if the stream `stays`. `None` if there is none.
    pub(super) fn choose(&self, current: &Arc<Connection>, stays: bool) -> Option<Arc<Connection>> {
        let connections = self.lock();
        let usable =
            || connections.iter().filter(|other| other.gate.is_measured() && !other.gate.is_closed());
        let present = usable().find(|other| Arc::ptr_eq(other, current));
        let free = |other: &&Arc<Connection>| other.gate.is_free();
        let keeps = present.filter(|other| stays || free(other));
        keeps.or_else(|| usable().find(free)).or(present).or_else(|| usable().next()).cloned()
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

    /// The number of connections that there have been, with those that are gone.
    pub(super) fn ever(&self) -> u32 {
        self.ever.load(Ordering::Relaxed)
    }

    /// The number of streams that send or receive much; 0 if none of them has done so lately.
    pub(super) fn heavy(&self) -> usize {
        let used = *self.used.lock().unwrap_or_else(PoisonError::into_inner);
        let lately = used.is_some_and(|used| used.elapsed() < LATELY);
        if lately { self.heavy.load(Ordering::Relaxed) } else { 0 }
    }

    /// For how long no stream has sent or received much.
    pub(super) fn unused_for(&self) -> Duration {
        let used = *self.used.lock().unwrap_or_else(PoisonError::into_inner);
        used.map_or(Duration::MAX, |used| used.elapsed())
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
        if is_heavy {
            *self.further.used.lock().unwrap_or_else(PoisonError::into_inner) = Some(Instant::now());
        }
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
