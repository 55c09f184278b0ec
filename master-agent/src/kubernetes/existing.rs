//! Which nodes, pods and service accounts exist under which UIDs: what service accounts' tokens are bound to.
//!
//! This is read from the metadata alone, so that an object which is not understood otherwise still counts as the one
//! that exists, and its predecessor of the same name does not.

use std::{
    collections::{HashMap, HashSet},
    sync::{PoisonError, RwLock},
};

use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;
use sha2::{Digest, Sha256};

use super::{followed::Followed, objects};
use crate::routing::cluster::{self, Key};

/// Seconds for which an object that is to be deleted is still taken for existing after its `deletionTimestamp`, as
/// kube-apiserver has it (`pkg/serviceaccount/claims.go`).
const LEEWAY: i64 = 60;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    Node,
    Pod,
    ServiceAccount,
}

impl Kind {
    fn of(followed: Followed) -> Option<Self> {
        match followed {
            Followed::Routed(cluster::Kind::Nodes) => Some(Self::Node),
            Followed::Routed(cluster::Kind::Pods) => Some(Self::Pod),
            Followed::ServiceAccounts => Some(Self::ServiceAccount),
            Followed::Routed(cluster::Kind::Services | cluster::Kind::EndpointSlices) => None,
        }
    }
}

/// A digest, as UIDs are opaque text of any length.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Uid([u8; 16]);

impl Uid {
    pub fn of(text: &str) -> Self {
        let digest: [u8; 32] = Sha256::digest(text).into();
        let mut uid = [0; 16];
        uid.iter_mut().zip(digest).for_each(|(to, from)| *to = from);
        Self(uid)
    }
}

/// One object of those that were, or are to be: another one of the same name is another object.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Object {
    pub kind: Kind,
    pub key: Key,
    pub uid: Uid,
}

/// What is known of several objects together.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Sight {
    /// All of them exist.
    Exist,
    /// All that are known of did when the API server was last heard.
    Unknown,
    /// One of them is not there, or is no longer.
    Missing,
}

/// The objects, as the watches show them.
#[derive(Debug, Default)]
pub struct Existing(RwLock<Kinds>);

#[derive(Debug, Default)]
struct Kinds {
    nodes: Objects,
    pods: Objects,
    accounts: Objects,
}

#[derive(Debug, Default)]
struct Objects {
    seen: HashMap<Key, Seen>,
    /// A list has arrived whole.
    listed: bool,
    /// The watch stands.
    heard: bool,
}

#[derive(Debug)]
struct Seen {
    uid: Uid,
    /// Seconds since 1970.
    deletion: Option<i64>,
}

impl Existing {
    /// What is known of these at a time in seconds since 1970.
    pub fn look(&self, objects: &[Object], now: i64) -> Sight {
        let kinds = self.0.read().unwrap_or_else(PoisonError::into_inner);
        let mut sight = Sight::Exist;
        for object in objects {
            let known = kinds.of(object.kind);
            let exists = |seen: &Seen| {
                let deleted = seen.deletion.is_some_and(|at| at.saturating_add(LEEWAY) < now);
                seen.uid == object.uid && !deleted
            };
            match known.seen.get(&object.key) {
                Some(seen) if exists(seen) => {}
                Some(_) | None if known.listed => return Sight::Missing,
                Some(_) | None => sight = Sight::Unknown,
            }
            if !(known.listed && known.heard) {
                sight = Sight::Unknown;
            }
        }
        sight
    }

