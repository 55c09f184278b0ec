//! The masters that are connected.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};

use proto_net::tasks::Tasks;

use super::{state::SessionState, user::AuthenticatedUser};

/// The sessions of masters. A master is known by its key id, which names the master's host. The key itself changes with
/// every certificate.
#[derive(Default)]
pub struct ConnectedMasters(Mutex<Vec<MasterSession>>);

struct MasterSession {
    master: Weak<AuthenticatedUser>,
    state: Weak<SessionState>,
}

impl ConnectedMasters {
    pub(super) fn add(&self, master: &Arc<AuthenticatedUser>, state: &Arc<SessionState>) {
        self.lock().push(MasterSession { master: Arc::downgrade(master), state: Arc::downgrade(state) });
    }

    /// The key ids of the masters that make another link to this node when they are asked to, or that it calls home.
    pub fn replaceable(&self) -> Vec<String> {
        let live = self.live().into_iter().filter(|(_, state)| state.is_replaceable());
        let mut names: Vec<_> = live.map(|(master, _)| master.certificate.key_id().to_owned()).collect();
        names.sort();
        names.dedup();
        names
    }

    /// The key ids of the masters of earlier releases, which can't be told of a drain.
    pub fn deaf_to_drains(&self) -> Vec<String> {
        let (deaf, told): (Vec<_>, Vec<_>) =
            self.live().into_iter().partition(|(_, state)| state.is_deaf_to_drains());
        let key_id = |(master, _): &(Arc<AuthenticatedUser>, _)| master.certificate.key_id().to_owned();
        let told: Vec<String> = told.iter().map(key_id).collect();
        let mut deaf: Vec<String> = deaf.iter().map(key_id).filter(|name| !told.contains(name)).collect();
        deaf.sort();
        deaf.dedup();
        deaf
    }

    /// Whether a master has a session.
    pub fn is_connected(&self, key_id: &str) -> bool {
        self.live().iter().any(|(master, _)| master.certificate.key_id() == key_id)
    }

    /// Asks each master that dials this node for another link, once for each of its sessions.
    pub fn ask_for_links(&self, asking: &Tasks) {
        for (_, state) in self.live() {
            asking.spawn(async move { state.ask_for_link().await });
        }
    }

    fn live(&self) -> Vec<(Arc<AuthenticatedUser>, Arc<SessionState>)> {
        let live = |session: &MasterSession| session.master.upgrade().zip(session.state.upgrade());
        self.lock().iter().filter_map(live).collect()
    }

    /// Whether this master has another session, whose certificate has not expired.
    pub(super) fn has_another(&self, master: &Arc<AuthenticatedUser>) -> bool {
        let key_id = master.certificate.key_id();
        self.live().iter().any(|(other, _)| {
            !Arc::ptr_eq(other, master) && other.certificate.key_id() == key_id && !other.has_expired()
        })
    }

    /// The sessions that have not ended.
    fn lock(&self) -> MutexGuard<'_, Vec<MasterSession>> {
        let mut sessions = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        sessions.retain(|session| session.master.strong_count() > 0);
        sessions
    }
}
