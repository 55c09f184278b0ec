//! Follows the Kubernetes API: lists, then watches, Nodes, Pods, Services and EndpointSlices, and keeps the
//! routes as they say. Where tokens of service accounts are checked, it follows ServiceAccounts, too, and keeps which of
//! these objects exist.
//!
//! Whatever goes wrong with the API, what is known stays: nothing is forgotten before a new list has arrived whole,
//! and how old the last good word is can be asked ([`Watches::status`]).

pub mod config;
pub mod existing;
mod followed;
mod lenient;
pub mod metrics;
mod objects;

use std::{
    collections::HashSet,
    fmt::Debug,
    sync::{Arc, Mutex, PoisonError},
    time::{Duration, Instant},
};

use anyhow::Context as _;
use futures_util::StreamExt as _;
use k8s_openapi::api::{core::v1 as core, discovery::v1 as discovery};
use kube::{
    Api, Client,
    api::{ListParams, WatchEvent, WatchParams},
    config::{KubeConfigOptions, Kubeconfig},
};
use proto::backoff::Backoff;
use proto_net::tasks::Tasks;
use serde::{Serialize, de::DeserializeOwned};
use tokio::sync::watch;

use config::KubernetesConfig;
use existing::Existing;
use followed::Followed;
use lenient::Lenient;

use crate::routing::{
    cluster::{Key, Kind, Object},
    shared::SharedRoutes,
};

/// Objects of one page of a list.
const PAGE: u32 = 500;
/// Pages of one list; beyond that the API server repeats itself.
const PAGES: usize = 10_000;
/// How long a watch lasts before the next one begins where it ended. A connection that is dead without a sign
/// is noticed after that.
const WATCH: Duration = Duration::from_secs(60);
/// A watch that has lasted so long is one.
const SETTLED: Duration = Duration::from_secs(2);
/// Watches that fail one after the other before all objects are listed again.
const FAILURES: u32 = 3;
/// How much longer than that to wait for its end, and for a page of a list.
const PATIENCE: Duration = Duration::from_secs(15);
/// Between two attempts at an API server that is away; a few masters and five kinds are no load for it.
const LONGEST_DELAY: Duration = Duration::from_secs(10);

/// A cluster that is asked, and what is known of it.
#[derive(Clone)]
pub struct Cluster {
    pub client: Client,
    /// `None` where nobody wants to know.
    pub existing: Option<Arc<Existing>>,
}

/// The state of the watches. Cheap to share.
pub struct Watches {
    routes: Arc<SharedRoutes>,
    stale_after: Duration,
    kinds: Mutex<[Freshness; Followed::ALL.len()]>,
    /// `None` does not follow service accounts.
    existing: Option<Arc<Existing>>,
    nodes_changed: watch::Sender<()>,
}

#[derive(Clone, Debug, Default)]
struct Freshness {
    /// A list has arrived whole.
    listed: bool,
    /// Since when the API server has not been heard, and why.
    stale: Option<(Instant, String)>,
    errors: u64,
    /// Objects since the last list that could not be read, and what was wrong with the last one.
    unreadable: Option<(u64, String)>,
}

/// How one kind of object is followed.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct WatchStatus {
    pub kind: &'static str,
    pub objects: usize,
    pub listed: bool,
    /// Seconds since the API server was last heard, if that is not now.
    pub stale_seconds: Option<u64>,
    pub error: Option<String>,
    pub errors: u64,
    /// Which objects could not be read.
    pub unreadable: Option<String>,
}

/// A kind of object, and how routing's form of it is made.
trait Watched: kube::Resource<DynamicType = ()> + DeserializeOwned + Clone + Debug + Send + 'static {
    const KIND: Followed;
    fn object(self) -> Option<Object>;
}

macro_rules! watched {
    ($($type:ty, $kind:expr, $convert:path;)*) => {$(
        impl Watched for $type {
            const KIND: Followed = Followed::Routed($kind);

            fn object(self) -> Option<Object> {
                $convert(self)
            }
        }
    )*};
}

watched! {
    core::Node, Kind::Nodes, objects::node;
    core::Pod, Kind::Pods, objects::pod;
    core::Service, Kind::Services, objects::service;
    discovery::EndpointSlice, Kind::EndpointSlices, objects::endpoint_slice;
}

impl Watched for core::ServiceAccount {
    const KIND: Followed = Followed::ServiceAccounts;

    fn object(self) -> Option<Object> {
        None
    }
}

