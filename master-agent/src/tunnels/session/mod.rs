//! The SSH session with a node, of which the master is always the client, whoever dialled the link below.
//!
//! [`handshake::SshClient`] takes a link and gives a [`handshake::Session`] only when the node's host key has been
//! verified and the node has accepted the master's key. A node opens no channels by itself, with one exception, for
//! which the master has to ask: connections to an address that a plain sshd listens on ([`forward`]).

pub mod direct_tcpip;
pub mod error;
pub mod forward;
mod handler;
pub mod handshake;
pub mod identity;
pub mod multiplexer;
pub mod state;
