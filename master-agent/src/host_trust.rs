//! The ways to verify a node's host key.

use std::path::PathBuf;

/// The reference against which a node's host key is verified. There is no way to accept any key.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum HostTrust {
    /// A certificate for this node by the master's host CA.
    HostCa,
    /// Fingerprints as `ssh-keygen -l` prints them: `SHA256:` and 43 characters.
    Pins(Vec<String>),
    /// A known_hosts file (sshd(8)).
    KnownHosts(PathBuf),
    /// The first key seen is remembered, every other one refused.
    FirstUse,
}
