//! The front end: the HTTPS port for calls from the cluster to the master.
//!
//! Every request passes, in this order: TLS, authentication ([`authn`]), authorization ([`authz`]),
//! and is then handed to kube-apiserver as an authenticating proxy does.

mod admission;
mod answer;
pub mod audit;
pub mod authn;
mod authorization;
pub mod authz;
mod browser;
pub mod config;
mod connection;
pub mod future;
mod headers;
pub mod https_client;
pub mod limits;
mod link;
mod listener;
pub mod local;
pub mod metrics;
pub mod page;
mod peer;
mod proxy;
pub mod proxy_urls;
mod recorder;
pub mod request_info;
pub mod secret;
mod seldom;
pub mod server;
mod streams;
pub mod tls;
pub mod tunnels;
pub mod upstream;
pub mod user;
pub mod workers;
