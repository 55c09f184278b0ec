//! What the API server has told: the routes, which objects exist, and how old the knowledge of each kind is.

use std::{
    collections::{HashMap, HashSet},
    sync::{Arc, Mutex, PoisonError},
};

use access::authn::cluster::BoundKind;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;
use serde::Serialize;
use tokio::{sync::watch, task::yield_now, time::Instant};

use super::{existing::ExistingObjects, followed::Followed, lenient::Lenient, objects, watched::Watched};
use crate::routing::{
    cluster::{Key, Kind, Object},
    shared::SharedRoutes,
};

/// Characters of an error about one object that are shown.
const MAX_SHOWN: usize = 200;
/// The number of objects that are removed at once. Dials wait meanwhile, for some ten microseconds.
const BATCH: usize = 32;

/// How one kind of object is followed.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct WatchStatus {
    pub kind: &'static str,
    pub objects: usize,
    /// Whether a list has arrived whole.
    pub listed: bool,
    /// Seconds since the API server was last heard, if that is not now.
    pub stale_seconds: Option<u64>,
    pub error: Option<String>,
    pub errors: u64,
    /// Which objects could not be read.
    pub unreadable: Option<String>,
}

/// What is known, shared by the reflectors of all kinds.
pub(super) struct State {
    routes: Arc<SharedRoutes>,
    /// `None` where nobody asks which objects exist.
    existing: Option<Arc<ExistingObjects>>,
    kinds: Mutex<HashMap<Followed, Freshness>>,
    nodes_changed: watch::Sender<()>,
}

#[derive(Clone, Debug, Default)]
struct Freshness {
    listed: bool,
    /// Since when the API server has not been heard, and why.
    stale: Option<(Instant, String)>,
    errors: u64,
    /// How many versions of objects could not be read since the last list, and what was wrong with the last one.
    unreadable: Option<(u64, String)>,
}

/// The keys of a list that is arriving.
#[derive(Debug, Default)]
pub(super) struct Listing {
    count: usize,
    routed: HashSet<Key>,
    existing: HashSet<Key>,
}

impl State {
    pub(super) fn new(routes: Arc<SharedRoutes>, existing: Option<Arc<ExistingObjects>>) -> Self {
        Self { routes, existing, kinds: Mutex::default(), nodes_changed: watch::Sender::new(()) }
    }

    pub(super) fn existing(&self) -> Option<&Arc<ExistingObjects>> {
        self.existing.as_ref()
    }

    pub(super) fn nodes_changed(&self) -> watch::Receiver<()> {
        self.nodes_changed.subscribe()
    }

    pub(super) fn status(&self, kind: Followed) -> WatchStatus {
        let fresh = self.change(kind, |fresh| fresh.clone());
        WatchStatus {
            kind: kind.name(),
            objects: self.count(kind),
            listed: fresh.listed,
            stale_seconds: fresh.stale.as_ref().map(|(since, _)| since.elapsed().as_secs()),
            error: fresh.stale.map(|(_, error)| error),
            errors: fresh.errors,
            unreadable: fresh
                .unreadable
                .map(|(count, last)| format!("{count} can't be read, the last: {last}")),
        }
    }

    /// Says so once all kinds that routes depend on have been listed.
    fn check_complete(&self) {
        let routed = Followed::ALL.into_iter().filter(|kind| matches!(kind, Followed::Routed(_)));
        if routed.into_iter().all(|kind| self.change(kind, |fresh| fresh.listed)) {
            self.routes.set_complete(true);
        }
    }

    /// Begins a list, which arrives in pages.
    pub(super) fn begin_list(&self, kind: Followed) -> Listing {
        self.change(kind, |fresh| fresh.unreadable = None);
        Listing::default()
    }

    /// Takes an object of a list.
    pub(super) fn add<K: Watched>(&self, listing: &mut Listing, object: Lenient<K>) {
        listing.count += 1;
        if self.existing.is_some() {
            listing.existing.extend(objects::key(&object.metadata));
        }
        listing.routed.extend(self.apply(object));
    }

    /// Puts a list that has arrived whole in the place of what is known.
    pub(super) async fn finish_list(
        &self,
        kind: Followed,
        listing: &Listing,
        version: &str,
    ) -> Result<(), String> {
        if let Followed::Routed(routed) = kind {
            // Without a node nothing could be reached. Nodes that really go are deleted one by one.
            if routed == Kind::Nodes && listing.routed.is_empty() && self.count(kind) > 0 {
                return Err("the list has no nodes any more; the last ones stay until a restart".to_owned());
            }
            self.routes.change(|routes| routes.cluster.settle(routed));
            let unlisted = self.routes.read(|routes| routes.cluster.unlisted(routed, &listing.routed));
            for batch in unlisted.chunks(BATCH) {
                self.routes.change(|routes| batch.iter().for_each(|key| routes.cluster.remove(routed, key)));
                yield_now().await;
            }
        }
        if let Some(existing) = &self.existing {
            existing.retain(kind, &listing.existing);
        }
        self.announce(kind);
        self.heard(kind);
        self.change(kind, |fresh| fresh.listed = true);
        self.check_complete();
        tracing::info!(kind = kind.name(), objects = listing.count, version, "listed");
        Ok(())
    }

