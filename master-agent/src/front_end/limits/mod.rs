//! What one caller can take from the others.

pub mod rate;
pub mod seats;