/// A client of the API server, from a kubeconfig file, or with what a pod is given.
pub async fn client(config: &KubernetesConfig) -> anyhow::Result<Client> {
    let mut client = match &config.kubeconfig {
        Some(path) => {
            let context = || format!("can't use the kubeconfig {}", path.display());
            let kubeconfig = Kubeconfig::read_from(path).with_context(context)?;
            kube::Config::from_custom_kubeconfig(kubeconfig, &KubeConfigOptions::default())
                .await
                .with_context(context)?
        }
        None => kube::Config::incluster()
            .context("kubernetes.kubeconfig is not given, and this is no pod with a service account")?,
    };
    client.connect_timeout = Some(PATIENCE);
    client.read_timeout = Some(WATCH + PATIENCE);
    Client::try_from(client).context("no client for the Kubernetes API")
}

impl Watches {
    /// `accounts` also follows service accounts, and keeps which objects exist that tokens can be bound to.
    pub fn new(routes: Arc<SharedRoutes>, stale_after: Duration, accounts: bool) -> Arc<Self> {
        let (kinds, existing) = (Mutex::default(), accounts.then(Arc::default));
        Arc::new(Self { routes, stale_after, kinds, existing, nodes_changed: watch::Sender::new(()) })
    }

    /// Which objects exist that tokens can be bound to.
    pub fn existing(&self) -> Option<Arc<Existing>> {
        self.existing.clone()
    }

    /// Follows all kinds until the group is cancelled.
    pub fn start(self: &Arc<Self>, client: &Client, tasks: &Tasks) {
        tasks.spawn(self.clone().follow::<core::Node>(client.clone()));
        tasks.spawn(self.clone().follow::<core::Pod>(client.clone()));
        tasks.spawn(self.clone().follow::<core::Service>(client.clone()));
        tasks.spawn(self.clone().follow::<discovery::EndpointSlice>(client.clone()));
        if self.existing.is_some() {
            tasks.spawn(self.clone().follow::<core::ServiceAccount>(client.clone()));
        }
    }

    /// Completes a wait whenever the set of nodes, or an address of one, has changed.
    pub fn nodes_changed(&self) -> watch::Receiver<()> {
        self.nodes_changed.subscribe()
    }

    pub fn status(&self) -> Vec<WatchStatus> {
        let kinds = self.kinds.lock().unwrap_or_else(PoisonError::into_inner).clone();
        let followed = |kind: &Followed| self.existing.is_some() || *kind != Followed::ServiceAccounts;
        let all = Followed::ALL.into_iter().zip(kinds).filter(|(kind, _)| followed(kind));
        let status = all.map(|(kind, fresh)| WatchStatus {
            kind: kind.name(),
            objects: self.count(kind),
            listed: fresh.listed,
            stale_seconds: fresh.stale.as_ref().map(|(since, _)| since.elapsed().as_secs()),
            error: fresh.stale.map(|(_, error)| error),
            errors: fresh.errors,
            unreadable: fresh
                .unreadable
                .map(|(count, last)| format!("{count} can't be read, the last: {last}")),
        });
        status.collect()
    }

    fn count(&self, kind: Followed) -> usize {
        match kind {
            Followed::Routed(kind) => self.routes.read(|routes| routes.cluster.count(kind)),
            Followed::ServiceAccounts => {
                self.existing.as_ref().map_or(0, |existing| existing.count(existing::Kind::ServiceAccount))
            }
        }
    }

    /// What there is to say about the watches: `Err` when routes are missing, or older than is tolerable.
    pub fn ready(&self) -> Result<Vec<String>, String> {
        let (mut late, mut stale) = (Vec::new(), Vec::new());
        for status in self.status() {
            let error = status.error.as_deref().unwrap_or("not asked yet");
            let kind = status.kind;
            stale.extend(status.unreadable.iter().map(|what| format!("{kind}: {what}")));
            match status.stale_seconds {
                // No route depends on them, and each token can be asked about by itself.
                seconds
                    if kind == Followed::ServiceAccounts.name() && (!status.listed || seconds.is_some()) =>
                {
                    stale.push(format!(
                        "{kind} can't be followed, so the API server is asked about each token: {error}"
                    ));
                }
                _ if !status.listed => late.push(format!("{kind} have not been listed yet: {error}")),
                Some(seconds) if Duration::from_secs(seconds) >= self.stale_after => {
                    late.push(format!("{kind} are {seconds} s old: {error}"));
                }
                Some(seconds) => stale.push(format!("{kind} are {seconds} s old: {error}")),
                None => {}
            }
        }
        if late.is_empty() { Ok(stale) } else { Err(late.join("; ")) }
    }

