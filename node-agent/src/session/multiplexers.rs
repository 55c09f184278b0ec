//! The multiplexers of masters, which further connections of the same masters may join.

use std::{
    collections::{HashMap, hash_map::Entry},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use proto_net::mux::Mux;
use russh::keys::ssh_key::public::KeyData;

/// The multiplexers by the name that their masters have given them, each with the key of its master.
#[derive(Default)]
pub struct Multiplexers(Mutex<HashMap<[u8; 16], (KeyData, Mux)>>);

/// The entry of one multiplexer, which others may join until this is dropped.
pub(super) struct Registered {
    multiplexers: Arc<Multiplexers>,
    session: [u8; 16],
}

impl Multiplexers {
    /// Enters a multiplexer. Returns `None` if there is one of that name, which honest masters choose at random.
    pub(super) fn add(self: &Arc<Self>, session: [u8; 16], key: &KeyData, mux: &Mux) -> Option<Registered> {
        match self.lock().entry(session) {
            Entry::Occupied(_) => None,
            Entry::Vacant(place) => {
                place.insert((key.clone(), mux.clone()));
                Some(Registered { multiplexers: self.clone(), session })
            }
        }
    }

    /// The multiplexer of that name, if its master has this key.
    pub(super) fn find(&self, session: &[u8; 16], key: &KeyData) -> Option<Mux> {
        self.lock().get(session).filter(|(owner, _)| owner == key).map(|(_, mux)| mux.clone())
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<[u8; 16], (KeyData, Mux)>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Registered {
    fn drop(&mut self) {
        self.multiplexers.lock().remove(&self.session);
    }
}
