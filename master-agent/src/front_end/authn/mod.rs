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
    user::{AUTHENTICATED, UNAUTHENTICATED, User},
};
use crate::client_certificates::ClientCa;

mod anonymous;
mod bootstrap;
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
}

impl From<User> for Recognized {
    fn from(user: User) -> Self {
        Self { user, expires: None }
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
    /// When the credential ends, where it says so: what was granted for it may last no longer.
    pub expires: Option<SystemTime>,
}

/// Why a caller is not recognised: what each authenticator said. For the log, not for the caller.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Failure(Vec<(&'static str, Reason)>);

impl Failure {
    pub fn reasons(&self) -> impl Iterator<Item = &Reason> {
        self.0.iter().map(|(_, reason)| reason)
    }

    /// What each authenticator said.
    pub fn by_authenticator(&self) -> impl Iterator<Item = (&'static str, &Reason)> {
        self.0.iter().map(|(authenticator, reason)| (*authenticator, reason))
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
        Self(vec![("request", reason)])
    }
}

impl std::error::Error for Failure {}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (i, (authenticator, reason)) in self.0.iter().enumerate() {
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
        let mut failure = Failure(Vec::new());
        for (index, (name, authenticator)) in self.chain.iter().enumerate() {
            if let Some(found) = &remembered
                && authenticator.remembers()
            {
                if found.authenticator == index {
                    return Ok(authenticated(name, found.recognized.clone()));
                }
                // One before the winner did not know the token then, and does not now.
                if index < found.authenticator {
                    continue;
                }
            }
            let found = authenticator.authenticate(&presented, now).await;
            match found.and_then(|found| found.map(checked).transpose()) {
                Ok(Some(recognized)) => {
                    if let Some(digest) = digest
                        && authenticator.remembers()
                    {
                        let recognized = recognized.clone();
                        let value = Remembered { authenticator: index, generation, recognized };
                        self.remembered.put(digest, value, now.monotonic);
                    }
                    if let Some(digest) = digest.filter(|_| presented.did_cost()) {
                        self.proven.put(digest, (), now.monotonic);
                    }
                    return Ok(authenticated(name, recognized));
                }
                Ok(None) => {}
                Err(reason) => failure.0.push((name, reason)),
            }
        }
        if let Some(digest) = proven.filter(|_| !failure.is_unavailable()) {
            self.proven.remove(&digest);
        }
        if failure.0.is_empty() {
            failure.0.push(("request", presented.unrecognized()));
        }
        Err(failure)
    }
}

fn authenticated(authenticator: &'static str, recognized: Recognized) -> Authenticated {
    let Recognized { mut user, expires } = recognized;
    if !user.in_group(AUTHENTICATED) && !user.in_group(UNAUTHENTICATED) {
        user.groups.push(AUTHENTICATED.to_owned());
    }
    Authenticated { user: Arc::new(user), authenticator, expires }
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
