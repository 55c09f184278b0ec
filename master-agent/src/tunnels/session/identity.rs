//! Who is at the other end of a session, by the host key that it has proved.

use std::sync::Arc;

use futures_util::future::BoxFuture;
use russh::keys::{PublicKey, PublicKeyOrCertificate};

use crate::identity::{HostKeyError, VerifiedHost};

/// The result of verifying a host key that was not refused.
#[derive(Clone, Debug)]
pub enum HostIdentity {
    Verified(VerifiedHost),
    /// A key of no node. Its host may join with a token, and do nothing else. The error says why the key is no node's.
    Unknown(Box<PublicKey>, Arc<HostKeyError>),
}

/// Decides whose a presented host key is.
pub type Verify =
    Box<dyn Fn(&PublicKeyOrCertificate) -> BoxFuture<'_, Result<HostIdentity, HostKeyError>> + Send + Sync>;
