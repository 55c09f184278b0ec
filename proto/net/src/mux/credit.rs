//! The credit that this side grants its peer and takes back, and the budget that the windows of a tunnel share.

use std::{
    sync::{MutexGuard, PoisonError},
    time::{Duration, Instant},
};

use proto::mux::{
    budget::Budget,
    frame::{Credit, Frame, Hello},
    window::{Grant, Receive},
};

use super::{
    endpoint::Mux,
    error::Violation,
    state::{Shared, State},
};

impl Mux {
    /// The lock is taken while that of a stream is held, and never the other way round.
    pub(super) fn budget(&self) -> MutexGuard<'_, Budget> {
        self.0.budget.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The reader of a stream has taken `bytes`. Returns what the peer is to be granted. Once that is sent, the stream has to
    /// be told ([`State::on_granted`]).
    pub(super) fn on_taken(
        &self,
        stream: u64,
        shared: &Shared,
        bytes: usize,
        now: Instant,
        round_trip: Duration,
    ) -> Option<Grant> {
        let (taken, size) = {
            let mut state = shared.lock();
            let grow = |size, by| self.budget().grow(stream, size, by, now);
            let taken = state.receive.on_taken(bytes, now, round_trip, grow);
            state.granting |= taken.grant.is_some();
            self.settle(stream, &mut state.receive);
            (taken, state.receive.size())
        };
        if taken.lacks {
            self.share_out(stream, size, now, round_trip);
        }
        taken.grant
    }

    /// The peer has sent all bytes of a stream.
    pub(super) fn on_eof(&self, stream: u64, end: Option<u64>) -> Result<(), Violation> {
        self.change(stream, "EOF", |state| {
            state.on_eof(end)?;
            self.settle(stream, &mut state.receive);
            Ok(())
        })
    }

    /// The peer asks this side to lower its limit.
    pub(super) fn on_retract(&self, stream: u64, limit: u64) -> Result<(), Violation> {
        let Some(shared) = self.find(stream, "RETRACT")? else { return Ok(()) };
        let mut state = shared.lock();
        let limit = state.on_retract(limit)?;
        self.0.first.answer_retract(stream, limit, &shared);
        Ok(())
    }

    /// The peer has lowered its limit.
    pub(super) fn on_retracted(&self, stream: u64, limit: u64) -> Result<(), Violation> {
        self.change(stream, "RETRACTED", |state| {
            let grant = state.receive.on_retracted(limit, Instant::now())?;
            if let Some(Grant { limit, .. }) = grant {
                // The reader may have taken everything, and then it would never say so again.
                self.answer(&Frame::Credit { stream, credit: Credit::UpTo(limit) });
            }
            self.settle(stream, &mut state.receive);
            Ok(())
        })
    }

    /// A stream has `size` bytes of window, and should have more than the budget allows. Has the others give up what they
    /// don't need, and what they have beyond their share if this one has less.
    fn share_out(&self, asking: u64, size: u32, now: Instant, round_trip: Duration) {
        let Some(grown) = self.budget().look(now, round_trip) else { return };
        let others: Vec<_> = {
            let streams = self.streams();
            let grown = grown.into_iter().filter(|stream| *stream != asking);
            grown.filter_map(|stream| Some((stream, streams.open.get(&stream)?.clone()))).collect()
        };
        let is_active = |shared: &Shared| !shared.lock().receive.is_idle(now, round_trip);
        let active = 1 + others.iter().filter(|(_, shared)| is_active(shared)).count();
        let active = u32::try_from(active).unwrap_or(u32::MAX);
        let share = self.budget().share(size, active, now, round_trip);
        for (stream, shared) in &others {
            let mut state = shared.lock();
            state.receive.shrink(share, now, round_trip);
            self.retract(*stream, &mut state, now, round_trip);
            self.settle(*stream, &mut state.receive);
        }
    }

    /// Asks the peer to lower its limit on a stream that does not shrink by itself.
    fn retract(&self, stream: u64, state: &mut State, now: Instant, round_trip: Duration) {
        let can = self.peer().is_some_and(|peer| peer.can(Hello::RETRACT));
        // A CREDIT that is still being sent would raise the limit again behind the RETRACT.
        if !can || state.granting || state.failed.is_some() {
            return;
        }
        let received = state.received();
        if let Some(limit) = state.receive.retract(received, now, round_trip) {
            // It is queued while the stream is locked, so it comes behind a CREDIT that was queued before. It must be sent
            // whether the reader that asks goes on or not.
            self.answer(&Frame::Retract { stream, limit });
        }
    }

    /// Returns to the budget what a window no longer holds of it.
    fn settle(&self, stream: u64, receive: &mut Receive) {
        let freed = receive.settle();
        if freed > 0 {
            self.budget().give_back(stream, freed, receive.held());
        }
    }

    /// The stream is gone.
    pub(super) fn close_window(&self, stream: u64, receive: &mut Receive) {
        let freed = receive.close();
        if freed > 0 {
            self.budget().give_back(stream, freed, 0);
        }
    }
}
