//! Authorization of requests, with one file for each source of rights.
//!
//! The configured authorizers are asked in order, and the first that allows or denies a request decides. A request that
//! none of them allows is denied. Each decision names the authorizer and the rule, for the answer and the audit record.

mod authorizer;
mod chain;
pub mod config;
pub mod impersonate;
mod load;
pub mod node;
pub mod paths;
pub mod rbac;
pub mod webhook;

pub use authorizer::{Attributes, Authorizer, Decision};
pub use chain::{Authorizers, Verdict};

#[cfg(test)]
mod tests;
