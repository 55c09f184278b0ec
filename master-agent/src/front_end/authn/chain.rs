//! The chain of the configured authenticators, with what it remembers of bearer tokens.

use std::{sync::Arc, time::Duration};

use super::{
    authenticated::{Authenticated, Recognized},
    authenticator::Authenticator,
    cache::{Cache, Digest},
    config::CacheConfig,
    credential::Presented,
    failure::Failure,
    moment::Moment,
    reason::Reason,
};
use crate::{
    client_certificates::ClientCa,
    reloaded::{Follow, Reloaded},
};

/// How long, and of how many, it is known that a token was good.
const PROVEN: Duration = Duration::from_secs(3600);
const MAX_PROVEN: usize = 10_000;

/// The configured authenticators, in order.
pub struct Authenticators {
    chain: Vec<(&'static str, Box<dyn Authenticator>)>,
    /// Who bearer tokens were, and which authenticator knew them.
    remembered: Cache<Remembered>,
    /// Tokens that finding out about cost something, and that were good.
    proven: Cache<()>,
    /// What the authenticators are read from: when one changes, nothing is remembered.
    files: Vec<Arc<dyn Follow>>,
    client_ca: Option<Arc<Reloaded<ClientCa>>>,
}

#[derive(Clone)]
struct Remembered {
    /// In the chain.
    authenticator: usize,
    generation: u64,
    recognized: Recognized,
}

impl Authenticators {
    /// `files` are what the authenticators are read from. `client_ca` is whose certificates TLS asks callers for.
    pub fn new(
        chain: Vec<(&'static str, Box<dyn Authenticator>)>,
        files: Vec<Arc<dyn Follow>>,
        client_ca: Option<Arc<Reloaded<ClientCa>>>,
        cache: CacheConfig,
    ) -> Self {
        let remembered = Cache::new(cache.size, cache.ttl);
        Self { chain, remembered, proven: Cache::new(MAX_PROVEN, PROVEN), files, client_ca }
    }

    /// Whose certificates TLS asks callers for; `None` asks for none.
    pub fn client_ca(&self) -> Option<&Arc<Reloaded<ClientCa>>> {
        self.client_ca.as_ref()
    }

    /// Changes whenever a file that decides about callers does: what was found out before holds no longer. What was
    /// found out about a connection's certificate may be kept until then, or until it expires.
    pub fn generation(&self) -> u64 {
        self.files.iter().fold(0, |sum, file| sum.wrapping_add(file.generation()))
    }

    pub async fn authenticate(
        &self,
        mut presented: Presented<'_>,
        now: Moment,
    ) -> Result<Authenticated, Failure> {
        let generation = self.generation();
        let digest = presented.bearer.as_ref().map(Digest::of);
        let remembered = digest.and_then(|digest| self.remembered.get(&digest, now.monotonic));
        let remembered = remembered.filter(|found| {
            let expired = found.recognized.expires.is_some_and(|end| now.wall >= end);
            found.generation == generation && !expired
        });
        let proven = digest.filter(|digest| self.proven.get(digest, now.monotonic).is_some());
        if proven.is_some() {
            presented.cost.unguard();
        }
        let mut failure = Failure::default();
        for (index, (name, authenticator)) in self.chain.iter().enumerate() {
            let known = remembered.as_ref().filter(|_| authenticator.remembers());
            // One before the winner did not know the token then, and does not now.
            if known.is_some_and(|found| index < found.authenticator) {
                continue;
            }
            let known = known.filter(|found| index == found.authenticator);
            let found = match known {
                Some(found) => Ok(Some(found.recognized.clone())),
                None => {
                    let found = authenticator.authenticate(&presented, now).await;
                    found.and_then(|found| found.map(Recognized::checked).transpose())
                }
            };
            match found {
                Ok(Some(recognized)) => {
                    if let Some(digest) = digest
                        && authenticator.remembers()
                        && known.is_none()
                    {
                        let recognized = recognized.clone();
                        let value = Remembered { authenticator: index, generation, recognized };
                        self.remembered.put(digest, value, now.monotonic);
                    }
                    // That something exists is not remembered with it.
                    if let Err(reason) = still_bound(&recognized, &presented, digest, now).await {
                        if matches!(reason, Reason::Unavailable(_)) {
                            let who = Authenticated::by(name, recognized, presented.bearer.clone());
                            failure.unchecked = Some(Box::new(who));
                        }
                        failure.said.push((name, reason));
                        continue;
                    }
                    if let Some(digest) = digest.filter(|_| presented.cost.incurred()) {
                        self.proven.put(digest, (), now.monotonic);
                    }
                    return Ok(Authenticated::by(name, recognized, presented.bearer.take()));
                }
                Ok(None) => {}
                Err(reason) => failure.said.push((name, reason)),
            }
        }
        if let Some(digest) = proven.filter(|_| !failure.is_unavailable()) {
            self.proven.remove(&digest);
        }
        if failure.said.is_empty() {
            failure.said.push(("request", presented.unrecognized()));
        }
        Err(failure)
    }
}

async fn still_bound(
    recognized: &Recognized,
    presented: &Presented<'_>,
    digest: Option<Digest>,
    now: Moment,
) -> Result<(), Reason> {
    match (&recognized.bound, &presented.bearer, digest) {
        (Some(bound), Some(token), Some(digest)) => {
            bound.check(token, digest, Some(&presented.cost), now).await
        }
        (None, _, _) | (_, None, _) | (_, _, None) => Ok(()),
    }
}
