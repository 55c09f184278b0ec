//! The masters that are connected.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};

use super::user::AuthenticatedUser;

/// Tells whether a master has another session, by its key id, which names the master's host. The key itself changes with
/// every certificate.
#[derive(Default)]
pub struct ConnectedMasters(Mutex<Vec<Weak<AuthenticatedUser>>>);

impl ConnectedMasters {
    pub(super) fn add(&self, master: &Arc<AuthenticatedUser>) {
        let mut connected = self.lock();
        connected.retain(|other| other.strong_count() > 0);
        connected.push(Arc::downgrade(master));
    }

    /// Whether this master has another session, whose certificate has not expired.
    pub(super) fn has_another(&self, master: &Arc<AuthenticatedUser>) -> bool {
        let key_id = master.certificate.key_id();
        let mut others = self.lock();
        others.retain(|other| other.strong_count() > 0);
        others.iter().filter_map(Weak::upgrade).any(|other| {
            !Arc::ptr_eq(&other, master) && other.certificate.key_id() == key_id && !other.has_expired()
        })
    }

    fn lock(&self) -> MutexGuard<'_, Vec<Weak<AuthenticatedUser>>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
