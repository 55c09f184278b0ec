//! The data that a client has sent on one connection and its target has not read yet.

use std::{
    sync::{Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use bytes::{Buf, Bytes, BytesMut};
use tokio::{
    sync::{Notify, watch},
    time::Instant,
};

/// The most bytes that wait for a target while the gRPC stream has several connections.
pub(super) const LIMIT: usize = 1024 * 1024;
/// The most bytes while the connection is alone on its gRPC stream, so that making the client wait delays no other one.
pub(super) const LIMIT_ALONE: usize = 128 * 1024;
/// Bytes that a target with a full queue must read within [`PATIENCE`]; a slower target may not share a gRPC stream.
const QUANTUM: usize = 256 * 1024;
const PATIENCE: Duration = Duration::from_secs(1);

/// The queue between the session, which fills it, and the task that empties it.
#[derive(Debug)]
pub(super) struct Inbox {
    /// The number of the dial that the connection began with.
    pub random: i64,
    waiting: Mutex<Waiting>,
    phase: watch::Sender<Phase>,
    more: Notify,
    room: Notify,
}

/// The phases of a connection from the client's point of view.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Phase {
    Open,
    /// The client has closed; what waits still goes to the target.
    Closing,
    /// The target has read everything.
    Flushed,
    /// The connection ends at once, for this reason.
    Aborted(&'static str),
}

/// The target is too slow.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Overrun;

#[derive(Debug)]
struct Waiting {
    bytes: BytesMut,
    /// When data arrived in the empty queue, or the target completed the last quantum.
    quantum_began: Instant,
    quantum_taken: usize,
}

impl Inbox {
    pub(super) fn new(random: i64) -> Self {
        let waiting = Waiting { bytes: BytesMut::new(), quantum_began: Instant::now(), quantum_taken: 0 };
        Self {
            random,
            waiting: Mutex::new(waiting),
            phase: watch::Sender::new(Phase::Open),
            more: Notify::new(),
            room: Notify::new(),
        }
    }

    /// Queues bytes, or drops them once the connection is no longer open. Waits while the queue is full: without limit if
    /// the connection is `alone` on its gRPC stream, otherwise only for a target that keeps reading.
    pub(super) async fn push(&self, mut data: Bytes, alone: impl Fn() -> bool) -> Result<(), Overrun> {
        while *self.phase.borrow() == Phase::Open {
            let alone = alone();
            let limit = if alone { LIMIT_ALONE } else { LIMIT };
            let patience = {
                let mut waiting = self.waiting();
                let n = limit.saturating_sub(waiting.bytes.len()).min(data.len());
                if n > 0 && waiting.bytes.is_empty() {
                    waiting.begin_quantum();
                }
                waiting.bytes.extend_from_slice(&data.split_to(n));
                (waiting.quantum_began + PATIENCE).saturating_duration_since(Instant::now())
            };
            self.more.notify_one();
            if data.is_empty() {
                return Ok(());
            }
            if alone {
                self.room.notified().await;
            } else if tokio::time::timeout(patience, self.room.notified()).await.is_err()
                && self.waiting().quantum_began.elapsed() >= PATIENCE
            {
                return Err(Overrun);
            }
        }
        Ok(())
    }

    /// Waits for bytes and returns their number, which is 0 when no more will come.
    pub(super) async fn filled(&self) -> usize {
        loop {
            let closing = *self.phase.borrow() != Phase::Open;
            {
                let mut waiting = self.waiting();
                let len = waiting.bytes.len();
                if len > 0 || closing {
                    return len;
                }
                // An idle connection holds no memory.
                waiting.bytes = BytesMut::new();
            }
            self.more.notified().await;
        }
    }

    /// Moves up to `n` bytes to the end of `buffer`.
    pub(super) fn take(&self, n: usize, buffer: &mut BytesMut) {
        {
            let mut waiting = self.waiting();
            let n = n.min(waiting.bytes.len());
            buffer.extend_from_slice(waiting.bytes.get(..n).unwrap_or_default());
            waiting.bytes.advance(n);
            waiting.quantum_taken += n;
            if waiting.quantum_taken >= QUANTUM {
                waiting.begin_quantum();
            }
        }
        self.room.notify_one();
    }

    /// Advances to a later phase; an earlier one is ignored.
    pub(super) fn advance(&self, to: Phase) {
        self.phase.send_if_modified(|phase| {
            let later = match (*phase, to) {
                (Phase::Open, _) | (Phase::Closing, Phase::Flushed | Phase::Aborted(_)) => to != *phase,
                _ => false,
            };
            if later {
                *phase = to;
            }
            later
        });
        self.more.notify_one();
        self.room.notify_one();
    }

    pub(super) fn phase(&self) -> Phase {
        *self.phase.borrow()
    }

    /// Waits for a phase.
    pub(super) async fn reached(&self, wanted: impl FnMut(&Phase) -> bool) -> Phase {
        // The sender belongs to this inbox and therefore exists.
        self.phase.subscribe().wait_for(wanted).await.map_or(Phase::Closing, |phase| *phase)
    }

    fn waiting(&self) -> MutexGuard<'_, Waiting> {
        self.waiting.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Waiting {
    fn begin_quantum(&mut self) {
        (self.quantum_began, self.quantum_taken) = (Instant::now(), 0);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn bytes(n: usize) -> Bytes {
        Bytes::from(vec![b'x'; n])
    }

    #[tokio::test(start_paused = true)]
    async fn a_connection_that_is_alone_waits_and_loses_nothing() {
        let inbox = Inbox::new(1);
        let push = async {
            inbox.push(bytes(10 * LIMIT_ALONE), || true).await.unwrap();
            inbox.advance(Phase::Closing);
        };
        let take = async {
            let mut total = 0;
            loop {
                tokio::time::sleep(Duration::from_secs(100)).await;
                let mut buffer = BytesMut::new();
                match inbox.filled().await {
                    0 => return total,
                    n => {
                        assert!(n <= LIMIT_ALONE);
                        inbox.take(n, &mut buffer);
                        total += buffer.len();
                    }
                }
            }
        };
        assert_eq!(tokio::join!(push, take).1, 10 * LIMIT_ALONE);
    }

    #[tokio::test(start_paused = true)]
    async fn one_of_several_connections_is_overrun_when_its_target_is_stuck() {
        let inbox = Inbox::new(1);
        let began = Instant::now();
        assert_eq!(inbox.push(bytes(LIMIT), || false).await, Ok(()));
        assert_eq!(began.elapsed(), Duration::ZERO);
        assert_eq!(inbox.push(bytes(1), || false).await, Err(Overrun));
        assert_eq!(began.elapsed(), PATIENCE);
        // A target that has been stuck for long delays nobody any further.
        assert_eq!(inbox.push(bytes(1), || false).await, Err(Overrun));
        assert_eq!(began.elapsed(), PATIENCE);
    }

    #[tokio::test(start_paused = true)]
    async fn one_of_several_connections_waits_for_a_target_that_keeps_reading() {
        for (pause_ms, expected) in [(200, Ok(())), (300, Err(Overrun))] {
            let inbox = Inbox::new(1);
            let push = async {
                let pushed = inbox.push(bytes(8 * LIMIT), || false).await;
                inbox.advance(Phase::Closing);
                pushed
            };
            let take = async {
                while inbox.filled().await > 0 && inbox.phase() == Phase::Open {
                    tokio::time::sleep(Duration::from_millis(pause_ms)).await;
                    inbox.take(QUANTUM / 4, &mut BytesMut::new());
                }
            };
            assert_eq!(tokio::join!(push, take).0, expected, "{pause_ms} ms");
        }
    }

    #[tokio::test(start_paused = true)]
    async fn the_end_wakes_the_waiting_tasks() {
        for phase in [Phase::Closing, Phase::Aborted("test")] {
            let inbox = Inbox::new(1);
            let end = async {
                tokio::time::sleep(Duration::from_secs(1)).await;
                inbox.advance(phase);
            };
            let (pushed, ()) = tokio::join!(inbox.push(bytes(LIMIT), || true), end);
            assert_eq!(pushed, Ok(()));
            assert_eq!(inbox.filled().await, LIMIT_ALONE);
            inbox.advance(Phase::Open);
            assert_eq!(inbox.phase(), phase);
        }
    }
}
