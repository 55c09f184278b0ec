//! The authenticator of Kubernetes service account tokens, which kube-apiserver issues (`TokenRequest`, projected
//! volumes).
//!
//! If there is a cluster to ask, a token is valid only while the objects exist to which it is bound ([`super::bound`]).
//! Otherwise it is valid until it expires.

use std::sync::Arc;

use futures_util::future::BoxFuture;

use super::{
    authenticated::Recognized,
    authenticator::Authenticator,
    bound::{Bound, BoundObjects},
    credential::Presented,
    jwt::{Claims, Unverified},
    keys::KeySource,
    reason::FailureReason,
    x509::CREDENTIAL_ID,
};
use crate::{
    moment::Moment,
    user::{ServiceAccountName, User},
};

/// The issuer of legacy tokens, which are kept in Secrets.
const LEGACY_ISSUER: &str = "kubernetes/serviceaccount";

pub struct ServiceAccounts {
    issuers: Vec<String>,
    audiences: Vec<String>,
    keys: Vec<KeySource>,
    bound: Option<Arc<BoundObjects>>,
}

impl ServiceAccounts {
    /// `bound` checks the objects to which tokens are bound.
    pub fn new(
        issuers: Vec<String>,
        audiences: Vec<String>,
        keys: Vec<KeySource>,
        bound: Option<Arc<BoundObjects>>,
    ) -> Self {
        Self { issuers, audiences, keys, bound }
    }

    async fn check(
        &self,
        presented: &Presented<'_>,
        now: Moment,
    ) -> Result<Option<Recognized>, FailureReason> {
        let Some(token) = &presented.bearer else { return Ok(None) };
        let Some(token) = Unverified::read(token.expose())? else { return Ok(None) };
        match token.issuer() {
            Some(LEGACY_ISSUER) => return Err(FailureReason::Legacy),
            Some(issuer) if self.issuers.iter().any(|one| one == issuer) => {}
            Some(_) | None => return Ok(None),
        }
        let claims = token.verify(&self.keys, &presented.cost, now).await?;
        claims.check_audience(&self.audiences)?;
        let user = user(&claims)?;
        let bound = self.bound.clone().map(|objects| Bound::of(&claims, &user, objects)).transpose()?;
        let (user, expires) = (Arc::new(user), claims.expires());
        Ok(Some(Recognized { user, expires, bound: bound.map(Arc::new) }))
    }
}

impl Authenticator for ServiceAccounts {
    fn authenticate<'a>(
        &'a self,
        presented: &'a Presented<'a>,
        now: Moment,
    ) -> BoxFuture<'a, Result<Option<Recognized>, FailureReason>> {
        Box::pin(self.check(presented, now))
    }

    fn remembers(&self) -> bool {
        true
    }
}

fn user(claims: &Claims) -> Result<User, FailureReason> {
    let subject = claims.text("sub")?;
    let account = ServiceAccountName::parse(subject).ok_or(FailureReason::Subject)?;
    let claim = |path: &[&str]| claims.nested(&[&["kubernetes.io"], path].concat());
    for (path, value) in
        [(&["namespace"] as &[_], account.namespace), (&["serviceaccount", "name"], account.name)]
    {
        if claim(path)?.is_some_and(|claimed| claimed != value) {
            return Err(FailureReason::Contradiction);
        }
    }
    let mut user = User {
        name: subject.to_owned(),
        uid: claim(&["serviceaccount", "uid"])?.map(str::to_owned),
        groups: account.groups(),
        ..User::default()
    };
    for object in ["pod", "node"] {
        for field in ["name", "uid"] {
            if let Some(value) = claim(&[object, field])? {
                let key = format!("authentication.kubernetes.io/{object}-{field}");
                user.extra.insert(key, vec![value.to_owned()]);
            }
        }
    }
    if let Some(id) = claims.nested(&["jti"])?.filter(|id| !id.is_empty()) {
        user.extra.insert(CREDENTIAL_ID.to_owned(), vec![format!("JTI={id}")]);
    }
    Ok(user)
}
