//! One stream's state: what has come, what may be sent, how it ended, and who is to be woken.

use std::{
    sync::{Mutex, MutexGuard, PoisonError},
    task::Waker,
    time::Instant,
};

use bytes::BytesMut;
use proto::{
    DialError,
    mux::{frame::Credit, order::Early, window},
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
    /// The number of bytes that were sent, and that may be.
    pub(super) sent: u64,
    limit: u64,
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
    pub(super) fn new(answer: Option<Answer>, limit: u64) -> Self {
        Self {
            inbox: BytesMut::new(),
            received: 0,
            early: Early::default(),
            receive: window::Receive::new(Instant::now()),
            sent: 0,
            limit,
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

    /// The number of bytes that may be sent now.
    pub(super) fn credit(&self) -> usize {
        usize::try_from(self.limit.saturating_sub(self.sent)).unwrap_or(usize::MAX)
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
        self.on_limit(match credit {
            Credit::By(bytes) => self.limit.saturating_add(u64::from(bytes)),
            Credit::UpTo(limit) => limit,
        })
    }

    /// The peer lets this side send `limit` bytes in all. What it has once allowed, it can't take back.
    pub(super) fn on_limit(&mut self, limit: u64) -> Result<(), Violation> {
        if limit.saturating_sub(self.sent) > u64::from(window::MAX) {
            return Err(Violation::Credit);
        }
        self.limit = self.limit.max(limit);
        wake(&mut self.writer);
        Ok(())
    }

    pub(super) fn on_eof(&mut self, end: Option<u64>) -> Result<(), Violation> {
        self.check_answered("EOF")?;
        if self.early.has_end() {
            return Err(Violation::Ended("EOF"));
        }
        let end = end.unwrap_or(self.received);
        self.receive.check(end)?;
        self.early.on_end(end, self.received)?;
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
