//! One stream's state: what has come, what may be sent, how it ended, and who is to be woken.

use std::{
    sync::{Mutex, MutexGuard, PoisonError},
    task::Waker,
    time::Instant,
};

use bytes::BytesMut;
use proto::{DialError, mux::window};
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
    pub(super) receive: window::Receive,
    /// Bytes that may be sent.
    pub(super) credit: usize,
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
    /// `answer` belongs to the side that opens the stream.
    pub(super) fn new(answer: Option<Answer>) -> Self {
        Self {
            inbox: BytesMut::new(),
            receive: window::Receive::new(Instant::now()),
            credit: usize::try_from(window::INITIAL).unwrap_or_default(),
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

    pub(super) fn on_data(&mut self, bytes: &[u8]) -> Result<(), Violation> {
        self.check_answered("DATA")?;
        if self.received_eof {
            return Err(Violation::Ended("DATA"));
        }
        self.receive.on_data(bytes.len())?;
        self.inbox.extend_from_slice(bytes);
        wake(&mut self.reader);
        Ok(())
    }

    pub(super) fn on_credit(&mut self, bytes: u32) -> Result<(), Violation> {
        self.check_answered("CREDIT")?;
        let credit = usize::try_from(bytes).ok().and_then(|bytes| self.credit.checked_add(bytes));
        let most = usize::try_from(window::MAX).unwrap_or(usize::MAX);
        self.credit = credit.filter(|credit| *credit <= most).ok_or(Violation::Credit)?;
        wake(&mut self.writer);
        Ok(())
    }

    pub(super) fn on_eof(&mut self) -> Result<(), Violation> {
        self.check_answered("EOF")?;
        if self.received_eof {
            return Err(Violation::Ended("EOF"));
        }
        self.received_eof = true;
        wake(&mut self.reader);
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
