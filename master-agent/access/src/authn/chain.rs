//! The configured authenticators, and the cache of results for bearer tokens.

use std::{sync::Arc, time::Duration};

use proto_net::file_watcher::{FileWatcher, Watcher};

use super::{
    authenticated::{Authenticated, Recognized},
    authenticator::Authenticator,
    config::CacheConfig,
    credential::Presented,
    failure::AuthenticationFailure,
    reason::FailureReason,
};
use crate::{cache::Cache, client_certificates::ClientCa, moment::Moment, secret::Digest};

/// How long it is remembered that a token was valid, and for how many tokens.
const PROVEN: Duration = Duration::from_secs(3600);
const MAX_PROVEN: usize = 10_000;

/// The configured authenticators, in order.
pub struct Authenticators {
    chain: Vec<NamedAuthenticator>,
    /// The results for bearer tokens.
    remembered: Cache<Digest, Remembered>,
    ttl: Duration,
    /// The tokens that were costly to check and valid.
    proven: Cache<Digest, ()>,
    /// The files of the authenticators. A change of one of them invalidates the remembered results.
    files: Vec<Arc<dyn Watcher>>,
    client_ca: Option<Arc<FileWatcher<ClientCa>>>,
}

/// One authenticator of the chain.
pub(super) struct NamedAuthenticator {
    /// The name of its kind in the configuration.
    pub(super) name: &'static str,
    pub(super) authenticator: Box<dyn Authenticator>,
}

#[derive(Clone)]
struct Remembered {
    /// The position of the authenticator that has recognised the token.
    position: usize,
    generation: u64,
    recognized: Recognized,
}

impl Authenticators {
    /// `files` are the files of the authenticators, and `client_ca` is the issuer of callers' certificates.
    pub(super) fn new(
        chain: Vec<NamedAuthenticator>,
        files: Vec<Arc<dyn Watcher>>,
        client_ca: Option<Arc<FileWatcher<ClientCa>>>,
        cache: CacheConfig,
    ) -> Self {
        let (remembered, proven) = (Cache::new(cache.size), Cache::new(MAX_PROVEN));
        Self { chain, remembered, ttl: cache.ttl, proven, files, client_ca }
    }

    /// Returns the issuer of the certificates that callers are asked for. `None` means that they are asked for none.
    pub fn client_ca(&self) -> Option<&Arc<FileWatcher<ClientCa>>> {
        self.client_ca.as_ref()
    }

    /// Returns a number that changes whenever a file changes on which authentication depends. A result may be
    /// remembered until then, or until the credential expires.
    pub fn generation(&self) -> u64 {
        self.files.iter().fold(0, |sum, file| sum.wrapping_add(file.generation()))
    }

    /// Authenticates a caller.
    pub async fn authenticate(
        &self,
        mut presented: Presented<'_>,
        now: Moment,
    ) -> Result<Authenticated, AuthenticationFailure> {
        let generation = self.generation();
        let digest = presented.bearer.as_ref().map(Digest::of);
        let remembered = digest.and_then(|digest| self.recall(&digest, generation, now));
        let proven = digest.filter(|digest| self.proven.get(digest, now.monotonic).is_some());
        if proven.is_some() {
            presented.cost.unguard();
        }
        let mut failure = AuthenticationFailure::default();
        for (position, NamedAuthenticator { name, authenticator }) in self.chain.iter().enumerate() {
            let known = remembered.as_ref().filter(|_| authenticator.remembers());
            // The authenticators before the one that has recognised the token did not recognise it, and would not now.
            if known.is_some_and(|known| position < known.position) {
                continue;
            }
            let known = known.filter(|known| position == known.position);
            let found = match known {
                Some(known) => Ok(Some(known.recognized.clone())),
                None => {
                    let found = authenticator.authenticate(&presented, now).await;
                    let checked = found.and_then(|found| found.map(Recognized::checked).transpose());
                    checked.map(|found| found.map(Recognized::in_group_of_all))
                }
            };
            let recognized = match found {
                Ok(Some(recognized)) => recognized,
                Ok(None) => continue,
                Err(reason) => {
                    failure.said.push((name, reason));
                    continue;
                }
            };
            if let Some(digest) = digest
                && authenticator.remembers()
                && known.is_none()
            {
                let value = Remembered { position, generation, recognized: recognized.clone() };
                self.remembered.put(digest, value, self.ttl, now.monotonic);
            }
            // The objects to which the token is bound are checked each time.
            if let Err(reason) = still_bound(&recognized, &presented, digest, now).await {
                if matches!(reason, FailureReason::Unavailable(_)) {
                    let who = Authenticated::by(name, recognized, presented.bearer.clone());
                    failure.unchecked = Some(Box::new(who));
                }
                failure.said.push((name, reason));
                continue;
            }
            if let Some(digest) = digest.filter(|_| presented.cost.incurred()) {
                self.proven.put(digest, (), PROVEN, now.monotonic);
            }
            return Ok(Authenticated::by(name, recognized, presented.bearer.take()));
        }
        if let Some(digest) = proven.filter(|_| !failure.is_unavailable()) {
            self.proven.remove(&digest);
        }
        if failure.said.is_empty() {
            failure.said.push(("request", presented.unrecognized()));
        }
        Err(failure)
    }

    /// Returns the remembered result for a token, if it is still valid.
    fn recall(&self, digest: &Digest, generation: u64, now: Moment) -> Option<Remembered> {
        let remembered = self.remembered.get(digest, now.monotonic)?;
        let expired = remembered.recognized.expires.is_some_and(|end| now.wall >= end);
        (remembered.generation == generation && !expired).then_some(remembered)
    }
}

async fn still_bound(
    recognized: &Recognized,
    presented: &Presented<'_>,
    digest: Option<Digest>,
    now: Moment,
) -> Result<(), FailureReason> {
    match (&recognized.bound, &presented.bearer, digest) {
        (Some(bound), Some(token), Some(digest)) => {
            bound.check(token, digest, Some(&presented.cost), now).await
        }
        (None, _, _) | (_, None, _) | (_, _, None) => Ok(()),
    }
}
