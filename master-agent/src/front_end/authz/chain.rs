//! The chain of the configured authorizers, and what they decide together.

use std::sync::Arc;

use super::authorizer::{Attributes, Authorizer, Decision};

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
