//! The certificates of a connection, with the result of their verification.

use std::{
    fmt,
    sync::Arc,
    time::{Duration, Instant},
};

use rustls::pki_types::CertificateDer;
use tokio::sync::Mutex;

use super::{authenticated::Recognized, reason::FailureReason};
use crate::moment::Moment;

/// How long the rejection of a certificate is remembered.
const REJECTED: Duration = Duration::from_secs(10);

/// The certificates that a caller has presented in the TLS handshake, the leaf first, and the result of their
/// verification.
#[derive(Default)]
pub struct Certificates {
    pub(super) chain: Arc<[CertificateDer<'static>]>,
    /// Locked during the verification, so that concurrent requests of the connection verify once.
    pub(super) verification: Mutex<Option<Verification>>,
}

/// The result of a verification.
pub(super) struct Verification {
    /// The generation of the CA and its CRLs.
    pub generation: u64,
    pub at: Instant,
    pub found: Result<Recognized, FailureReason>,
}

impl Certificates {
    pub fn new(chain: Vec<CertificateDer<'static>>) -> Self {
        Self { chain: chain.into(), verification: Mutex::default() }
    }

    pub fn is_empty(&self) -> bool {
        self.chain.is_empty()
    }
}

impl fmt::Debug for Certificates {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Certificates").field("chain", &self.chain.len()).finish_non_exhaustive()
    }
}

impl Verification {
    pub(super) fn holds(&self, generation: u64, now: Moment) -> bool {
        self.generation == generation
            && match &self.found {
                Ok(found) => found.expires.is_none_or(|end| now.wall < end),
                Err(_) => now.monotonic.saturating_duration_since(self.at) < REJECTED,
            }
    }
}
