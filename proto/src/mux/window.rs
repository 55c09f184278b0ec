//! Flow control of one direction of one stream, in bytes since the stream began. The time is an argument.

use std::time::{Duration, Instant};

use super::{
    Version,
    demand::{Demand, SHORTEST_ROUND_TRIP, period},
};

/// The number of bytes that each side may send on a new stream before the first CREDIT. Part of the first version of the
/// protocol; later ones say it.
pub const INITIAL: u32 = 256 * 1024;
/// The largest window of a stream of `streams-v1` in bytes. Part of the protocol: a peer that grants more breaks it.
pub const MAX: u32 = 32 * 1024 * 1024;
/// The same for `streams-v2`. It is enough for 1 Gbit/s over a round trip of 300 ms.
const MAX_V2: u32 = 64 * 1024 * 1024;
/// Less is not worth taking back.
const LEAST_RETRACTED: u32 = INITIAL / 2;

/// The largest window of a stream in bytes.
pub fn largest(version: Version) -> u32 {
    match version {
        Version::V1 => MAX,
        Version::V2 => MAX_V2,
    }
}

/// The window that the receiver of one direction grants. It grows while the reader takes more than half a window in a round
/// trip, since then the window and not the reader limits the stream. It never grows for a reader that doesn't read.
///
/// What a window has beyond its initial size comes from a shared [`Budget`](super::budget::Budget). It gives that back as it
/// shrinks, either because the reader takes bytes for which nothing is granted, or because the peer lowers its limit
/// (RETRACT). After each change, [`settle`](Self::settle) tells how much that is.
#[derive(Debug)]
pub struct Receive {
    version: Version,
    /// The window that the reader is to have. While it shrinks, the peer may still send more.
    size: u32,
    /// The bytes that this window holds of the budget. With the initial size, they cover both `size` and whatever the peer
    /// can still make this side buffer.
    held: u32,
    /// The number of bytes that the peer may send in all.
    limit: u64,
    /// The number of bytes that the reader has taken.
    taken: u64,
    /// The end of the bytes that have come, whether in order or not.
    furthest: u64,
    /// The number of bytes of the direction, once it is known.
    end: Option<u64>,
    /// The bytes that the reader has taken since it was last decided whether the window grows, and when that was.
    measured: (u64, Instant),
    /// When the window was last found too small.
    limited: Option<Instant>,
    demand: Demand,
    /// Since when the peer may send more than the window that the reader is to have.
    shrinking: Option<Instant>,
    retract: Retract,
}

/// Where the wish stands that the peer lowers its limit.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Retract {
    None,
    /// The peer was asked to lower it to this.
    Asked(u64),
    Answered(Instant),
}

/// The reaction to bytes that the reader has taken.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Taken {
    pub grant: Option<Grant>,
    /// The window should have grown by more than the budget allowed.
    pub lacks: bool,
}

/// How far the peer may send from now on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Grant {
    /// So many bytes more than before.
    pub by: u32,
    pub limit: u64,
}

/// What a peer may not do with a window.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub enum WindowError {
    #[error("the peer sent more than its window")]
    Overrun,
    #[error("the peer left out or repeated bytes")]
    Offset,
    #[error("the peer leaves too many gaps")]
    Gaps,
    #[error("RETRACTED without a RETRACT")]
    Unasked,
    #[error("RETRACTED with a limit that can't be")]
    Retracted,
}

impl Receive {
    pub fn new(version: Version, now: Instant) -> Self {
        Self {
            version,
            size: INITIAL,
            held: 0,
            limit: u64::from(INITIAL),
            taken: 0,
            furthest: 0,
            end: None,
            measured: (0, now),
            limited: None,
            demand: Demand::new(now),
            shrinking: None,
            retract: Retract::None,
        }
    }

    /// The window that the reader is to have.
    pub fn size(&self) -> u32 {
        self.size
    }

    /// The bytes that this window holds of the budget.
    pub fn held(&self) -> u32 {
        self.held
    }

    /// Whether the reader has taken nothing for a while.
    pub fn is_idle(&self, now: Instant, round_trip: Duration) -> bool {
        self.demand.is_idle(now, round_trip)
    }

    /// The peer has sent `end` bytes, or more.
    pub fn check(&mut self, end: u64) -> Result<(), WindowError> {
        if end > self.limit {
            return Err(WindowError::Overrun);
        }
        self.furthest = self.furthest.max(end);
        Ok(())
    }

    /// The peer has sent `end` bytes and will send no more. From now on nothing is granted.
    pub fn on_end(&mut self, end: u64) {
        self.end = Some(end);
    }

    /// The reader has taken `bytes`. `grow` gets the size of the window, and the number of bytes by which it is to grow. It
    /// takes as many of them from the budget as it returns.
    pub fn on_taken(
        &mut self,
        bytes: usize,
        now: Instant,
        round_trip: Duration,
        grow: impl FnOnce(u32, u32) -> u32,
    ) -> Taken {
        let bytes = bytes as u64;
        self.taken = self.taken.saturating_add(bytes);
        self.measured.0 = self.measured.0.saturating_add(bytes);
        self.demand.add(bytes, now, round_trip);
        let lacks = self.is_too_small(now, round_trip) && self.grow(grow);
        Taken { grant: self.grant(), lacks }
    }

