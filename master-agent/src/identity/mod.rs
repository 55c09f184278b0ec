//! Identity: the master's two certificate authorities, the verification of nodes' host keys and of clients'
//! certificates, join tokens, the revocation of certificates of masters and people, the store that keeps all this, and its backups.

mod authorities;
pub mod backup;
pub mod config;
mod database;
mod host_certificate;
mod host_key;
mod host_key_error;
pub mod known_hosts;
pub mod refresh;
pub mod revocation;
mod schema;
pub mod sqlite;
pub mod state;
pub mod store;
pub mod token;

pub use authorities::{Authorities, LOGIN, UserIdentity, host_name};
pub use host_key::{Expected, Proof, VerifiedHost, fingerprint, verify_host};
pub use host_key_error::HostKeyError;

#[cfg(test)]
pub(crate) mod tests;
