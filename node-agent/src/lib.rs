//! The node-agent: the node's end of the tunnels, and the policy that decides what masters and people reach through it.
//!
//! [`app`] composes the parts. [`links`] accepts links and [`call_home`] dials them; [`session`] serves SSH on both.
//! [`dialer`] connects every stream as [`policy`] allows. [`identity`] and [`revocation`] decide whose certificates count.
//! [`local_endpoint`] is for callers on this node who want to reach a master's front end.

mod admin;
pub mod app;
pub mod call_home;
pub mod cli;
pub mod config;
pub mod dialer;
pub mod drain;
mod fields;
pub mod greeting;
mod handover;
pub mod http_proxy;
pub mod https;
pub mod identity;
pub mod join;
pub mod links;
pub mod local_endpoint;
pub mod metrics;
pub mod policy;
pub mod revocation;
pub mod session;
pub mod shares;
pub mod shutdown;
pub mod tcp;
#[cfg(test)]
mod testing;
