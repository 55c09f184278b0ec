//! What there is for the streams of each side.

use std::sync::atomic::{AtomicUsize, Ordering};

use proto::mux::ids::Opener;

/// One of something for the streams of each opener.
#[derive(Debug, Default)]
pub(super) struct ByOpener<T> {
    pub(super) this: T,
    pub(super) peer: T,
}

/// Streams of which this side still holds anything, by who has opened them.
pub(super) type Counts = ByOpener<AtomicUsize>;

impl Counts {
    pub(super) fn all(&self) -> usize {
        self.this.load(Ordering::Relaxed) + self.peer.load(Ordering::Relaxed)
    }
}

impl<T> ByOpener<T> {
    pub(super) fn of(&self, opener: Opener) -> &T {
        match opener {
            Opener::This => &self.this,
            Opener::Peer => &self.peer,
        }
    }

    pub(super) fn of_mut(&mut self, opener: Opener) -> &mut T {
        match opener {
            Opener::This => &mut self.this,
            Opener::Peer => &mut self.peer,
        }
    }
}
