//! Tunnels to nodes.

pub mod callers;
pub mod compatibility;
pub mod config;
pub mod counters;
pub mod explain;
pub mod metrics;
pub mod revocation;
