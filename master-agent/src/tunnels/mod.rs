//! Tunnels to nodes.

pub mod callers;
pub mod compatibility;
pub mod config;
pub mod explain;
pub mod metrics;
pub mod revocation;
