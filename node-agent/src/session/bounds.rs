//! What users may have at once: each by its key, and all masters or all people together. A master or a person therefore
//! takes nothing from the others, and people take nothing from masters.

use russh::keys::ssh_key::public::KeyData;

use super::config::LimitsConfig;
use crate::shares::Shares;

/// Sessions of one master. Its key changes with its certificate, so an honest master has one for each of the node's
/// `connections` (16 at most), each with up to eight further connections.
const SESSIONS_OF_MASTER: usize = 160;
/// Sessions of all masters. A session whose streams last stays beside those that have replaced it.
const SESSIONS_OF_MASTERS: usize = 640;
/// How many times `max_streams` one user may have in all of its sessions: as many as one session may have on its
/// multiplexer and as channels.
const STREAMS_OF_USER: usize = 2;
/// How many times `max_streams` all masters may have, and all people. With the default, both together leave half of the
/// systemd unit's file descriptors for everything else.
const STREAMS_OF_ALL: usize = 8;
/// Names that are looked up at once. Each takes a thread while its name servers are silent, also once its caller has left.
const LOOKUPS_OF_MASTER: usize = 32;
const LOOKUPS_OF_MASTERS: usize = 64;
const LOOKUPS_OF_PERSON: usize = 8;
const LOOKUPS_OF_PEOPLE: usize = 16;

/// What masters, or people, may have.
pub struct Bounds {
    pub(super) sessions: Shares<KeyData>,
    pub(super) streams: Shares<KeyData>,
    pub(super) lookups: Shares<KeyData>,
}

impl Bounds {
    pub fn of_masters(limits: &LimitsConfig) -> Self {
        Self {
            sessions: Shares::new(SESSIONS_OF_MASTERS, SESSIONS_OF_MASTER),
            streams: streams(limits),
            lookups: Shares::new(LOOKUPS_OF_MASTERS, LOOKUPS_OF_MASTER),
        }
    }

    pub fn of_people(limits: &LimitsConfig) -> Self {
        Self {
            sessions: Shares::new(limits.max_sessions, limits.max_sessions),
            streams: streams(limits),
            lookups: Shares::new(LOOKUPS_OF_PEOPLE, LOOKUPS_OF_PERSON),
        }
    }
}

fn streams(limits: &LimitsConfig) -> Shares<KeyData> {
    Shares::new(STREAMS_OF_ALL * limits.max_streams, STREAMS_OF_USER * limits.max_streams)
}
