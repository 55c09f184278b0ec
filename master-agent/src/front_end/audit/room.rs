//! The room of one queue of lines, which bounds their number and their bytes.
//!
//! The number of lines never exceeds its bound. The bytes of a line are known only once its request has ended, when it
//! can't wait any more, and a request that was served must be recorded. So whoever has reserved room adds a line of any
//! size, and while the lines have too many bytes, nobody else gets room. Therefore the bytes exceed their bound by at
//! most the lines of the requests that were in progress. Such a request itself holds up to 16 KiB of its target
//! (`recorder.rs`), of which its line has 2 KiB.

use std::sync::{
    Arc,
    atomic::{AtomicUsize, Ordering},
};

use tokio::sync::{Notify, Semaphore};

/// The bytes for which there is room, for each line for which there is room. An ordinary line has a few hundred bytes,
/// so such lines meet the bound on their number first, even if 200,000 watches end at once. The line of a hostile
/// request can have more than ten times as many bytes as this.
const BYTES_PER_LINE: usize = 1024;

/// The room of a queue.
pub(super) struct Room {
    lines: Semaphore,
    /// The bytes of the lines that wait to be written.
    bytes: AtomicUsize,
    max_bytes: usize,
    /// Notifies all that wait when the bytes fall below their maximum.
    drained: Notify,
}

impl Room {
    /// Creates the room of this number of lines.
    pub(super) fn new(lines: usize) -> Arc<Self> {
        Arc::new(Self {
            lines: Semaphore::new(lines),
            bytes: AtomicUsize::new(0),
            max_bytes: lines.saturating_mul(BYTES_PER_LINE),
            drained: Notify::new(),
        })
    }

    /// Reserves room for one line, unless the queue is full.
    pub(super) fn try_reserve(self: &Arc<Self>) -> Option<QueuePermit> {
        if !self.takes_bytes() {
            return None;
        }
        self.lines.try_acquire().ok()?.forget();
        Some(QueuePermit(self.clone()))
    }

    /// Waits for room for one line. Cancel-safe.
    pub(super) async fn reserve(self: &Arc<Self>) -> Option<QueuePermit> {
        self.lines.acquire().await.ok()?.forget();
        let permit = QueuePermit(self.clone());
        loop {
            // Created before the check, it also sees a notification between the check and the wait.
            let drained = self.drained.notified();
            if self.takes_bytes() {
                return Some(permit);
            }
            drained.await;
        }
    }

    fn takes_bytes(&self) -> bool {
        self.bytes.load(Ordering::Acquire) < self.max_bytes
    }
}

/// Reserves room for one line in a queue until the line has been written.
pub struct QueuePermit(Arc<Room>);

impl QueuePermit {
    /// Fills the room with a line of so many bytes.
    pub(super) fn occupy(self, bytes: usize) -> Occupied {
        self.0.bytes.fetch_add(bytes, Ordering::AcqRel);
        Occupied { permit: self, bytes }
    }
}

impl Drop for QueuePermit {
    fn drop(&mut self) {
        self.0.lines.add_permits(1);
    }
}

/// The room that a line occupies until it has been written.
pub(super) struct Occupied {
    permit: QueuePermit,
    bytes: usize,
}

impl Drop for Occupied {
    fn drop(&mut self) {
        let room = &self.permit.0;
        let before = room.bytes.fetch_sub(self.bytes, Ordering::AcqRel);
        if before >= room.max_bytes && before - self.bytes < room.max_bytes {
            room.drained.notify_waiters();
        }
    }
}