    /// Lists and watches one kind, for ever.
    async fn follow<K: Watched>(self: Arc<Self>, client: Client) {
        let api: Api<Lenient<K>> = Api::all(client);
        let mut backoff = Backoff::new(Duration::from_millis(500), LONGEST_DELAY);
        let mut version = None;
        let (mut failures, mut gone) = (0, false);
        loop {
            let listing = version.is_none();
            let from = match version.take() {
                Some(version) => Ok(version),
                None => self.list(&api).await,
            };
            let known = from.is_ok();
            // The API server is there; unless it is one that lists and then knows nothing of its list.
            if listing && known && !gone {
                backoff.reset();
            }
            let followed = match from {
                Ok(from) => self.watch(&api, from, &mut backoff).await,
                Err(error) => Err(Broken { version: None, error }),
            };
            match followed {
                Ok(next) => {
                    backoff.reset();
                    (failures, gone) = (0, false);
                    version = Some(next);
                }
                Err(broken) => {
                    self.failed(K::KIND, &broken.error);
                    failures += 1;
                    gone = known && broken.version.is_none();
                    version = broken.version.filter(|_| failures % FAILURES != 0);
                    tokio::time::sleep(backoff.next_delay(rand::random())).await;
                }
            }
        }
    }

    /// Puts a whole list in the place of what is known; gives the version to watch from.
    async fn list<K: Watched>(&self, api: &Api<Lenient<K>>) -> Result<String, String> {
        let mut params = ListParams::default().limit(PAGE);
        let mut listed = HashSet::new();
        let mut existing = self.existing.as_ref().map(|known| (known, HashSet::new()));
        let mut count = 0;
        self.change(K::KIND, |fresh| fresh.unreadable = None);
        for _ in 0..PAGES {
            let page = tokio::time::timeout(PATIENCE, api.list(&params)).await;
            let page = page.map_err(|_| "no answer to a list".to_owned())?.map_err(|e| show(&e))?;
            for object in page.items {
                count += 1;
                if let Some((_, existing)) = &mut existing {
                    existing.extend(objects::key(&object.metadata));
                }
                listed.extend(self.apply(object));
            }
            match page.metadata.continue_.filter(|token| !token.is_empty()) {
                Some(token) => params = params.continue_token(&token),
                None => {
                    let version = page.metadata.resource_version.unwrap_or_default();
                    if version.is_empty() {
                        return Err("the list has no resourceVersion, so it is none".to_owned());
                    }
                    // Without a node nothing could be reached. Nodes that really go are told one by one.
                    let nodes = K::KIND == Followed::Routed(Kind::Nodes);
                    if nodes && listed.is_empty() && self.count(K::KIND) > 0 {
                        return Err(
                            "the list has no nodes any more; the last ones stay until a restart".to_owned()
                        );
                    }
                    if let Followed::Routed(kind) = K::KIND {
                        self.routes.change(|routes| routes.cluster.retain(kind, &listed));
                    }
                    if let Some((known, existing)) = &existing {
                        known.retain(K::KIND, existing);
                    }
                    self.tell(K::KIND);
                    self.heard(K::KIND, true);
                    tracing::info!(kind = K::KIND.name(), objects = count, version, "listed");
                    return Ok(version);
                }
            }
        }
        Err("the list does not end".to_owned())
    }

    /// Watches until the API server ends it, in order ([`WATCH`]) or not; gives the version to go on from.
    async fn watch<K: Watched>(
        &self,
        api: &Api<Lenient<K>>,
        from: String,
        backoff: &mut Backoff,
    ) -> Result<String, Broken> {
        let mut version = from;
        let timeout = u32::try_from(WATCH.as_secs()).unwrap_or(u32::MAX);
        let params = WatchParams::default().timeout(timeout);
        let broken = |version: &str, error: String| Broken { version: Some(version.to_owned()), error };
        let watch = match tokio::time::timeout(PATIENCE, api.watch(&params, &version)).await {
            Ok(Ok(watch)) => watch,
            Ok(Err(kube::Error::Api(status))) if status.code == 410 => return Err(Broken::gone()),
            Ok(Err(error)) => return Err(broken(&version, show(&error))),
            Err(_) => return Err(broken(&version, "no answer to a watch".to_owned())),
        };
        let began = Instant::now();
        let settled = tokio::time::sleep(SETTLED);
        tokio::pin!(watch, settled);
        let mut quiet = true;
        loop {
            let next = tokio::select! {
                next = tokio::time::timeout(WATCH + PATIENCE, watch.next()) => next,
                // No news is good news, from a watch that stands.
                () = &mut settled, if quiet => {
                    quiet = false;
                    backoff.reset();
                    self.heard(K::KIND, false);
                    continue;
                }
            };
            let event = match next {
                Ok(Some(Ok(event))) => event,
                Ok(Some(Err(kube::Error::Api(status)))) if status.code == 410 => return Err(Broken::gone()),
                Ok(Some(Err(error))) => return Err(broken(&version, show(&error))),
                // The API server ends watches; one that ends at once does not want to be asked again at once.
                Ok(None) if began.elapsed() > SETTLED => return Ok(version),
                Ok(None) => {
                    return Err(broken(&version, "the watch ended as soon as it had begun".to_owned()));
                }
                Err(_) => return Err(broken(&version, "the watch went silent".to_owned())),
            };
            match event {
                WatchEvent::Added(object) | WatchEvent::Modified(object) => {
                    note(&mut version, object.metadata.resource_version.as_deref());
                    let key = objects::key(&object.metadata);
                    if self.apply(object).is_none()
                        && let Some(key) = key
                    {
                        self.unroute(K::KIND, &key);
                    }
                }
                WatchEvent::Deleted(object) => {
                    note(&mut version, object.metadata.resource_version.as_deref());
                    if let Some(key) = objects::key(&object.metadata) {
                        if let Some(existing) = &self.existing {
                            existing.remove(K::KIND, &key);
                        }
                        self.unroute(K::KIND, &key);
                    }
                }
                WatchEvent::Bookmark(bookmark) => {
                    note(&mut version, Some(&bookmark.metadata.resource_version));
                }
                WatchEvent::Error(status) if status.code == 410 => return Err(Broken::gone()),
                WatchEvent::Error(status) => return Err(broken(&version, status.message)),
            }
            backoff.reset();
            self.heard(K::KIND, false);
        }
    }

