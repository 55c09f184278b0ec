//! The identity of a session's other end, which follows from the host key whose possession it has proved.

use std::sync::Arc;

use futures_util::future::BoxFuture;
use russh::keys::{PublicKey, PublicKeyOrCertificate};

use crate::identity::{HostKeyError, VerifiedHost};

/// The result of verifying a host key that was not refused.
#[derive(Clone, Debug)]
pub enum HostIdentity {
    Verified(VerifiedHost),
    /// The key belongs to no node, for the reason that the error gives. The host may join with a token and do nothing
    /// else.
    Unknown(Box<PublicKey>, Arc<HostKeyError>),
}

/// Verifies a presented host key.
pub type Verify =
    Box<dyn Fn(&PublicKeyOrCertificate) -> BoxFuture<'_, Result<HostIdentity, HostKeyError>> + Send + Sync>;
