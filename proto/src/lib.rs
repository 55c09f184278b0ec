//! What master-agent and node-agent must agree on.
//!
//! Everything here but [`io`] is free of I/O and of the clock: types, decisions, codecs and state
//! machines that take bytes or the time as an argument. [`io`] holds the pieces with sockets that both
//! agents use.

pub mod backoff;
pub mod call_home;
pub mod config;
pub mod connect;
pub mod error;
pub mod io;
pub mod join;
pub mod konnectivity;
pub mod mux;
pub mod name;
pub mod policy;
pub mod refusal;
pub mod relink;
pub mod revocation;
pub mod secret_file;
pub mod target;

pub use error::{DialError, Fault};
pub use name::NodeName;
pub use target::{Host, Target};
