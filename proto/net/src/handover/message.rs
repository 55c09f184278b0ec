//! The messages between the two processes, each of which is one packet with JSON.

use serde::{Deserialize, Serialize};

use super::draining::Draining;
use crate::listeners::Address;

/// The most bytes of one message.
pub(super) const MAX_MESSAGE: usize = 64 * 1024;
/// The number of peers in one message.
pub(super) const PEERS: usize = 128;

#[derive(Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(super) enum Message {
    // From the process that starts the next one.
    /// The next process has this number. A descriptor of it (`pidfd_open(2)`) comes with the message.
    Started(u32),

    // From the running process.
    /// A socket that it listens on, whose descriptor comes with the message.
    Listener(Address),
    /// Peers that it is linked to.
    Peers(Vec<String>),
    /// Everything has been said. The next process is to load its files.
    Load,
    /// The next process is to accept and make links.
    Link,
    /// What it and the processes before it still carry, once the next one serves.
    Draining(Draining),

    // From the next process.
    /// It has read and checked everything, and accepts nothing yet.
    Loaded { version: String, unused: Vec<Address> },
    /// It accepts all connections.
    Serving,
    /// It ends, for this reason.
    Failed(String),
    /// It has been told to stop, and so are the processes before it.
    Stopping,
}
