//! The nodes, pods and service accounts that exist, with their UIDs, as service accounts' tokens are bound to them.
//!
//! Only the metadata is read, so that an object that can't be understood otherwise still exists, and its predecessor of
//! the same name does not.

use std::{
    collections::{HashMap, HashSet},
    sync::{PoisonError, RwLock},
};

use access::authn::cluster::{BoundKind, BoundObject, Existence, Uid};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;

use super::{followed::Followed, objects};
use crate::routing::cluster::{self, Key};

/// The seconds for which an object still counts as existing after its `deletionTimestamp`, as in kube-apiserver
/// (`pkg/serviceaccount/claims.go`).
const LEEWAY: i64 = 60;
/// The number of objects that are forgotten at once. Authentication waits meanwhile.
const BATCH: usize = 256;

/// The objects that exist, as the watches say.
#[derive(Debug, Default)]
pub struct ExistingObjects(RwLock<Kinds>);

#[derive(Debug, Default)]
struct Kinds {
    nodes: Objects,
    pods: Objects,
    accounts: Objects,
}

#[derive(Debug, Default)]
struct Objects {
    seen: HashMap<Key, Seen>,
    /// Whether a list has arrived whole.
    listed: bool,
    /// Whether the watch stands.
    heard: bool,
}

#[derive(Debug)]
struct Seen {
    uid: Uid,
    /// Seconds since 1970.
    deletion: Option<i64>,
}

impl access::authn::cluster::Objects for ExistingObjects {
    fn check(&self, objects: &[BoundObject], now: i64) -> Existence {
        let kinds = self.0.read().unwrap_or_else(PoisonError::into_inner);
        let mut existence = Existence::Exist;
        for object in objects {
            let known = kinds.of(object.kind);
            let exists = |seen: &Seen| {
                let deleted = seen.deletion.is_some_and(|at| at.saturating_add(LEEWAY) < now);
                seen.uid == object.uid && !deleted
            };
            match known.seen.get(&object.key) {
                Some(seen) if exists(seen) => {}
                Some(_) | None if known.listed => return Existence::Missing,
                Some(_) | None => existence = Existence::Unknown,
            }
            if !(known.listed && known.heard) {
                existence = Existence::Unknown;
            }
        }
        existence
    }
}

impl ExistingObjects {
    pub fn count(&self, kind: BoundKind) -> usize {
        self.0.read().unwrap_or_else(PoisonError::into_inner).of(kind).seen.len()
    }

    pub(super) fn apply(&self, kind: Followed, metadata: &ObjectMeta) {
        let Some(key) = objects::key(metadata) else { return };
        let Some(uid) = &metadata.uid else { return self.remove(kind, &key) };
        let deletion = metadata.deletion_timestamp.as_ref().map(|time| time.0.as_second());
        let seen = Seen { uid: Uid::of(uid), deletion };
        self.change(kind, |known| {
            known.seen.insert(key, seen);
        });
    }

    pub(super) fn remove(&self, kind: Followed, key: &str) {
        self.change(kind, |known| {
            known.seen.remove(key);
        });
    }

    /// Forgets the objects that are not in a whole list.
    pub(super) fn retain(&self, kind: Followed, listed: &HashSet<Key>) {
        for batch in self.unlisted(kind, listed).chunks(BATCH) {
            self.change(kind, |known| {
                for key in batch {
                    known.seen.remove(key);
                }
            });
        }
        self.change(kind, |known| known.listed = true);
    }

    fn unlisted(&self, kind: Followed, listed: &HashSet<Key>) -> Vec<Key> {
        let Some(kind) = bound(kind) else { return Vec::new() };
        let kinds = self.0.read().unwrap_or_else(PoisonError::into_inner);
        kinds.of(kind).seen.keys().filter(|key| !listed.contains(*key)).cloned().collect()
    }

    pub(super) fn heard(&self, kind: Followed, heard: bool) {
        self.change(kind, |known| known.heard = heard);
    }

    fn change(&self, kind: Followed, change: impl FnOnce(&mut Objects)) {
        let Some(kind) = bound(kind) else { return };
        let mut kinds = self.0.write().unwrap_or_else(PoisonError::into_inner);
        change(match kind {
            BoundKind::Node => &mut kinds.nodes,
            BoundKind::Pod => &mut kinds.pods,
            BoundKind::ServiceAccount => &mut kinds.accounts,
        });
    }
}

/// The kind of those objects that tokens can be bound to.
fn bound(followed: Followed) -> Option<BoundKind> {
    match followed {
        Followed::Routed(cluster::Kind::Nodes) => Some(BoundKind::Node),
        Followed::Routed(cluster::Kind::Pods) => Some(BoundKind::Pod),
        Followed::ServiceAccounts => Some(BoundKind::ServiceAccount),
        Followed::Routed(cluster::Kind::Services | cluster::Kind::EndpointSlices) => None,
    }
}

