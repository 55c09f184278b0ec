//! How a running agent hands over to its next process, which may be of another release, so that nobody notices.
//!
//! The running process starts the next one with a socket as its standard input, and tells it over that socket what it
//! listens on, with the descriptors, and which peers it is linked to. The next one reads and checks everything, and says
//! [`Loaded`](message::Message::Loaded). Now links come to it, and the running process asks its peers for them. Once it has
//! the links that its callers need, it accepts callers, too, and says [`Serving`](message::Message::Serving). Then the
//! running process accepts nothing more, and ends when its streams have.
//!
//! Until `Serving`, the running process can go on as if nothing had happened, and does so if the next one fails. If the
//! running process dies, the next one takes its place.

mod channel;
mod message;
mod predecessor;
mod successor;
#[cfg(test)]
mod tests;

pub use message::Draining;
pub use predecessor::Predecessor;
pub use successor::{End, HandoverError, Program, Successor};

/// How a process of an agent begins.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Role {
    /// By itself.
    First,
    /// It takes over from the process at the other end of its standard input.
    Next,
}

impl Role {
    /// Tells the running process, if there is one, why this one does not serve.
    pub fn refuse(self, why: &dyn std::fmt::Display) {
        if self == Self::Next {
            predecessor::refuse(&why.to_string());
        }
    }
}
