//! The authenticator of ID tokens of an OpenID Connect provider, which works like kube-apiserver's `--oidc-*` flags.

use futures_util::future::BoxFuture;
use serde_json::Value;

use super::{
    authenticated::Recognized,
    authenticator::Authenticator,
    config::OidcConfig,
    credential::Presented,
    jwt::{Claims, Unverified},
    keys::KeySource,
    reason::FailureReason,
};
use crate::{moment::Moment, user::User};

pub struct Oidc {
    config: OidcConfig,
    keys: Vec<KeySource>,
}

impl Oidc {
    pub fn new(config: OidcConfig, keys: KeySource) -> Self {
        Self { config, keys: vec![keys] }
    }

    async fn check(
        &self,
        presented: &Presented<'_>,
        now: Moment,
    ) -> Result<Option<Recognized>, FailureReason> {
        let Some(token) = &presented.bearer else { return Ok(None) };
        let Some(token) = Unverified::read(token.expose())? else { return Ok(None) };
        if token.issuer() != Some(&self.config.issuer) {
            return Ok(None);
        }
        let claims = token.verify(&self.keys, &presented.cost, now).await?;
        claims.check_audience(&self.config.client_ids)?;
        for (name, value) in &self.config.required_claims {
            if claims.text(name)? != value {
                return Err(FailureReason::Claim(name.clone()));
            }
        }
        let user = self.user(&claims)?.into();
        Ok(Some(Recognized { user, expires: claims.expires(), bound: None }))
    }

    fn user(&self, claims: &Claims) -> Result<User, FailureReason> {
        let config = &self.config;
        let name = claims.text(&config.username_claim)?;
        if name.is_empty() {
            return Err(FailureReason::Claim(config.username_claim.clone()));
        }
        let verified = claims.get("email_verified").is_none_or(|value| *value == Value::Bool(true));
        if config.username_claim == "email" && !verified {
            return Err(FailureReason::EmailNotVerified);
        }
        let name = format!("{}{name}", config.username_prefix);
        let groups = match &config.groups_claim {
            Some(claim) => groups(claims, claim)?,
            None => Vec::new(),
        };
        let groups: Vec<_> = groups.iter().map(|group| format!("{}{group}", config.groups_prefix)).collect();
        // Kubernetes reserves these names, so a provider can't give them.
        if groups.iter().chain([&name]).any(|name| name.starts_with("system:")) {
            return Err(FailureReason::SystemName);
        }
        Ok(User { name, groups, ..User::default() })
    }
}

impl Authenticator for Oidc {
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

/// Reads a claim that is a string or a list of strings.
fn groups<'a>(claims: &'a Claims, claim: &str) -> Result<Vec<&'a str>, FailureReason> {
    let wrong = || FailureReason::Claim(claim.to_owned());
    match claims.get(claim) {
        None | Some(Value::Null) => Ok(Vec::new()),
        Some(Value::String(one)) => Ok(vec![one]),
        Some(Value::Array(all)) => all.iter().map(|one| one.as_str().ok_or_else(wrong)).collect(),
        Some(Value::Bool(_) | Value::Number(_) | Value::Object(_)) => Err(wrong()),
    }
}
