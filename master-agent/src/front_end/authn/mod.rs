//! Authentication: who a caller is, one file for each kind of credential.
//!
//! The authenticators are asked in the configured order, and the first that recognises the caller wins. One that
//! finds a credential of its kind bad says why; the others are still asked, and if none recognises the caller,
//! the request fails with all that was said. The caller learns nothing but that it failed; the log gets the
//! [`Failure`], which holds no secret. Anonymous is for requests without any credential: a bad one never becomes
//! anonymous.
//!
//! What costs something, such as a signature to check or a webhook to ask, stands behind a [`Guard`], so that callers can
//! be kept from having it done for one guess after the other. What costs nothing is always done, and a token that was
//! good a while ago is no guess.
//!
//! Nothing here reads the clock: each call gets the [`Moment`] at which it happens.

use std::{
    fmt,
    pin::Pin,
    sync::Arc,
    time::{Duration, Instant, SystemTime},
};

use super::{
    reloaded::{Follow, Reloaded},
    secret::Secret,
    user::{AUTHENTICATED, UNAUTHENTICATED, User},
};
use crate::client_certificates::ClientCa;

mod anonymous;
mod bootstrap;
mod bound;
mod cache;
mod config;
mod credential;
mod csv;
mod jwt;
mod keys;
mod oidc;
mod reason;
mod service_account;
mod token_file;
mod webhook;
mod x509;

pub use anonymous::Anonymous;
pub use bootstrap::{Bootstrap, BootstrapToken, BootstrapTokens, ClusterTokens, FileTokens};
use bound::{Binding, Bound};
use cache::Cache;
pub use cache::Digest;
pub use config::{
    AuthenticatorConfig, AuthnConfig, BootstrapConfig, CacheConfig, KeysConfig, OidcConfig,
    ServiceAccountConfig, WebhookConfig, X509Config,
};
pub use credential::{Guard, Presented, strip};
pub use oidc::Oidc;
pub use reason::Reason;
pub use service_account::ServiceAccounts;
pub use token_file::TokenFile;
pub use webhook::Webhook;
pub use x509::{Certificates, X509};

pub type BoxFuture<'a, T> = Pin<Box<dyn Future<Output = T> + Send + 'a>>;

/// A moment on both clocks: the wall clock is what credentials are dated by, and the monotonic one is what caches
/// go by, so that setting the clock back does not make them last.
#[derive(Clone, Copy, Debug)]
pub struct Moment {
    pub wall: SystemTime,
    pub monotonic: Instant,
}

impl Moment {
    pub fn now() -> Self {
        Self { wall: SystemTime::now(), monotonic: Instant::now() }
    }

    /// Seconds since 1970, 0 before.
    pub fn unix(&self) -> u64 {
        self.wall.duration_since(SystemTime::UNIX_EPOCH).map_or(0, |since| since.as_secs())
    }
}

/// What an authenticator found.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Recognized {
    pub user: User,
    /// When the credential ends, where it says so.
    pub expires: Option<SystemTime>,
    /// What must still exist whenever the credential is shown.
    pub bound: Option<Arc<Bound>>,
}

impl From<User> for Recognized {
    fn from(user: User) -> Self {
        Self { user, expires: None, bound: None }
    }
}

/// One kind of credential.
pub trait Authenticator: Send + Sync {
    /// `None` where nothing is presented that is of this kind.
    fn authenticate<'a>(
        &'a self,
        presented: &'a Presented<'a>,
        now: Moment,
    ) -> BoxFuture<'a, Result<Option<Recognized>, Reason>>;

    /// Whether who a bearer token is may be remembered for a while: where finding out is costly, and nothing but
    /// the token, the files and the time decide.
    fn remembers(&self) -> bool {
        false
    }
}

/// Who a caller is, and who says so.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Authenticated {
    pub user: Arc<User>,
    /// As the kind of credential is named in the configuration.
    pub authenticator: &'static str,
    pub validity: Validity,
}

/// How long a credential is good: what was granted for it may last no longer.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Validity {
    /// When it ends, where it says so.
    pub expires: Option<SystemTime>,
    /// For as long as what it is bound to exists.
    pub binding: Option<Binding>,
}

impl Validity {
    /// How long until it expires.
    pub fn left(&self) -> Option<Duration> {
        self.expires.map(|end| end.duration_since(SystemTime::now()).unwrap_or_default())
    }

