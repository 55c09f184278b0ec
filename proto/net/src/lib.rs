//! The pieces with sockets that both agents use: links, the multiplexer's and the channel's streams, the
//! half-closing relay, task ownership, TLS, admin endpoints, telemetry.

pub mod admin;
pub mod channel;
pub mod dialer;
pub mod expiry;
pub mod exposition;
pub mod handshake;
pub mod link;
pub mod mux;
pub mod patient;
pub mod relay;
pub mod socket;
pub mod ssh;
pub mod stalls;
pub mod stream;
pub mod systemd;
pub mod tasks;
pub mod telemetry;
pub mod tls;
pub mod unix;
