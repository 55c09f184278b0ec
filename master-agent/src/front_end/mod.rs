//! The front end, which is the HTTPS port for calls from the cluster to the master.
//!
//! It accepts connections (`listener.rs`) and takes every request through its phases, which include authentication
//! ([`access::authn`]) and authorization ([`access::authz`]), to the handler that answers it. Most requests go to
//! kube-apiserver, for which the front end is an authenticating proxy. `request/pipeline.rs` shows the whole life of a
//! request.

mod admission;
mod answer;
pub mod audit;
mod authorization;
mod browser;
pub mod call_home;
pub mod config;
mod connection;
pub mod counters;
pub mod headers;
pub mod limits;
mod link_socket;
mod listener;
pub mod local;
pub mod metrics;
pub mod page;
pub mod proxy_urls;
mod recorder;
mod request;
pub mod server;
mod streams;
pub mod tls;
pub mod tunnels;
pub mod upstream;
pub mod workers;
