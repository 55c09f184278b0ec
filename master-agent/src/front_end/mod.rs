//! The front end: the HTTPS port for calls from the cluster to the master.
//!
//! Every request passes, in this order: TLS, authentication ([`access::authn`]), authorization
//! ([`access::authz`]), and is then handed to kube-apiserver as an authenticating proxy does.

mod admission;
mod answer;
pub mod audit;
mod authorization;
mod browser;
pub mod config;
mod connection;
pub mod counters;
mod headers;
pub mod limits;
mod link;
mod listener;
pub mod local;
pub mod metrics;
pub mod page;
mod proxy;
pub mod proxy_urls;
mod recorder;
pub mod server;
mod streams;
pub mod tls;
pub mod tunnels;
pub mod upstream;
pub mod workers;