    /// Completes when the credential is no longer good; `None` where that is never.
    pub fn end(&self) -> Option<BoxFuture<'static, ()>> {
        let (left, binding) = (self.left(), self.binding.clone());
        if left.is_none() && binding.is_none() {
            return None;
        }
        Some(Box::pin(async move {
            let expired = async {
                match left {
                    Some(left) => tokio::time::sleep(left).await,
                    None => std::future::pending().await,
                }
            };
            let gone = async {
                match binding {
                    Some(binding) => binding.ended().await,
                    None => std::future::pending().await,
                }
            };
            tokio::select! {
                () = expired => {}
                () = gone => {}
            }
        }))
    }
}

/// Why a caller is not recognised: what each authenticator said. For the log, not for the caller.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Failure {
    said: Vec<(&'static str, Reason)>,
    unchecked: Option<Box<Authenticated>>,
}

impl Failure {
    pub fn reasons(&self) -> impl Iterator<Item = &Reason> {
        self.said.iter().map(|(_, reason)| reason)
    }

    /// What each authenticator said.
    pub fn by_authenticator(&self) -> impl Iterator<Item = (&'static str, &Reason)> {
        self.said.iter().map(|(authenticator, reason)| (*authenticator, reason))
    }

    /// Who the caller is if what its credential is bound to still exists, which nobody could be asked. The credential is
    /// good in all else.
    pub fn unchecked(&self) -> Option<&Authenticated> {
        self.unchecked.as_deref()
    }

    /// Where the guard let something not be tried: how long until it may.
    pub fn not_tried(&self) -> Option<Duration> {
        self.reasons()
            .find_map(|reason| if let Reason::NotTried(after) = reason { Some(*after) } else { None })
    }

    /// Whether somebody who may know the credential could not be asked: then it need not be wrong.
    pub fn is_unavailable(&self) -> bool {
        self.reasons().any(|reason| matches!(reason, Reason::Unavailable(_)))
    }
}

impl From<Reason> for Failure {
    fn from(reason: Reason) -> Self {
        Self { said: vec![("request", reason)], unchecked: None }
    }
}

impl std::error::Error for Failure {}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (i, (authenticator, reason)) in self.said.iter().enumerate() {
            let separator = if i == 0 { "" } else { "; " };
            write!(f, "{separator}{authenticator}: {reason}")?;
        }
        Ok(())
    }
}

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
    pub fn new(
        chain: Vec<(&'static str, Box<dyn Authenticator>)>,
        files: Vec<Arc<dyn Follow>>,
        cache: CacheConfig,
    ) -> Self {
        let remembered = Cache::new(cache.size, cache.ttl);
        Self { chain, remembered, proven: Cache::new(MAX_PROVEN, PROVEN), files, client_ca: None }
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
            presented.guard = None;
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
                    found.and_then(|found| found.map(checked).transpose())
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
                            let who = authenticated(name, recognized, presented.bearer.clone());
                            failure.unchecked = Some(Box::new(who));
                        }
                        failure.said.push((name, reason));
                        continue;
                    }
                    if let Some(digest) = digest.filter(|_| presented.did_cost()) {
                        self.proven.put(digest, (), now.monotonic);
                    }
                    return Ok(authenticated(name, recognized, presented.bearer.take()));
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
        (Some(bound), Some(token), Some(digest)) => bound.check(token, digest, Some(presented), now).await,
        (None, _, _) | (_, None, _) | (_, _, None) => Ok(()),
    }
}

fn authenticated(
    authenticator: &'static str,
    recognized: Recognized,
    token: Option<Secret>,
) -> Authenticated {
    let Recognized { mut user, expires, bound } = recognized;
    let binding = bound.zip(token).map(|(bound, token)| Binding { token, bound });
    if !user.in_group(AUTHENTICATED) && !user.in_group(UNAUTHENTICATED) {
        user.groups.push(AUTHENTICATED.to_owned());
    }
    Authenticated { user: Arc::new(user), authenticator, validity: Validity { expires, binding } }
}

/// Bytes of a user's names, groups and extra together.
const MAX_USER: usize = 64 * 1024;

/// What a user must be to be told to others in headers and logs.
fn checked(mut recognized: Recognized) -> Result<Recognized, Reason> {
    let user = &mut recognized.user;
    if user.name.is_empty() {
        return Err(Reason::NoName);
    }
    let mut seen = std::collections::HashSet::new();
    user.groups.retain(|group| !group.is_empty() && seen.insert(group.clone()));
    let extra = user.extra.iter().flat_map(|(key, values)| std::iter::once(key).chain(values));
    let texts = || user.uid.iter().chain(&user.groups).chain(extra.clone()).chain([&user.name]);
    if texts().any(|text| text.chars().any(char::is_control)) {
        return Err(Reason::ControlCharacters);
    }
    if texts().map(String::len).sum::<usize>() > MAX_USER {
        return Err(Reason::UserTooLarge);
    }
    Ok(recognized)
}

#[cfg(test)]
mod tests;