    /// Lets the window shrink to what its reader needs, and to its `share` of the budget. This takes nothing back that the
    /// peer has been granted, so the reader has to take bytes until the window is smaller.
    pub fn shrink(&mut self, share: Option<u32>, now: Instant, round_trip: Duration) {
        let ample = u32::try_from(self.demand.ample(now, round_trip)).unwrap_or(u32::MAX);
        let is_ample = self.limited.is_none_or(|at| is_long_ago(at, now, round_trip));
        let needed = if ample <= self.size / 2 && is_ample { ample } else { self.size };
        let size = needed.min(share.unwrap_or(u32::MAX)).max(INITIAL);
        if size < self.size {
            self.size = size;
            self.measured = (0, now);
            self.shrinking.get_or_insert(now);
        }
    }

    /// The limit to which the peer is to be asked to lower its own, if the reader doesn't take enough for the window to
    /// shrink by itself. `received` bytes have come in order. Nothing is granted until the answer has come.
    pub fn retract(&mut self, received: u64, now: Instant, round_trip: Duration) -> Option<u64> {
        let is_due = match self.retract {
            Retract::None => true,
            Retract::Asked(_) => false,
            Retract::Answered(at) => is_long_ago(at, now, round_trip),
        };
        let is_slow = self.is_idle(now, round_trip)
            || self.shrinking.is_some_and(|since| is_long_ago(since, now, round_trip));
        if !is_due || !is_slow || self.end.is_some() {
            return None;
        }
        let limit = received.max(self.taken).saturating_add(u64::from(self.size));
        if self.limit.saturating_sub(limit) < u64::from(LEAST_RETRACTED) {
            return None;
        }
        self.retract = Retract::Asked(limit);
        Some(limit)
    }

    /// The peer has lowered its limit to `limit`. Returns what to grant for the bytes that the reader has taken meanwhile.
    pub fn on_retracted(&mut self, limit: u64, now: Instant) -> Result<Option<Grant>, WindowError> {
        let Retract::Asked(asked) = self.retract else { return Err(WindowError::Unasked) };
        if limit < asked.max(self.furthest) || limit > self.limit {
            return Err(WindowError::Retracted);
        }
        self.limit = limit;
        self.retract = Retract::Answered(now);
        Ok(self.grant())
    }

    /// The number of bytes that this window no longer holds of the budget.
    pub fn settle(&mut self) -> u32 {
        let may_come = self.end.map_or(self.limit, |end| end.min(self.limit)).saturating_sub(self.taken);
        let size = u64::from(self.size);
        if may_come <= size {
            self.shrinking = None;
        }
        let covered = if self.end.is_some() { may_come } else { may_come.max(size) };
        let held = u32::try_from(covered.saturating_sub(u64::from(INITIAL))).unwrap_or(u32::MAX);
        let freed = self.held.saturating_sub(held);
        self.held -= freed;
        freed
    }

    /// Nothing that comes is kept any more. Returns what this window has held of the budget.
    pub fn close(&mut self) -> u32 {
        self.end = Some(self.taken);
        std::mem::take(&mut self.held)
    }

    /// Whether the reader has just taken more than half a window in a round trip.
    fn is_too_small(&mut self, now: Instant, round_trip: Duration) -> bool {
        let (half, (taken, since)) = (u64::from(self.size / 2), self.measured);
        if taken < half {
            return false;
        }
        self.measured = (0, now);
        let round_trip = round_trip.max(SHORTEST_ROUND_TRIP).as_nanos();
        let took = now.saturating_duration_since(since).as_nanos();
        let is_too_small =
            u128::from(taken).saturating_mul(round_trip) > u128::from(half).saturating_mul(took);
        if is_too_small {
            self.limited = Some(now);
        }
        is_too_small
    }

    /// Returns whether the window should have grown by more than the budget allowed.
    fn grow(&mut self, grow: impl FnOnce(u32, u32) -> u32) -> bool {
        let by = self.size.min(largest(self.version).saturating_sub(self.size));
        let is_asked = matches!(self.retract, Retract::Asked(_));
        if by == 0 || is_asked || self.shrinking.is_some() || self.end.is_some() {
            return false;
        }
        let gets = grow(self.size, by).min(by);
        self.size += gets;
        self.held += gets;
        gets < by
    }

    /// Returns the grant for the peer, if one is due.
    fn grant(&mut self) -> Option<Grant> {
        if self.end.is_some() || matches!(self.retract, Retract::Asked(_)) {
            return None;
        }
        let limit = self.taken.saturating_add(u64::from(self.size));
        let by = u32::try_from(limit.checked_sub(self.limit)?).unwrap_or(u32::MAX);
        if by < self.least_grant() {
            return None;
        }
        self.limit = limit;
        Some(Grant { by, limit })
    }

    /// With grants of a quarter of the window, the sender of a stream that needs three quarters of it never waits.
    fn least_grant(&self) -> u32 {
        match self.version {
            Version::V1 => self.size / 2,
            Version::V2 => (self.size / 4).max(INITIAL / 2),
        }
    }
}

/// Whether so much time has passed since then that what a reader needs may have changed.
fn is_long_ago(at: Instant, now: Instant, round_trip: Duration) -> bool {
    now.saturating_duration_since(at) >= period(round_trip)
}

#[cfg(test)]
mod tests;
