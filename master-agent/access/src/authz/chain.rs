//! The configured authorizers, and the decision of all of them.

use std::sync::Arc;

use super::authorizer::{Attributes, Authorizer, Decision};

/// The decision of all authorizers, with the deciding authorizer and rule.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Verdict {
    pub allowed: bool,
    /// The name of the deciding authorizer. `None` means that none has decided, which denies the request.
    pub authorizer: Option<&'static str>,
    /// The deciding rule, which is empty if no authorizer has decided.
    pub rule: String,
    /// The text for the caller of a denied request: `User "x" cannot get …` and the reasons of the authorizers.
    pub reason: String,
}

/// The configured authorizers, in order.
#[derive(Clone, Default)]
pub struct Authorizers(Vec<NamedAuthorizer>);

/// One authorizer of the chain.
#[derive(Clone)]
pub(super) struct NamedAuthorizer {
    /// Its name in the configuration.
    pub(super) name: &'static str,
    pub(super) authorizer: Arc<dyn Authorizer>,
}

impl Authorizers {
    pub(super) fn new(chain: Vec<NamedAuthorizer>) -> Self {
        Self(chain)
    }

    /// Asks one authorizer after another until one decides.
    pub async fn decide(&self, attributes: &Attributes<'_>) -> Verdict {
        let mut reasons = Vec::new();
        for NamedAuthorizer { name, authorizer } in &self.0 {
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
