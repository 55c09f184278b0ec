//! Who is who: the two certificate authorities of the master, and the verification of nodes' host keys.

mod authorities;
mod host_key;

pub use authorities::{Authorities, UserIdentity};
pub use host_key::{Expected, HostKeyError, VerifiedHost, fingerprint, verify_host};

#[cfg(test)]
pub(crate) mod tests;
