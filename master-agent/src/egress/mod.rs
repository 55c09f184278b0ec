//! The egress listeners, which accept callers who want to reach the cluster: one file or folder for each protocol.
//!
//! A listener knows nothing of the tunnels but a [`Dialer`](proto_net::dialer::Dialer). How callers are accepted
//! ([`accept`]), and what is dialled, counted and recorded for them ([`outbound`]), is the same for all of them.

pub mod accept;
pub mod certificates;
pub mod config;
mod early_data;
pub mod http_connect;
pub mod konnectivity;
mod lingering_close;
mod listener;
pub mod outbound;
pub mod proxy_urls;
mod socket;
pub mod socks5;
pub mod tls;