    /// Takes an object; gives its key, or `None` if there is no route to it. The former version of one that can't be
    /// read stays, as far as routes go.
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
            self.tell(K::KIND);
        }
        Some(key)
    }

    fn unroute(&self, kind: Followed, key: &str) {
        if let Followed::Routed(kind) = kind {
            self.routes.change(|routes| routes.cluster.remove(kind, key));
        }
        self.tell(kind);
    }

    fn tell(&self, kind: Followed) {
        if kind == Followed::Routed(Kind::Nodes) {
            self.nodes_changed.send_replace(());
        }
    }

    fn change(&self, kind: Followed, change: impl FnOnce(&mut Freshness)) {
        let mut kinds = self.kinds.lock().unwrap_or_else(PoisonError::into_inner);
        let at = Followed::ALL.iter().position(|k| *k == kind);
        if let Some(freshness) = at.and_then(|at| kinds.get_mut(at)) {
            change(freshness);
        }
    }

    fn heard(&self, kind: Followed, listed: bool) {
        if let Some(existing) = &self.existing {
            existing.heard(kind, true);
        }
        self.change(kind, |fresh| {
            if let Some((since, _)) = fresh.stale.take() {
                tracing::info!(
                    kind = kind.name(),
                    seconds = since.elapsed().as_secs(),
                    "the API server is back"
                );
            }
            fresh.listed |= listed;
        });
    }

    fn unreadable(&self, kind: Followed, key: &str, error: &str) {
        let what: String = format!("{key}: {error}").chars().take(200).collect();
        self.change(kind, |fresh| {
            let count = fresh.unreadable.as_ref().map_or(0, |(count, _)| *count);
            if count == 0 {
                tracing::warn!(
                    kind = kind.name(),
                    key,
                    error,
                    "an object can't be read; its former version stays"
                );
            }
            fresh.unreadable = Some((count + 1, what));
        });
    }

    fn failed(&self, kind: Followed, error: &str) {
        if let Some(existing) = &self.existing {
            existing.heard(kind, false);
        }
        self.change(kind, |fresh| {
            fresh.errors += 1;
            let since = match &fresh.stale {
                Some((since, _)) => *since,
                None => {
                    tracing::warn!(
                        kind = kind.name(),
                        error,
                        "can't follow the API server; what is known stays"
                    );
                    Instant::now()
                }
            };
            fresh.stale = Some((since, error.to_owned()));
        });
    }
}

/// A list or a watch that failed.
struct Broken {
    /// Where the next watch may begin; without it, a list is needed.
    version: Option<String>,
    error: String,
}

impl Broken {
    /// The API server no longer has what followed the version that was asked for.
    fn gone() -> Self {
        Self { version: None, error: "410 Gone: the watch was too far behind, listing again".to_owned() }
    }
}

fn note(version: &mut String, seen: Option<&str>) {
    if let Some(seen) = seen.filter(|seen| !seen.is_empty()) {
        seen.clone_into(version);
    }
}

/// An error with its causes, cut short, as the API server may say anything.
fn show(error: &kube::Error) -> String {
    let mut text = error.to_string();
    let mut cause = std::error::Error::source(error);
    while let Some(e) = cause {
        let more = e.to_string();
        if !text.contains(&more) {
            text = format!("{text}: {more}");
        }
        cause = e.source();
    }
    text.chars().take(300).collect()
}
