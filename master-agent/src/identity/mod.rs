//! Who is who: the two certificate authorities of the master, the verification of nodes' host keys, and the revocation of
//! the certificates of masters and people.

mod authorities;
pub mod config;
mod host_key;
pub mod revocation;

pub use authorities::{Authorities, LOGIN, UserIdentity, host_name};
pub use host_key::{Expected, HostKeyError, VerifiedHost, fingerprint, verify_host};

#[cfg(test)]
pub(crate) mod tests;
