//! The SSH session with a node. The master is always the SSH client, whichever side dialled the link.
//!
//! [`handshake::SshClient`] takes a link and returns a [`handshake::Session`] only when the node's host key has been
//! verified and the node has accepted the master's key. A node must not open channels, with one exception for which the
//! master has to ask: connections to an address on which a plain sshd listens ([`forward`]).

pub mod direct_tcpip;
pub mod error;
pub mod forward;
mod handler;
pub mod handshake;
pub mod identity;
pub mod multiplexer;
pub mod state;
