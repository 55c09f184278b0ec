//! Streams to targets, whichever listener they come from: the caller, the record that each stream leaves, the
//! metrics, and a socket for listeners that are themselves clients of the target.

pub mod caller;
pub mod metrics;
pub mod record;
pub mod target_socket;
