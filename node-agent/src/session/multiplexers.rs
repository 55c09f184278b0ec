//! The multiplexers of masters, which further connections of the same masters may join.

use std::{
    collections::{HashMap, hash_map::Entry},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use proto_net::mux::Mux;
use russh::keys::Certificate;

/// The multiplexers by the secret name that their masters have given them, each with the key id of its master. The key itself
/// changes with every certificate.
#[derive(Default)]
pub struct Multiplexers(Mutex<HashMap<[u8; 16], (String, Mux)>>);

/// The entry of one multiplexer, which others may join until this is dropped.
pub(super) struct Registered {
    multiplexers: Arc<Multiplexers>,
    session: [u8; 16],
}

impl Multiplexers {
    /// Enters a multiplexer. Returns `None` if there is one of that name, which honest masters choose at random.
    pub(super) fn add(
        self: &Arc<Self>,
        session: [u8; 16],
        master: &Certificate,
        mux: &Mux,
    ) -> Option<Registered> {
        match self.lock().entry(session) {
            Entry::Occupied(_) => None,
            Entry::Vacant(place) => {
                place.insert((master.key_id().to_owned(), mux.clone()));
                Some(Registered { multiplexers: self.clone(), session })
            }
        }
    }

    /// The multiplexer of that name, if it is this master's.
    pub(super) fn find(&self, session: &[u8; 16], master: &Certificate) -> Option<Mux> {
        self.lock().get(session).filter(|(owner, _)| owner == master.key_id()).map(|(_, mux)| mux.clone())
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<[u8; 16], (String, Mux)>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Registered {
    fn drop(&mut self) {
        self.multiplexers.lock().remove(&self.session);
    }
}
