//! What accepts callers who want to reach the cluster. Each egress listener holds a
//! [`Dialer`](proto_net::dialer::Dialer) and nothing else of the rest; how callers are accepted ([`listen`]) and what is
//! counted and recorded of them is the same for all.

pub mod certificates;
pub mod config;
mod door;
mod early;
pub mod http_connect;
pub mod konnectivity;
pub mod listen;
pub mod proxy_url;
mod socket;
pub mod socks5;
pub mod users;

pub use door::{Common, Dialled, EgressListener};
