//! The state that a session's callbacks share with its owner.

use std::sync::{
    Mutex, MutexGuard, OnceLock, PoisonError,
    atomic::{AtomicBool, Ordering},
};

use proto_net::mux::{Feeder, ProtocolError};
use russh::ChannelId;
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
    /// The multiplexer on which the master opens streams.
    pub(super) to_node: MuxInput,
    /// The multiplexer on which the node opens streams to the front end.
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
pub(super) struct MuxInput(Mutex<Option<(ChannelId, Feeder)>>);

impl MuxInput {
    fn lock(&self) -> MutexGuard<'_, Option<(ChannelId, Feeder)>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn set(&self, channel: ChannelId, feeder: Feeder) {
        *self.lock() = Some((channel, feeder));
    }

    /// Closes the multiplexer.
    pub(super) fn clear(&self) {
        *self.lock() = None;
    }

    /// Processes data of a channel. Returns `None` if it is not the multiplexer's channel.
    pub(super) fn feed(&self, channel: ChannelId, data: &[u8]) -> Option<Result<(), ProtocolError>> {
        match &mut *self.lock() {
            Some((id, feeder)) if *id == channel => Some(feeder.feed(data)),
            Some(_) | None => None,
        }
    }

    /// Closes the multiplexer if `channel` is its channel, and returns whether it was.
    pub(super) fn close(&self, channel: ChannelId) -> bool {
        self.lock().take_if(|(id, _)| *id == channel).is_some()
    }
}
