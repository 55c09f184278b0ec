//! Authorization: what a user may, one file for each source of rights.
//!
//! The configured authorizers are asked in order, and the first that allows or denies has decided; what none of them
//! allows is denied. Each decision carries the authorizer and the rule, for the caller's answer and the audit line.

pub mod config;
pub mod impersonate;
pub mod node;
pub mod paths;
pub mod rbac;
pub mod webhook;

use std::{fmt, pin::Pin, sync::Arc};

use super::{reloaded::Follow, request_info::RequestInfo, user::User};
use config::{AuthorizerConfig, AuthzConfig};

pub type BoxFuture<'a, T> = Pin<Box<dyn Future<Output = T> + Send + 'a>>;

/// Who asks for what.
#[derive(Clone, Copy, Debug)]
pub struct Attributes<'a> {
    pub user: &'a User,
    pub request: &'a RequestInfo,
}

/// One authorizer's word.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Decision {
    Allow { rule: String },
    Deny { rule: String, reason: String },
    NoOpinion { reason: String },
}

/// A source of rights.
pub trait Authorizer: Send + Sync {
    fn authorize<'a>(&'a self, attributes: &'a Attributes<'a>) -> BoxFuture<'a, Decision>;
}

/// What was decided, by whom and why.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Verdict {
    pub allowed: bool,
    /// The name of the authorizer that decided; `None` where none did, which denies.
    pub authorizer: Option<&'static str>,
    /// The rule that decided; empty where none did.
    pub rule: String,
    /// For the caller of a request that is denied: `User "x" cannot get …` and the authorizers' own reasons.
    pub reason: String,
}

/// All authorizers, in order.
#[derive(Clone, Default)]
pub struct Authorizers(Vec<(&'static str, Arc<dyn Authorizer>)>);

impl Authorizers {
    pub fn new(chain: Vec<(&'static str, Arc<dyn Authorizer>)>) -> Self {
        Self(chain)
    }

    /// Reads what the configuration names. What it gives beside is to be followed.
    pub fn load(config: &AuthzConfig) -> anyhow::Result<(Self, Vec<Arc<dyn Follow>>)> {
        let (mut chain, mut follow) = (Vec::<(_, Arc<dyn Authorizer>)>::new(), Vec::<Arc<dyn Follow>>::new());
        for item in &config.0 {
            let name = item.name();
            match item {
                AuthorizerConfig::Rbac(config) => {
                    let rbac = rbac::Rbac::load(&config.files)?;
                    follow.push(rbac.followed());
                    chain.push((name, Arc::new(rbac)));
                }
                AuthorizerConfig::Node(config) => chain.push((name, Arc::new(node::Node::new(config)))),
                AuthorizerConfig::Webhook(config) => {
                    let (webhook, followed) = webhook::Webhook::load(config)?;
                    follow.push(followed);
                    chain.push((name, Arc::new(webhook)));
                }
                AuthorizerConfig::Paths(config) => {
                    chain.push((name, Arc::new(paths::Paths::new(config.clone()))));
                }
            }
        }
        Ok((Self(chain), follow))
    }

    /// Asks one after the other.
    pub async fn decide(&self, attributes: &Attributes<'_>) -> Verdict {
        let mut reasons = Vec::new();
        for (name, authorizer) in &self.0 {
            match authorizer.authorize(attributes).await {
                Decision::Allow { rule } => {
                    return Verdict { allowed: true, authorizer: Some(name), rule, reason: String::new() };
                }
                Decision::Deny { rule, reason } => {
                    reasons.push(reason);
                    let reason = attributes.denied(&reasons);
                    return Verdict { allowed: false, authorizer: Some(name), rule, reason };
                }
                Decision::NoOpinion { reason } => reasons.push(reason),
            }
        }
        let reason = attributes.denied(&reasons);
        Verdict { allowed: false, authorizer: None, rule: String::new(), reason }
    }
}

impl Decision {
    /// Without anything to say about it.
    pub fn none() -> Self {
        Self::NoOpinion { reason: String::new() }
    }
}

impl Attributes<'_> {
    fn denied(&self, reasons: &[String]) -> String {
        let mut text = self.to_string();
        for (i, reason) in reasons.iter().filter(|reason| !reason.is_empty()).enumerate() {
            text.push_str(if i == 0 { ": " } else { ", " });
            text.push_str(reason);
        }
        text
    }
}

/// `User "x" cannot get resource "pods" in API group "" in the namespace "y"`, as Kubernetes puts it.
impl fmt::Display for Attributes<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { user, request } = self;
        write!(f, "User {:?} cannot {} ", user.name, request.verb)?;
        if !request.is_resource {
            return write!(f, "path {:?}", request.path);
        }
        write!(f, "resource {:?} in API group {:?} ", request.combined_resource(), request.group)?;
        match request.namespace.as_str() {
            "" => f.write_str("at the cluster scope"),
            namespace => write!(f, "in the namespace {namespace:?}"),
        }
    }
}

#[cfg(test)]
mod tests;