    /// Takes an object that was added or changed. If nothing can be routed by it any more, its routes go.
    pub(super) fn update<K: Watched>(&self, object: Lenient<K>) {
        let key = objects::key(&object.metadata);
        if self.apply(object).is_none()
            && let Some(key) = key
        {
            self.unroute(K::KIND, &key);
        }
    }

    pub(super) fn delete(&self, kind: Followed, metadata: &ObjectMeta) {
        let Some(key) = objects::key(metadata) else { return };
        if let Some(existing) = &self.existing {
            existing.remove(kind, &key);
        }
        self.unroute(kind, &key);
    }

    /// Notes that the API server has answered, or that a watch has been established.
    pub(super) fn heard(&self, kind: Followed) {
        if let Some(existing) = &self.existing {
            existing.heard(kind, true);
        }
        self.change(kind, |fresh| {
            if let Some((since, _)) = fresh.stale.take() {
                let seconds = since.elapsed().as_secs();
                tracing::info!(kind = kind.name(), seconds, "the API server is back");
            }
        });
    }

    /// Notes that a list or a watch has failed. What is known stays.
    pub(super) fn failed(&self, kind: Followed, error: &str) {
        if let Some(existing) = &self.existing {
            existing.heard(kind, false);
        }
        self.change(kind, |fresh| {
            fresh.errors += 1;
            let since = match &fresh.stale {
                Some((since, _)) => *since,
                None => {
                    let kind = kind.name();
                    tracing::warn!(kind, error, "can't follow the API server; what is known stays");
                    Instant::now()
                }
            };
            fresh.stale = Some((since, error.to_owned()));
        });
    }

    /// Takes an object. Returns its key, or `None` if nothing can be routed by it. The former version of an object that
    /// can't be read stays, as far as routes go.
    fn apply<K: Watched>(&self, object: Lenient<K>) -> Option<Key> {
        if let Some(existing) = &self.existing {
            existing.apply(K::KIND, &object.metadata);
        }
        let key = objects::key(&object.metadata);
        let object = match object.object {
            Ok(object) => object.object()?,
            Err(error) => {
                self.unreadable(K::KIND, key.as_deref().unwrap_or("without a name"), &error);
                return key;
            }
        };
        let key = object.key();
        let changed = self.routes.change(|routes| {
            let changed = match &object {
                Object::Node(node) => routes.cluster.node(&key) != Some(node),
                Object::Pod(_) | Object::Service(_) | Object::EndpointSlice(_) => false,
            };
            routes.cluster.apply(object);
            changed
        });
        if changed {
            self.announce(K::KIND);
        }
        Some(key)
    }

    fn unroute(&self, kind: Followed, key: &str) {
        if let Followed::Routed(kind) = kind {
            self.routes.change(|routes| routes.cluster.remove(kind, key));
        }
        self.announce(kind);
    }

    fn announce(&self, kind: Followed) {
        if kind == Followed::Routed(Kind::Nodes) {
            self.nodes_changed.send_replace(());
        }
    }

    fn unreadable(&self, kind: Followed, key: &str, error: &str) {
        let shown: String = format!("{key}: {error}").chars().take(MAX_SHOWN).collect();
        self.change(kind, |fresh| {
            let count = fresh.unreadable.as_ref().map_or(0, |(count, _)| *count);
            if count == 0 {
                let kind = kind.name();
                tracing::warn!(kind, object = shown, "an object can't be read; its former version stays");
            }
            fresh.unreadable = Some((count + 1, shown));
        });
    }

    fn count(&self, kind: Followed) -> usize {
        match kind {
            Followed::Routed(kind) => self.routes.read(|routes| routes.cluster.count(kind)),
            Followed::ServiceAccounts => {
                self.existing.as_ref().map_or(0, |existing| existing.count(BoundKind::ServiceAccount))
            }
        }
    }

    fn change<R>(&self, kind: Followed, change: impl FnOnce(&mut Freshness) -> R) -> R {
        let mut kinds = self.kinds.lock().unwrap_or_else(PoisonError::into_inner);
        change(kinds.entry(kind).or_default())
    }
}
