//! Impersonation, and the rights that a caller needs for it.
//!
//! As in Kubernetes, the caller must be allowed the verb `impersonate` on each user, service account, group, UID and
//! extra value that the `Impersonate-*` headers of the request name. Ambiguous headers are rejected.

use std::collections::BTreeMap;

use hyper::HeaderMap;
use percent_encoding::percent_decode_str;

use super::{
    authorizer::Attributes,
    chain::{Authorizers, Verdict},
};
use crate::{
    request_info::{RequestInfo, escapes_are_whole},
    user::{ANONYMOUS, AUTHENTICATED, ServiceAccountName, UNAUTHENTICATED, User},
};

/// The maximum number of groups and extra values of a request together. The authorizers are asked about each of them.
const MAX_VALUES: usize = 32;

/// A request to act as another user, which has not been allowed yet.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Impersonation {
    user: User,
    /// The requests that the caller must be allowed to make.
    checks: Vec<RequestInfo>,
}

/// The fault of the headers. The answer is 400.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub struct BadImpersonation(&'static str);

impl Impersonation {
    /// Reads the headers. Returns `None` if there are none.
    pub fn requested(headers: &HeaderMap) -> Result<Option<Self>, BadImpersonation> {
        let (mut name, mut uid, mut groups) = (None, None, Vec::new());
        let mut extra = BTreeMap::<String, Vec<String>>::new();
        let (mut any, mut values) = (false, 0);
        for (header, value) in headers {
            if !header.as_str().replace('_', "-").starts_with("impersonate-") {
                continue;
            }
            any = true;
            let what = header.as_str().strip_prefix("impersonate-");
            let what = what.ok_or(BadImpersonation("an Impersonate header is spelled with an underscore"))?;
            let value = std::str::from_utf8(value.as_bytes())
                .map_err(|_| BadImpersonation("an Impersonate header is not UTF-8 text"))?;
            if value.is_empty() {
                return Err(BadImpersonation("an Impersonate header is empty"));
            }
            let single = |known: &mut Option<String>| match known.replace(value.to_owned()) {
                None => Ok(()),
                Some(_) => Err(BadImpersonation("Impersonate-User or Impersonate-Uid is present twice")),
            };
            match what {
                "user" => single(&mut name)?,
                "uid" => single(&mut uid)?,
                _ if values == MAX_VALUES => {
                    return Err(BadImpersonation("too many Impersonate headers"));
                }
                "group" => {
                    values += 1;
                    groups.push(value.to_owned());
                }
                _ => {
                    values += 1;
                    let key = what.strip_prefix("extra-");
                    let key = key.ok_or(BadImpersonation("an Impersonate header is not known"))?;
                    extra.entry(extra_key(key)?).or_default().push(value.to_owned());
                }
            }
        }
        match name {
            Some(name) => Ok(Some(Self::of(name, uid, groups, extra))),
            None if !any => Ok(None),
            None => Err(BadImpersonation("Impersonate headers without Impersonate-User")),
        }
    }

    fn of(
        name: String,
        uid: Option<String>,
        groups: Vec<String>,
        extra: BTreeMap<String, Vec<String>>,
    ) -> Self {
        let check = |group: &str, resource: &str, name: &str| RequestInfo {
            is_resource: true,
            verb: "impersonate".to_owned(),
            group: group.to_owned(),
            version: if group.is_empty() { String::new() } else { "v1".to_owned() },
            resource: resource.to_owned(),
            name: name.to_owned(),
            ..RequestInfo::default()
        };
        const AUTHENTICATION: &str = "authentication.k8s.io";
        let service_account = ServiceAccountName::parse(&name);
        let mut checks = vec![match service_account {
            Some(account) => RequestInfo {
                namespace: account.namespace.to_owned(),
                ..check("", "serviceaccounts", account.name)
            },
            None => check("", "users", &name),
        }];
        checks.extend(groups.iter().map(|group| check("", "groups", group)));
        for (key, values) in &extra {
            checks.extend(values.iter().map(|value| RequestInfo {
                subresource: key.clone(),
                ..check(AUTHENTICATION, "userextras", value)
            }));
        }
        checks.extend(uid.iter().map(|uid| check(AUTHENTICATION, "uids", uid)));

        let mut all = Vec::new();
        for group in groups {
            if !all.contains(&group) {
                all.push(group);
            }
        }
        if let Some(account) = service_account.filter(|_| all.is_empty()) {
            all = account.groups();
        }
        let has = |group: &str| all.iter().any(|one| one == group);
        if name == ANONYMOUS {
            if !has(UNAUTHENTICATED) {
                all.push(UNAUTHENTICATED.to_owned());
            }
        } else if !has(AUTHENTICATED) && !has(UNAUTHENTICATED) {
            all.push(AUTHENTICATED.to_owned());
        }
        Self { user: User { name, uid, groups: all, extra }, checks }
    }

    /// Returns the impersonated user, if `caller` may act as that user. The error is the verdict that denies it.
    pub async fn allowed(self, caller: &User, authorizers: &Authorizers) -> Result<User, Verdict> {
        for request in &self.checks {
            let verdict = authorizers.decide(&Attributes { user: caller, request }).await;
            if !verdict.allowed {
                return Err(verdict);
            }
        }
        Ok(self.user)
    }
}

/// Decodes the key of `Impersonate-Extra-KEY`, which is percent-encoded and in lower case.
fn extra_key(encoded: &str) -> Result<String, BadImpersonation> {
    let key = percent_decode_str(encoded).decode_utf8();
    let key = key.map_err(|_| BadImpersonation("an Impersonate-Extra key is not UTF-8 text"))?;
    let plain = |c: char| !c.is_control() && !c.is_ascii_uppercase();
    if !escapes_are_whole(encoded) || key.is_empty() || !key.chars().all(plain) {
        return Err(BadImpersonation("an Impersonate-Extra key is malformed"));
    }
    Ok(key.into_owned())
}

#[cfg(test)]
mod tests;
