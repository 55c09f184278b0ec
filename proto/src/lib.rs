//! What master-agent and node-agent must agree on: types, decisions, codecs and state machines.
//!
//! Nothing here does I/O or reads a clock: bytes, the time and random numbers are arguments. `proto-net` holds the sockets
//! and tasks that both agents use, and `proto-config` reads their configuration files.

pub mod backoff;
pub mod call_home;
pub mod connect;
pub mod error;
pub mod join;
pub mod keep_alive;
pub mod konnectivity;
pub mod mux;
pub mod name;
pub mod policy;
pub mod refusal;
pub mod relink;
pub mod revocation;
pub mod target;

pub use error::{DialError, Fault};
pub use name::NodeName;
pub use target::{Host, Target};
