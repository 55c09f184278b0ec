//! The I/O that both agents use: accepting connections, links, the streams of a tunnel, the relay, ownership of tasks,
//! TLS, watched files, the HTTPS client, admin endpoints and logs.

pub mod accept;
pub mod admin;
pub mod admin_client;
mod burst;
pub mod causes;
pub mod channel;
pub mod clock;
pub mod descriptors;
pub mod dialer;
pub mod drain;
pub mod exposition;
pub mod file_watcher;
pub mod gate;
pub mod handover;
pub mod handshake;
pub mod https_client;
mod keep_alive;
pub mod link;
pub mod listeners;
pub mod log_throttle;
mod log_writer;
pub mod mux;
pub mod read_ahead;
pub mod relay;
pub mod socket;
pub mod socket_store;
pub mod ssh;
pub mod stalls;
pub mod stdout;
pub mod stream;
pub mod systemd;
pub mod tasks;
pub mod telemetry;
pub mod tls;
pub mod unix;
pub mod write_timeout;
