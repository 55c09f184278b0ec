//! The identity that this node shows to its peers, and the users whom it accepts.

pub mod current;
pub mod host;
pub mod renewal;
pub mod trust;
pub mod user;
