//! Authorization: what a user may, one file for each source of rights.
//!
//! The configured authorizers are asked in order, and the first that allows or denies has decided; what none of them
//! allows is denied. Each decision carries the authorizer and the rule, for the caller's answer and the audit line.

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
