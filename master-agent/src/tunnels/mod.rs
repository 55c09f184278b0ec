//! The tunnels to nodes: the SSH sessions that carry them, their supervision, and the choice of a tunnel for each
//! stream.
//!
//! Links have two origins: [`dial_links`] dials nodes, and [`call_home`] answers nodes that call. In both cases,
//! [`session`] authenticates both sides with the help of [`trust`], [`supervision`] registers the tunnel and supervises
//! it until it ends, and [`dialer`] picks it from the [`registry`].

pub mod absent;
pub mod call_home;
pub mod callers;
pub mod compatibility;
pub mod config;
pub mod counters;
pub mod dial_links;
pub mod dialer;
pub mod drain;
pub mod drains;
pub mod expected_nodes;
pub mod explain;
mod front_end_streams;
mod further;
mod further_sessions;
pub mod join;
pub mod login;
pub mod metrics;
pub mod pacing;
pub mod refusals;
pub mod registry;
pub mod renewal;
mod revocation_exchange;
pub mod revocations;
mod sampled_set;
pub mod session;
pub mod status;
pub mod supervision;
#[cfg(test)]
mod testing;
pub mod trust;
pub mod tunnel;
