//! What a peer may not do, with a stream or with the multiplexer as a whole.

use proto::mux::{frame::FrameError, window};

/// The peer broke the protocol, and its tunnel has to be closed.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub enum ProtocolError {
    #[error(transparent)]
    Frame(#[from] FrameError),
    #[error("stream {stream}: {error}")]
    Stream { stream: u64, error: Violation },
    #[error("the peer asks for more answers than it takes")]
    Flood,
    #[error("a PONG answers no PING")]
    Pong,
    #[error("HELLO does not come first, or comes again")]
    Hello,
    #[error("a further connection carries no frame of this kind: {0}")]
    Further(&'static str),
    #[error("the peer sends too much before it is answered")]
    Early,
    #[error("DRAIN by the master")]
    Drain,
}

/// What a peer may not do with a stream.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub enum Violation {
    #[error("OPEN by the side that may not open streams")]
    Opener,
    #[error("OPEN with an id that was used before")]
    Reused,
    #[error("{0} for a stream that was never opened")]
    NeverOpened(&'static str),
    #[error("{0} by the side that opens streams")]
    Answerer(&'static str),
    #[error("{0} for a stream that was answered already")]
    Answered(&'static str),
    #[error("{0} before the answer to OPEN")]
    NotAnswered(&'static str),
    #[error("{0} after EOF")]
    Ended(&'static str),
    #[error(transparent)]
    Window(#[from] window::WindowError),
    #[error("CREDIT beyond the largest window")]
    Credit,
    #[error("RETRACT that does not lower the limit")]
    Retract,
    #[error("{0} before the answer to RETRACT")]
    Retracting(&'static str),
}
