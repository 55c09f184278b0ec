//! Measures the round trip between the multiplexers of two agents with PING and PONG.

use std::{
    sync::{
        Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

use proto::mux::flow::PingId;

#[derive(Default)]
pub(super) struct RoundTrip {
    /// The PING that has not been answered yet, and when it was sent.
    ping: Mutex<Option<(PingId, Instant)>>,
    /// Zero until measured.
    nanoseconds: AtomicU64,
    measured: AtomicBool,
}

impl RoundTrip {
    /// The round trip, once it has been measured.
    pub(super) fn get(&self) -> Option<Duration> {
        let nanoseconds = self.nanoseconds.load(Ordering::Relaxed);
        (nanoseconds > 0).then(|| Duration::from_nanos(nanoseconds))
    }

    /// Whether the peer has ever answered.
    pub(super) fn is_measured(&self) -> bool {
        self.measured.load(Ordering::Relaxed)
    }

    /// The next PING to send. There is none while the one before is not answered, which then takes longer than what was
    /// measured before. The identifier is random, so that a peer cannot answer a PING that it has not received.
    pub(super) fn next_ping(&self) -> Option<PingId> {
        let mut ping = self.ping();
        if let Some((_, sent)) = *ping {
            self.nanoseconds.fetch_max(nanoseconds(sent.elapsed()), Ordering::Relaxed);
            return None;
        }
        let id = rand::random();
        *ping = Some((id, Instant::now()));
        Some(id)
    }

    /// Takes the answer to that PING. Returns `false` if `id` is of another.
    pub(super) fn on_pong(&self, id: PingId) -> bool {
        let Some((_, sent)) = self.ping().take_if(|(asked, _)| *asked == id) else { return false };
        let sample = nanoseconds(sent.elapsed());
        let old = self.nanoseconds.load(Ordering::Relaxed);
        // A shorter time is the better measurement; a longer one may be a busy moment, or a new path.
        let new = if old == 0 || sample < old { sample } else { old - old / 8 + sample / 8 };
        self.nanoseconds.store(new, Ordering::Relaxed);
        self.measured.store(true, Ordering::Relaxed);
        true
    }

    fn ping(&self) -> MutexGuard<'_, Option<(PingId, Instant)>> {
        self.ping.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// At least one, as zero stands for what has not been measured.
fn nanoseconds(time: Duration) -> u64 {
    u64::try_from(time.as_nanos()).unwrap_or(u64::MAX).max(1)
}
