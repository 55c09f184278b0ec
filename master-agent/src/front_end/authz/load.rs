//! Makes the authorizers that are configured, and reads their files for the first time.

use std::sync::Arc;

use super::{
    authorizer::Authorizer,
    chain::Authorizers,
    config::{AuthorizerConfig, AuthzConfig},
    node::Node,
    paths::Paths,
    rbac::Rbac,
    webhook::Webhook,
};
use crate::reloaded::Follow;

impl Authorizers {
    /// Reads what the configuration names. What it gives beside is to be followed.
    pub fn load(config: &AuthzConfig) -> anyhow::Result<(Self, Vec<Arc<dyn Follow>>)> {
        let (mut chain, mut follow) = (Vec::<(_, Arc<dyn Authorizer>)>::new(), Vec::<Arc<dyn Follow>>::new());
        for item in &config.0 {
            let name = item.name();
            match item {
                AuthorizerConfig::Rbac(config) => {
                    let rbac = Rbac::load(&config.files)?;
                    follow.push(rbac.followed());
                    chain.push((name, Arc::new(rbac)));
                }
                AuthorizerConfig::Node(config) => chain.push((name, Arc::new(Node::new(config)))),
                AuthorizerConfig::Webhook(config) => {
                    let (webhook, followed) = Webhook::load(config)?;
                    follow.push(followed);
                    chain.push((name, Arc::new(webhook)));
                }
                AuthorizerConfig::Paths(config) => {
                    chain.push((name, Arc::new(Paths::new(config.clone()))));
                }
            }
        }
        Ok((Self::new(chain), follow))
    }
}
