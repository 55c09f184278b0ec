//! Keeps what is known of one kind of object as the API server says: lists all of them, then watches for changes.
//!
//! Nothing is forgotten before a new list has arrived whole.

use std::{sync::Arc, time::Duration};

use futures_util::StreamExt;
use kube::{
    Api, Client,
    api::{ListParams, WatchEvent, WatchParams},
};
use proto::backoff::Backoff;
use tokio::time::Instant;

use super::{lenient::Lenient, state::State, watched::Watched};

/// Objects of one page of a list.
const PAGE: u32 = 500;
/// Pages of one list; beyond that the API server repeats itself.
const MAX_PAGES: usize = 10_000;
/// How long a watch lasts before the next one begins where it ended. A connection that has died silently is noticed
/// after that.
pub(super) const WATCH: Duration = Duration::from_secs(60);
/// A watch that has lasted this long has succeeded.
const SETTLED: Duration = Duration::from_secs(2);
/// Watches that fail one after the other before all objects are listed again.
const MAX_FAILURES: u32 = 3;
/// How long to wait for an answer, and for a watch to end after its time.
pub(super) const PATIENCE: Duration = Duration::from_secs(15);
const SHORTEST_DELAY: Duration = Duration::from_millis(500);
/// The longest pause between two attempts. A few masters with five kinds each are no load for an API server.
const LONGEST_DELAY: Duration = Duration::from_secs(10);
/// Characters of an error that are kept, as the API server may say anything.
const MAX_ERROR: usize = 300;

/// Follows one kind.
pub(super) struct Reflector<K> {
    api: Api<Lenient<K>>,
    state: Arc<State>,
}

/// Why a list or a watch ended early.
struct Interruption {
    /// The version from which the next watch may begin. Without it, a list is needed.
    version: Option<String>,
    error: String,
}

impl<K: Watched> Reflector<K> {
    pub(super) fn new(client: Client, state: Arc<State>) -> Self {
        Self { api: Api::all(client), state }
    }

    /// Lists and watches. Never returns.
    pub(super) async fn run(self) {
        let mut backoff = Backoff::new(SHORTEST_DELAY, LONGEST_DELAY);
        let mut version = None;
        let (mut failures, mut gone) = (0, false);
        loop {
            let listing = version.is_none();
            let from = match version.take() {
                Some(version) => Ok(version),
                None => self.list().await,
            };
            let known = from.is_ok();
            // The API server is there, unless it is one that lists and then knows nothing of its list.
            if listing && known && !gone {
                backoff.reset();
            }
            let watched = match from {
                Ok(from) => self.watch(from, &mut backoff).await,
                Err(error) => Err(Interruption { version: None, error }),
            };
            match watched {
                Ok(next) => {
                    backoff.reset();
                    (failures, gone) = (0, false);
                    version = Some(next);
                }
                Err(interruption) => {
                    self.state.failed(K::KIND, &interruption.error);
                    failures += 1;
                    gone = known && interruption.version.is_none();
                    version = interruption.version.filter(|_| failures % MAX_FAILURES != 0);
                    tokio::time::sleep(backoff.next_delay(rand::random())).await;
                }
            }
        }
    }

    /// Puts a whole list in the place of what is known. Returns the version to watch from.
    async fn list(&self) -> Result<String, String> {
        let mut params = ListParams::default().limit(PAGE);
        let mut listing = self.state.begin_list(K::KIND);
        for _ in 0..MAX_PAGES {
            let page = tokio::time::timeout(PATIENCE, self.api.list(&params)).await;
            let page = page.map_err(|_| "no answer to a list".to_owned())?.map_err(|e| show(&e))?;
            for object in page.items {
                self.state.add(&mut listing, object);
            }
            if let Some(token) = page.metadata.continue_.filter(|token| !token.is_empty()) {
                params = params.continue_token(&token);
                continue;
            }
            let version = page.metadata.resource_version.unwrap_or_default();
            if version.is_empty() {
                return Err("the answer has no resourceVersion, so it is not a list".to_owned());
            }
            self.state.finish_list(K::KIND, &listing, &version).await?;
            return Ok(version);
        }
        Err("the list does not end".to_owned())
    }

    /// Watches until the API server ends the watch, after its time ([`WATCH`]) or early. Returns the version to go on
    /// from.
    async fn watch(&self, from: String, backoff: &mut Backoff) -> Result<String, Interruption> {
        let mut version = from;
        let timeout = u32::try_from(WATCH.as_secs()).unwrap_or(u32::MAX);
        let params = WatchParams::default().timeout(timeout);
        let watch = match tokio::time::timeout(PATIENCE, self.api.watch(&params, &version)).await {
            Ok(Ok(watch)) => watch,
            Ok(Err(error)) => return Err(Interruption::by(&error, &version)),
            Err(_) => return Err(Interruption::at(&version, "no answer to a watch")),
        };
        let began = Instant::now();
        let settled = tokio::time::sleep(SETTLED);
        tokio::pin!(watch, settled);
        let mut quiet = true;
        loop {
            let next = tokio::select! {
                next = tokio::time::timeout(WATCH + PATIENCE, watch.next()) => next,
                // A watch that stands has nothing to say while nothing changes.
                () = &mut settled, if quiet => {
                    quiet = false;
                    backoff.reset();
                    self.state.heard(K::KIND);
                    continue;
                }
            };
            match next {
                Ok(Some(Ok(event))) => self.take(event, &mut version)?,
                Ok(Some(Err(error))) => return Err(Interruption::by(&error, &version)),
                // The API server ends watches; one that ends at once does not want to be asked again at once.
                Ok(None) if began.elapsed() > SETTLED => return Ok(version),
                Ok(None) => {
                    return Err(Interruption::at(&version, "the watch ended as soon as it had begun"));
                }
                Err(_) => return Err(Interruption::at(&version, "the watch went silent")),
            }
            backoff.reset();
            self.state.heard(K::KIND);
        }
    }

    /// Takes an event and notes its version.
    fn take(&self, event: WatchEvent<Lenient<K>>, version: &mut String) -> Result<(), Interruption> {
        match event {
            WatchEvent::Added(object) | WatchEvent::Modified(object) => {
                note(version, object.metadata.resource_version.as_deref());
                self.state.update(object);
            }
            WatchEvent::Deleted(object) => {
                note(version, object.metadata.resource_version.as_deref());
                self.state.delete(K::KIND, &object.metadata);
            }
            WatchEvent::Bookmark(bookmark) => note(version, Some(&bookmark.metadata.resource_version)),
            WatchEvent::Error(status) if status.code == 410 => return Err(Interruption::gone()),
            WatchEvent::Error(status) => return Err(Interruption::at(version, &status.message)),
        }
        Ok(())
    }
}

impl Interruption {
    /// The API server no longer has what followed the version that was asked for.
    fn gone() -> Self {
        Self { version: None, error: "410 Gone: the watch was too far behind, listing again".to_owned() }
    }

    fn at(version: &str, error: &str) -> Self {
        Self { version: Some(version.to_owned()), error: cut(error) }
    }

    fn by(error: &kube::Error, version: &str) -> Self {
        if let kube::Error::Api(status) = error
            && status.code == 410
        {
            return Self::gone();
        }
        Self::at(version, &show(error))
    }
}

fn note(version: &mut String, seen: Option<&str>) {
    if let Some(seen) = seen.filter(|seen| !seen.is_empty()) {
        seen.clone_into(version);
    }
}

/// An error with its causes, cut short.
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
    cut(&text)
}

fn cut(error: &str) -> String {
    error.chars().take(MAX_ERROR).collect()
}
