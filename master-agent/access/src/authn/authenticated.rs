//! The result of authentication: the user, and how long the credential is valid.

use std::{
    collections::HashSet,
    sync::Arc,
    time::{Duration, SystemTime},
};

use futures_util::future::BoxFuture;

use super::{
    bound::{Binding, Bound},
    reason::FailureReason,
};
use crate::{
    secret::Secret,
    user::{AUTHENTICATED, UNAUTHENTICATED, User},
};

/// The longest name, UID, groups and extra values of a user together, in bytes.
const MAX_USER: usize = 64 * 1024;

/// The user whom an authenticator has recognised.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Recognized {
    /// The user, who is shared by all requests with the same remembered credential.
    pub user: Arc<User>,
    /// When the credential expires, if it says so.
    pub expires: Option<SystemTime>,
    /// The objects that must still exist whenever the credential is presented.
    pub bound: Option<Arc<Bound>>,
}

impl From<Arc<User>> for Recognized {
    fn from(user: Arc<User>) -> Self {
        Self { user, expires: None, bound: None }
    }
}

impl Recognized {
    /// Checks that the user can be named in headers and logs, and removes repeated groups.
    pub(super) fn checked(mut self) -> Result<Self, FailureReason> {
        if self.user.name.is_empty() {
            return Err(FailureReason::NoName);
        }
        let mut seen = HashSet::new();
        let mut is_new = |group: &String| !group.is_empty() && seen.insert(group.clone());
        if !self.user.groups.iter().all(&mut is_new) {
            seen.clear();
            let groups = &mut Arc::make_mut(&mut self.user).groups;
            groups.retain(|group| !group.is_empty() && seen.insert(group.clone()));
        }
        let user = &self.user;
        let extra = user.extra.iter().flat_map(|(key, values)| std::iter::once(key).chain(values));
        let texts = || user.uid.iter().chain(&user.groups).chain(extra.clone()).chain([&user.name]);
        if texts().any(|text| text.chars().any(char::is_control)) {
            return Err(FailureReason::ControlCharacters);
        }
        if texts().map(String::len).sum::<usize>() > MAX_USER {
            return Err(FailureReason::UserTooLarge);
        }
        Ok(self)
    }

    /// Makes the user a member of the group of everyone who has authenticated, if they have.
    pub(super) fn in_group_of_all(mut self) -> Self {
        if !self.user.in_group(AUTHENTICATED) && !self.user.in_group(UNAUTHENTICATED) {
            Arc::make_mut(&mut self.user).groups.push(AUTHENTICATED.to_owned());
        }
        self
    }
}

/// An authenticated caller.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Authenticated {
    pub user: Arc<User>,
    /// The name of the kind of credential in the configuration.
    pub authenticator: &'static str,
    pub validity: Validity,
}

impl Authenticated {
    /// Creates the result for a valid credential. `token` is the credential, if it is a bearer token.
    pub(super) fn by(authenticator: &'static str, recognized: Recognized, token: Option<Secret>) -> Self {
        let Recognized { user, expires, bound } = recognized;
        let binding = bound.zip(token).map(|(bound, token)| Arc::new(Binding { token, bound }));
        Self { user, authenticator, validity: Validity { expires, binding } }
    }
}

/// How long a credential is valid. Access that was granted for it must not last longer.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Validity {
    /// When the credential expires, if it says so.
    pub expires: Option<SystemTime>,
    /// The objects to which the credential is bound. It is valid only while they exist.
    pub binding: Option<Arc<Binding>>,
}

impl Validity {
    /// Returns the time until the credential expires.
    pub fn left(&self) -> Option<Duration> {
        self.expires.map(|end| end.duration_since(SystemTime::now()).unwrap_or_default())
    }

    /// Returns a future that completes when the credential is no longer valid. `None` means that this never happens. A
    /// watch holds the future for as long as it lasts, so each kind has no more memory than it needs.
    pub fn end(&self) -> Option<BoxFuture<'static, ()>> {
        match (self.left(), self.binding.clone()) {
            (None, None) => None,
            (Some(left), None) => Some(Box::pin(tokio::time::sleep(left))),
            (None, Some(binding)) => Some(Box::pin(async move { binding.ended().await })),
            (Some(left), Some(binding)) => Some(Box::pin(async move {
                let _ = tokio::time::timeout(left, binding.ended()).await;
            })),
        }
    }
}
