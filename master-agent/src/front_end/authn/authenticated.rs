//! Who a caller was found to be, and for how long.

use std::{
    collections::HashSet,
    sync::Arc,
    time::{Duration, SystemTime},
};

use super::{
    bound::{Binding, Bound},
    reason::Reason,
};
use crate::front_end::{
    future::BoxFuture,
    secret::Secret,
    user::{AUTHENTICATED, UNAUTHENTICATED, User},
};

/// Bytes of a user's names, groups and extra together.
const MAX_USER: usize = 64 * 1024;

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

impl Recognized {
    /// What a user must be to be told to others in headers and logs.
    pub(super) fn checked(mut self) -> Result<Self, Reason> {
        let user = &mut self.user;
        if user.name.is_empty() {
            return Err(Reason::NoName);
        }
        let mut seen = HashSet::new();
        user.groups.retain(|group| !group.is_empty() && seen.insert(group.clone()));
        let extra = user.extra.iter().flat_map(|(key, values)| std::iter::once(key).chain(values));
        let texts = || user.uid.iter().chain(&user.groups).chain(extra.clone()).chain([&user.name]);
        if texts().any(|text| text.chars().any(char::is_control)) {
            return Err(Reason::ControlCharacters);
        }
        if texts().map(String::len).sum::<usize>() > MAX_USER {
            return Err(Reason::UserTooLarge);
        }
        Ok(self)
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

impl Authenticated {
    /// The user of a good credential, whom this authenticator has found, and the bearer token that it was.
    pub(super) fn by(authenticator: &'static str, recognized: Recognized, token: Option<Secret>) -> Self {
        let Recognized { mut user, expires, bound } = recognized;
        let binding = bound.zip(token).map(|(bound, token)| Binding { token, bound });
        if !user.in_group(AUTHENTICATED) && !user.in_group(UNAUTHENTICATED) {
            user.groups.push(AUTHENTICATED.to_owned());
        }
        Self { user: Arc::new(user), authenticator, validity: Validity { expires, binding } }
    }
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
