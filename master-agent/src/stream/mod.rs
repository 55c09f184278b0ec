//! Streams to targets, whoever asked for them: the caller, the record that each stream leaves, and a socket for those who
//! speak a protocol of their own with the target.

pub mod caller;
pub mod record;
pub mod target_socket;
