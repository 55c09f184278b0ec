//! One stream's state: what has come, what may be sent, how it ended, and who is to be woken.

use std::{
    sync::{Mutex, MutexGuard, PoisonError},
    task::Waker,
    time::Instant,
};

use bytes::BytesMut;
use proto::{
    DialError,
    mux::{Version, frame::Credit, order::Early, window},
};
use tokio::sync::oneshot;

use super::error::Violation;
use crate::stream::error::StreamError;

/// Where the answer to OPEN goes.
pub(super) type Answer = oneshot::Sender<Result<(), DialError>>;

/// The state of a stream, shared between its halves and whoever feeds it.
pub(super) struct Shared(Mutex<State>);

impl Shared {
    pub(super) fn new(state: State) -> Self {
        Self(Mutex::new(state))
    }

    pub(super) fn lock(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// What is known of one stream.
pub(super) struct State {
    /// Bytes that have come and that nobody has read yet.
    pub(super) inbox: BytesMut,
    /// The number of bytes that have come in order, and what has come before its turn.
    received: u64,
    early: Early,
    pub(super) receive: window::Receive,
    /// A CREDIT has been decided on, and may not have been sent yet.
    pub(super) granting: bool,
    version: Version,
    /// The number of bytes that were sent, and that may be.
    pub(super) sent: u64,
    limit: u64,
    /// The number of bytes that the writer has been allowed to send, of which some may be on their way already.
    promised: u64,
    /// The answer to a RETRACT has not been sent yet.
    retracting: bool,
    /// The further connections on which bytes were sent, each with what had been sent on it in all by then.
    used: Vec<(u32, u64)>,
    pub(super) received_eof: bool,
    pub(super) failed: Option<StreamError>,
    /// The peer need not be told when the stream is dropped: both directions have ended, OPEN was refused or has not
    /// been sent.
    pub(super) ended: bool,
    pub(super) reset_reason: Option<String>,
    /// Takes the answer to OPEN, until it has come.
    answer: Option<Answer>,
    pub(super) reader: Option<Waker>,
    pub(super) writer: Option<Waker>,
    pub(super) watch: Option<Waker>,
}

impl State {
    /// A stream on which this side may send `limit` bytes. `answer` belongs to the side that opens the stream.
    pub(super) fn new(version: Version, answer: Option<Answer>, limit: u64) -> Self {
        Self {
            inbox: BytesMut::new(),
            received: 0,
            early: Early::default(),
            receive: window::Receive::new(version, Instant::now()),
            granting: false,
            version,
            sent: 0,
            limit,
            promised: 0,
            retracting: false,
            used: Vec::new(),
            received_eof: false,
            failed: None,
            ended: false,
            reset_reason: None,
            answer,
            reader: None,
            writer: None,
            watch: None,
        }
    }

    /// The side that opens a stream receives nothing on it before the answer. The other side waits for no answer.
    fn check_answered(&self, frame: &'static str) -> Result<(), Violation> {
        if self.answer.is_some() { Err(Violation::NotAnswered(frame)) } else { Ok(()) }
    }

    /// The number of bytes that have come in order.
    pub(super) fn received(&self) -> u64 {
        self.received
    }

    /// The CREDIT that was decided on has been sent.
    pub(super) fn on_granted(&mut self) {
        self.granting = false;
    }

    /// The number of bytes that may be sent now, but at most `most`. The writer may send so many whatever the peer says until
    /// then.
    pub(super) fn promise(&mut self, most: usize) -> usize {
        let credit = usize::try_from(self.limit.saturating_sub(self.sent)).unwrap_or(usize::MAX).min(most);
        self.promised = self.promised.max(self.sent.saturating_add(credit as u64));
        credit
    }

    /// Bytes were sent.
    pub(super) fn on_sent(&mut self, bytes: u64) {
        self.sent = self.sent.saturating_add(bytes);
    }

    /// They were sent on the further connection with this number, on which `sent` bytes have been sent in all.
    pub(super) fn on_sent_further(&mut self, connection: u32, sent: u64) {
        match self.used.iter_mut().find(|(number, _)| *number == connection) {
            Some((_, last)) => *last = sent,
            None => self.used.push((connection, sent)),
        }
    }

    /// The further connection with this number is lost, on which `arrived` bytes have arrived as far as is known. Returns
    /// whether the stream ends with it: because it has sent others on it, or because the peer has, and has forgotten the
    /// stream since then.
    pub(super) fn ends_with(&mut self, connection: u32, arrived: u64) -> bool {
        let sent =
            self.used.extract_if(.., |(number, _)| *number == connection).any(|(_, last)| last > arrived);
        sent || self.early.has_end() && !self.received_eof
    }

    /// Nothing was sent after all on the further connection with this number.
    pub(super) fn forget_further(&mut self, connection: u32) {
        self.used.retain(|(number, _)| *number != connection);
    }

    /// Bytes have come. On a further connection, they may overtake the answer to OPEN.
    pub(super) fn on_data(
        &mut self,
        is_first: bool,
        offset: Option<u64>,
        bytes: &[u8],
    ) -> Result<(), Violation> {
        if is_first {
            self.check_answered("DATA")?;
        }
        if self.received_eof {
            return Err(Violation::Ended("DATA"));
        }
        let offset = offset.unwrap_or(self.received);
        self.receive.check(offset.saturating_add(bytes.len() as u64))?;
        if !self.early.on_data(offset, bytes, self.received)? {
            return Ok(());
        }
        self.received = self.received.saturating_add(bytes.len() as u64);
        self.inbox.extend_from_slice(bytes);
        while let Some(more) = self.early.next(&mut self.received) {
            self.inbox.extend_from_slice(&more);
        }
        self.received_eof = self.early.is_complete(self.received);
        wake(&mut self.reader);
        Ok(())
    }

    pub(super) fn on_credit(&mut self, credit: Credit) -> Result<(), Violation> {
        self.check_answered("CREDIT")?;
        if self.retracting {
            return Err(Violation::Retracting("CREDIT"));
        }
        self.on_limit(match credit {
            Credit::By(bytes) => self.limit.saturating_add(u64::from(bytes)),
            Credit::UpTo(limit) => limit,
        })
    }

    /// The peer lets this side send `limit` bytes in all. Only RETRACT lowers that.
    pub(super) fn on_limit(&mut self, limit: u64) -> Result<(), Violation> {
        // The peer may have taken bytes already that do not count as sent here yet.
        let sent = self.sent.max(self.promised);
        if limit.saturating_sub(sent) > u64::from(window::largest(self.version)) {
            return Err(Violation::Credit);
        }
        self.limit = self.limit.max(limit);
        wake(&mut self.writer);
        Ok(())
    }

    /// The peer asks this side to lower its limit. Returns what that is from now on, which covers all bytes that the writer
    /// has been promised.
    pub(super) fn on_retract(&mut self, asked: u64) -> Result<u64, Violation> {
        self.check_answered("RETRACT")?;
        if self.retracting {
            return Err(Violation::Retracting("RETRACT"));
        }
        if asked >= self.limit {
            return Err(Violation::Retract);
        }
        self.limit = asked.max(self.sent).max(self.promised);
        self.retracting = true;
        Ok(self.limit)
    }

    /// The answer is about to be sent, so the peer may react to it.
    pub(super) fn on_retract_answered(&mut self) {
        self.retracting = false;
    }

    pub(super) fn on_eof(&mut self, end: Option<u64>) -> Result<(), Violation> {
        self.check_answered("EOF")?;
        if self.early.has_end() {
            return Err(Violation::Ended("EOF"));
        }
        let end = end.unwrap_or(self.received);
        self.receive.check(end)?;
        self.early.on_end(end, self.received)?;
        self.receive.on_end(end);
        self.received_eof = self.early.is_complete(self.received);
        if self.received_eof {
            wake(&mut self.reader);
        }
        Ok(())
    }

    pub(super) fn on_answer(
        &mut self,
        frame: &'static str,
        answer: Result<(), DialError>,
    ) -> Result<(), Violation> {
        let waiting = self.answer.take().ok_or(Violation::Answered(frame))?;
        // Whoever asked may have left a moment ago.
        let _ = waiting.send(answer);
        Ok(())
    }

    /// Whether the stream has been answered, as far as this side waits for that, and the peer may still use it.
    pub(super) fn is_open(&self) -> bool {
        self.answer.is_none() && !self.ended && self.failed.is_none()
    }

    pub(super) fn fail(&mut self, error: StreamError) {
        self.answer = None;
        self.failed.get_or_insert(error);
        wake(&mut self.reader);
        wake(&mut self.writer);
        wake(&mut self.watch);
    }
}

fn wake(waker: &mut Option<Waker>) {
    if let Some(waker) = waker.take() {
        waker.wake();
    }
}