    pub fn count(&self, kind: Kind) -> usize {
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

    /// Forgets what a whole list does not have.
    pub(super) fn retain(&self, kind: Followed, listed: &HashSet<Key>) {
        self.change(kind, |known| {
            known.seen.retain(|key, _| listed.contains(key));
            known.listed = true;
        });
    }

    pub(super) fn heard(&self, kind: Followed, heard: bool) {
        self.change(kind, |known| known.heard = heard);
    }

    fn change(&self, kind: Followed, change: impl FnOnce(&mut Objects)) {
        let Some(kind) = Kind::of(kind) else { return };
        let mut kinds = self.0.write().unwrap_or_else(PoisonError::into_inner);
        change(match kind {
            Kind::Node => &mut kinds.nodes,
            Kind::Pod => &mut kinds.pods,
            Kind::ServiceAccount => &mut kinds.accounts,
        });
    }
}

impl Kinds {
    fn of(&self, kind: Kind) -> &Objects {
        match kind {
            Kind::Node => &self.nodes,
            Kind::Pod => &self.pods,
            Kind::ServiceAccount => &self.accounts,
        }
    }
}

#[cfg(test)]
pub mod tests {
    use k8s_openapi::{apimachinery::pkg::apis::meta::v1::Time, jiff::Timestamp};

    use super::*;

    const PODS: Followed = Followed::Routed(cluster::Kind::Pods);
    const NOW: i64 = 1_800_000_000;

    pub fn object(kind: Kind, key: &str, uid: &str) -> Object {
        Object { kind, key: key.into(), uid: Uid::of(uid) }
    }

    /// Shows an object as its watch does.
    pub fn appear(existing: &Existing, kind: Kind, key: &str, uid: &str, deletion: Option<i64>) {
        existing.apply(followed(kind), &metadata(key, uid, deletion));
    }

    pub fn vanish(existing: &Existing, kind: Kind, key: &str) {
        existing.remove(followed(kind), key);
    }

    /// All that was shown is a whole list of each kind, and its watches stand or do not.
    pub fn listed(existing: &Existing, heard: bool) {
        for kind in [Kind::Node, Kind::Pod, Kind::ServiceAccount] {
            let keys = existing.0.read().unwrap().of(kind).seen.keys().cloned().collect();
            existing.retain(followed(kind), &keys);
            existing.heard(followed(kind), heard);
        }
    }

    fn followed(kind: Kind) -> Followed {
        match kind {
            Kind::Node => Followed::Routed(cluster::Kind::Nodes),
            Kind::Pod => PODS,
            Kind::ServiceAccount => Followed::ServiceAccounts,
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
        let existing = Existing::default();
        let look = |uid: &str| existing.look(&[object(Kind::Pod, "a/web", uid)], NOW);
        assert_eq!(look("1"), Sight::Unknown, "nothing has been listed");
        appear(&existing, Kind::Pod, "a/web", "1", None);
        assert_eq!(look("1"), Sight::Unknown, "the list has not arrived whole");
        listed(&existing, true);
        assert_eq!((look("1"), look("2")), (Sight::Exist, Sight::Missing));
        appear(&existing, Kind::Pod, "a/web", "2", None);
        assert_eq!((look("1"), look("2")), (Sight::Missing, Sight::Exist), "made anew under the same name");
        existing.heard(PODS, false);
        assert_eq!((look("1"), look("2")), (Sight::Missing, Sight::Unknown));
        existing.heard(PODS, true);
        vanish(&existing, Kind::Pod, "a/web");
        assert_eq!(look("2"), Sight::Missing);
        let both = [object(Kind::ServiceAccount, "a/web", "1"), object(Kind::Node, "n1", "1")];
        appear(&existing, Kind::ServiceAccount, "a/web", "1", None);
        assert_eq!(existing.look(&both, NOW), Sight::Missing, "one of them is not there");
        appear(&existing, Kind::Node, "n1", "1", None);
        assert_eq!(existing.look(&both, NOW), Sight::Exist);
        existing.retain(Followed::ServiceAccounts, &HashSet::new());
        assert_eq!(existing.look(&both, NOW), Sight::Missing, "the next list does not have it");
    }

    #[test]
    fn one_that_is_being_deleted_exists_for_a_minute_more() {
        let existing = Existing::default();
        for (deletion, sight) in
            [(NOW + 30, Sight::Exist), (NOW - LEEWAY, Sight::Exist), (NOW - LEEWAY - 1, Sight::Missing)]
        {
            appear(&existing, Kind::Pod, "a/web", "1", Some(deletion));
            listed(&existing, true);
            assert_eq!(existing.look(&[object(Kind::Pod, "a/web", "1")], NOW), sight, "{deletion}");
        }
    }
}
