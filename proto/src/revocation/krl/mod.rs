//! OpenSSH's key revocation list (PROTOCOL.krl): which keys and certificates are no longer good.
//!
//! A list is parsed in time and memory that are bounded by its size. Ranges of serial numbers stay ranges, a bitmap
//! becomes the ranges that it consists of, and there may be no more of those than a list of single serial numbers could
//! hold. A look-up takes a binary search in each kind of entry.

mod codec;
mod error;
mod list;
mod serials;

pub use error::{KrlError, MAX_LIST};
pub use list::{Entry, Krl, Revoked, blob};

#[cfg(test)]
pub(crate) mod tests;
