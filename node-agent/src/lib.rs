//! node-agent: the node's end of the tunnel, and the policy that decides what masters reach through it.

pub mod agent;
pub mod app;
pub mod cli;
pub mod config;
pub mod dialer;
pub mod front_ends;
pub mod http_proxy;
pub mod https;
pub mod identity;
pub mod join;
pub mod links;
pub mod local_endpoint;
pub mod metrics;
pub mod revocation;
pub mod session;
pub mod tcp;