impl Kinds {
    fn of(&self, kind: BoundKind) -> &Objects {
        match kind {
            BoundKind::Node => &self.nodes,
            BoundKind::Pod => &self.pods,
            BoundKind::ServiceAccount => &self.accounts,
        }
    }
}

#[cfg(test)]
mod tests {
    use access::authn::cluster::Objects as _;
    use k8s_openapi::{apimachinery::pkg::apis::meta::v1::Time, jiff::Timestamp};

    use super::*;

    const PODS: Followed = Followed::Routed(cluster::Kind::Pods);
    const NOW: i64 = 1_800_000_000;

    fn object(kind: BoundKind, key: &str, uid: &str) -> BoundObject {
        BoundObject { kind, key: key.into(), uid: Uid::of(uid) }
    }

    /// Shows an object as its watch does.
    fn appear(existing: &ExistingObjects, kind: BoundKind, key: &str, uid: &str, deletion: Option<i64>) {
        existing.apply(followed(kind), &metadata(key, uid, deletion));
    }

    fn vanish(existing: &ExistingObjects, kind: BoundKind, key: &str) {
        existing.remove(followed(kind), key);
    }

    /// All that was shown is a whole list of each kind, and its watches stand or do not.
    fn listed(existing: &ExistingObjects, heard: bool) {
        for kind in [BoundKind::Node, BoundKind::Pod, BoundKind::ServiceAccount] {
            let keys = existing.0.read().unwrap().of(kind).seen.keys().cloned().collect();
            existing.retain(followed(kind), &keys);
            existing.heard(followed(kind), heard);
        }
    }

    fn followed(kind: BoundKind) -> Followed {
        match kind {
            BoundKind::Node => Followed::Routed(cluster::Kind::Nodes),
            BoundKind::Pod => PODS,
            BoundKind::ServiceAccount => Followed::ServiceAccounts,
        }
    }

    fn metadata(key: &str, uid: &str, deletion: Option<i64>) -> ObjectMeta {
        let (namespace, name) = key.split_once('/').map_or((None, key), |(ns, name)| (Some(ns), name));
        ObjectMeta {
            namespace: namespace.map(str::to_owned),
            name: Some(name.to_owned()),
            uid: Some(uid.to_owned()),
            deletion_timestamp: deletion.map(|at| Time(Timestamp::from_second(at).unwrap())),
            ..ObjectMeta::default()
        }
    }

    #[test]
    fn an_object_exists_under_its_uid_while_its_watch_stands() {
        let existing = ExistingObjects::default();
        let look = |uid: &str| existing.check(&[object(BoundKind::Pod, "a/web", uid)], NOW);
        assert_eq!(look("1"), Existence::Unknown, "nothing has been listed");
        appear(&existing, BoundKind::Pod, "a/web", "1", None);
        assert_eq!(look("1"), Existence::Unknown, "the list has not arrived whole");
        listed(&existing, true);
        assert_eq!((look("1"), look("2")), (Existence::Exist, Existence::Missing));
        appear(&existing, BoundKind::Pod, "a/web", "2", None);
        assert_eq!(
            (look("1"), look("2")),
            (Existence::Missing, Existence::Exist),
            "made anew under the same name"
        );
        existing.heard(PODS, false);
        assert_eq!((look("1"), look("2")), (Existence::Missing, Existence::Unknown));
        existing.heard(PODS, true);
        vanish(&existing, BoundKind::Pod, "a/web");
        assert_eq!(look("2"), Existence::Missing);
        let both = [object(BoundKind::ServiceAccount, "a/web", "1"), object(BoundKind::Node, "n1", "1")];
        appear(&existing, BoundKind::ServiceAccount, "a/web", "1", None);
        assert_eq!(existing.check(&both, NOW), Existence::Missing, "one of them is not there");
        appear(&existing, BoundKind::Node, "n1", "1", None);
        assert_eq!(existing.check(&both, NOW), Existence::Exist);
        existing.retain(Followed::ServiceAccounts, &HashSet::new());
        assert_eq!(existing.check(&both, NOW), Existence::Missing, "the next list does not have it");
    }

    #[test]
    fn one_that_is_being_deleted_exists_for_a_minute_more() {
        let existing = ExistingObjects::default();
        for (deletion, existence) in [
            (NOW + 30, Existence::Exist),
            (NOW - LEEWAY, Existence::Exist),
            (NOW - LEEWAY - 1, Existence::Missing),
        ] {
            appear(&existing, BoundKind::Pod, "a/web", "1", Some(deletion));
            listed(&existing, true);
            assert_eq!(existing.check(&[object(BoundKind::Pod, "a/web", "1")], NOW), existence, "{deletion}");
        }
    }
}
