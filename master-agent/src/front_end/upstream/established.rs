//! When and with what a connection to an API server was made, which decides for how long it takes requests.

use std::time::Duration;

use tokio::time::Instant;

/// When a connection was made, and with which generation of the TLS files.
#[derive(Clone, Copy, Debug)]
pub(super) struct Established {
    pub generation: u64,
    pub at: Instant,
}

impl Established {
    /// Whether the connection was made with this generation of the files, and is not too old.
    pub(super) fn is_current(&self, generation: u64, max_age: Duration) -> bool {
        self.generation == generation && self.at.elapsed() < max_age
    }
}
