//! The certificates that a caller has shown on its connection, with what they were found to be worth.

use std::{
    fmt,
    sync::Arc,
    time::{Duration, Instant},
};

use rustls::pki_types::CertificateDer;
use tokio::sync::Mutex;

use super::{authenticated::Recognized, moment::Moment, reason::Reason};

/// How long a connection's certificate is refused without being verified again.
const REFUSED: Duration = Duration::from_secs(10);

/// The certificates that a caller has shown on its connection, leaf first, and what they were found to be worth.
#[derive(Default)]
pub struct Certificates {
    pub(super) chain: Arc<[CertificateDer<'static>]>,
    /// Held while it is found out, so that the requests of a connection find it out once.
    pub(super) verdict: Mutex<Option<Verdict>>,
}

/// What the certificates of a connection are worth, and when that was found out.
pub(super) struct Verdict {
    /// Of the files that it was found out by.
    pub generation: u64,
    pub at: Instant,
    pub found: Result<Recognized, Reason>,
}

impl Certificates {
    pub fn new(chain: Vec<CertificateDer<'static>>) -> Self {
        Self { chain: chain.into(), verdict: Mutex::default() }
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

impl Verdict {
    pub(super) fn holds(&self, generation: u64, now: Moment) -> bool {
        self.generation == generation
            && match &self.found {
                Ok(found) => found.expires.is_none_or(|end| now.wall < end),
                Err(_) => now.monotonic.saturating_duration_since(self.at) < REFUSED,
            }
    }
}
