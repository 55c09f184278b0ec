//! The state that a session's callbacks share with its owner.

use std::sync::{
    Mutex, MutexGuard, OnceLock, PoisonError,
    atomic::{AtomicBool, Ordering},
};

use proto::mux::frame::Hello;
use proto_net::mux::{Feeder, Greeting, ProtocolError};
use russh::ChannelId;
use tokio::sync::oneshot;
use tokio_util::sync::CancellationToken;

use super::{forward::Forward, identity::HostIdentity};
use crate::identity::HostKeyError;

/// The kind of reason for which a session has ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Loss {
    /// The node left keep-alives unanswered, or its host left bytes unacknowledged.
    NoAnswer,
    /// The link broke off, or SSH failed on it.
    Link,
    ByNode,
    ByMaster,
    /// The node violated a protocol.
    Protocol,
}

impl Loss {
    pub const ALL: [Self; 5] = [Self::NoAnswer, Self::Link, Self::ByNode, Self::ByMaster, Self::Protocol];

    /// Returns the value of the label in metrics.
    pub fn kind(self) -> &'static str {
        match self {
            Self::NoAnswer => "no_answer",
            Self::Link => "link",
            Self::ByNode => "closed_by_node",
            Self::ByMaster => "closed_by_master",
            Self::Protocol => "protocol",
        }
    }
}

/// The state of one session.
#[derive(Default)]
pub(crate) struct SessionState {
    /// The multiplexer of the tunnel.
    pub(super) to_node: MuxInput,
    /// The multiplexer on which a node-agent of an earlier release opens streams to the front end.
    pub(super) to_front_end: MuxInput,
    forward: Mutex<Option<Forward>>,
    /// The result of verifying the presented host key.
    pub(super) identity: OnceLock<Result<HostIdentity, HostKeyError>>,
    /// Whether the peer's SSH version string is that of a node-agent.
    node_agent: AtomicBool,
    end: OnceLock<(Loss, String)>,
    pub(crate) ended: CancellationToken,
}

impl SessionState {
    pub(super) fn is_node_agent(&self) -> bool {
        self.node_agent.load(Ordering::Relaxed)
    }

    pub(super) fn set_node_agent(&self, is_node_agent: bool) {
        self.node_agent.store(is_node_agent, Ordering::Relaxed);
    }

    /// Records why the session ends, unless a reason has been recorded before.
    pub(crate) fn end(&self, loss: Loss, reason: String) {
        let _ = self.end.set((loss, reason));
    }

    /// Returns why the session ends, once that is known.
    pub(crate) fn end_reason(&self) -> Option<(Loss, &str)> {
        self.end.get().map(|(loss, reason)| (*loss, reason.as_str()))
    }

    /// Returns the reason of the end as text.
    pub(crate) fn reason(&self) -> String {
        self.end_reason().map_or_else(|| "the SSH session ended".to_owned(), |(_, reason)| reason.to_owned())
    }

    pub(crate) fn forward(&self) -> MutexGuard<'_, Option<Forward>> {
        self.forward.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Closes both multiplexers and stops accepting forwarded connections.
    pub(super) fn close_inputs(&self) {
        self.to_node.clear();
        self.to_front_end.clear();
        *self.forward() = None;
    }
}

/// The receiving side of a multiplexer, and the channel that feeds it.
#[derive(Default)]
pub(super) struct MuxInput(Mutex<Option<(ChannelId, Input)>>);

/// What takes the bytes of the channel.
enum Input {
    /// The node has been asked for the multiplexer.
    Asked {
        /// Where the node's HELLO goes, until it has come, if there is to be one.
        hello: Option<(Greeting, oneshot::Sender<Hello>)>,
        /// What has come since then, for the multiplexer.
        early: Vec<u8>,
    },
    Feeder(Feeder),
}

/// The most bytes that a node may send before the master has answered its HELLO. An honest one sends a PING, or the first
/// streams of its callers if it is of an earlier release.
const MOST_EARLY: usize = 256 * 1024;

impl Input {
    fn take(&mut self, mut data: &[u8]) -> Result<(), ProtocolError> {
        let (hello, early) = match self {
            Self::Feeder(feeder) => return feeder.feed(data),
            Self::Asked { hello, early } => (hello, early),
        };
        if let Some((greeting, _)) = hello {
            let Some(said) = greeting.take(&mut data)? else { return Ok(()) };
            if let Some((_, waiting)) = hello.take() {
                let _ = waiting.send(said);
            }
        }
        if early.len() + data.len() > MOST_EARLY {
            return Err(ProtocolError::Early);
        }
        early.extend_from_slice(data);
        Ok(())
    }
}

impl MuxInput {
    fn lock(&self) -> MutexGuard<'_, Option<(ChannelId, Input)>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Keeps what comes on `channel` until [`Self::set`].
    pub(super) fn expect(&self, channel: ChannelId) {
        *self.lock() = Some((channel, Input::Asked { hello: None, early: Vec::new() }));
    }

    /// Does the same, and returns the receiver of the node's HELLO.
    pub(super) fn expect_hello(&self, channel: ChannelId) -> oneshot::Receiver<Hello> {
        let (said, hello) = oneshot::channel();
        let asked = Input::Asked { hello: Some((Greeting::default(), said)), early: Vec::new() };
        *self.lock() = Some((channel, asked));
        hello
    }

    /// Hands everything that comes on the channel to `feeder`, beginning with what has come so far.
    pub(super) fn set(&self, mut feeder: Feeder) -> Result<(), ProtocolError> {
        let mut input = self.lock();
        let Some((_, input)) = &mut *input else { return Ok(()) };
        if let Input::Asked { early, .. } = input {
            feeder.feed(early)?;
        }
        *input = Input::Feeder(feeder);
        Ok(())
    }

    /// Closes the multiplexer.
    pub(super) fn clear(&self) {
        *self.lock() = None;
    }

    /// Processes data of a channel. Returns `None` if it is not the multiplexer's channel.
    pub(super) fn feed(&self, channel: ChannelId, data: &[u8]) -> Option<Result<(), ProtocolError>> {
        match &mut *self.lock() {
            Some((id, input)) if *id == channel => Some(input.take(data)),
            Some(_) | None => None,
        }
    }

    /// Closes the multiplexer if `channel` is its channel, and returns whether it was.
    pub(super) fn close(&self, channel: ChannelId) -> bool {
        self.lock().take_if(|(id, _)| *id == channel).is_some()
    }
}
