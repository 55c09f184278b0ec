//! The front end: the HTTPS port for calls from the cluster to the master.
//!
//! Every request passes, in this order: TLS, authentication ([`authn`]), authorization ([`authz`]),
//! and is then handed to kube-apiserver as an authenticating proxy does.

mod answer;
pub mod audit;
pub mod authn;
pub mod authz;
pub mod config;
mod headers;
pub mod https_client;
pub mod limits;
mod link;
pub mod local;
mod proxy;
mod recorder;
pub mod reloaded;
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
