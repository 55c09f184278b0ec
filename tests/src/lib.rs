//! Support for the test suites: clusters of real agents on loopback, processes, relays, certificates, clients.
#![allow(clippy::disallowed_methods, reason = "a test owns its tasks by its runtime")]

pub mod apiserver;
pub mod browser;
pub mod certificates;
pub mod client;
pub mod cluster;
pub mod collector;
pub mod dns;
pub mod figures;
pub mod front_end;
pub mod h2;
pub mod hostile_bytes;
pub mod http;
pub mod konnectivity;
pub mod kubectl;
pub mod kubelet;
pub mod kubelet_port;
pub mod load;
pub mod metrics;
pub mod netns;
pub mod openssh;
pub mod pattern;
pub mod person;
pub mod pki;
mod port_forward;
pub mod process;
pub mod reference;
pub mod relay;
pub mod rogue;
pub mod rogue_frames;
pub mod second_reader;
pub mod silent;
pub mod spdy;
pub mod staller;
pub mod steady;
pub mod target;
pub mod upstream;
