//! SSH sessions, of which this node is the server, whoever dialled the link below.
//!
//! A session with a master's certificate gets the multiplexer (`proto/STREAMS.md`). Any certificate of a trusted
//! user CA gets direct-tcpip channels, which `ssh -L`, `-W` and `-J` open. Every stream passes the node's policy. Shells,
//! commands, sftp, agent and X11 forwarding and remote forwards are refused.
//!
//! A session accepts new streams until [`proto::relink::GRACE`] after the end of its certificate. Streams that run then
//! go on, and the session ends with the last of them. A master makes another link before that and says goodbye on the old
//! one. A session whose master has not done so, or has no other session by then, is closed after `shutdown_grace`, so that
//! the master connects again. A session whose certificate is revoked is cut at once.

pub mod bounds;
pub mod config;
pub mod error;
mod handler;
pub mod masters;
pub mod multiplexers;
pub mod serve;
pub mod services;
mod state;
pub mod streams;
#[cfg(test)]
mod tests;
mod user;
