//! Builds the configured authorizers and reads their files for the first time.

use std::sync::Arc;

use proto_net::file_watcher::Watcher;

use super::{
    authorizer::Authorizer,
    chain::{Authorizers, NamedAuthorizer},
    config::{AuthorizerConfig, AuthzConfig},
    node::NodeAuthorizer,
    paths::Paths,
    rbac::Rbac,
    webhook::SubjectAccessReviewer,
};

impl Authorizers {
    /// Reads all files for the first time. The returned watchers must be polled from then on.
    pub fn load(config: &AuthzConfig) -> anyhow::Result<(Self, Vec<Arc<dyn Watcher>>)> {
        let (mut chain, mut files) = (Vec::new(), Vec::new());
        for item in &config.0 {
            let authorizer = item.load(&mut files)?;
            chain.push(NamedAuthorizer { name: item.name(), authorizer });
        }
        Ok((Self::new(chain), files))
    }
}

impl AuthorizerConfig {
    fn load(&self, files: &mut Vec<Arc<dyn Watcher>>) -> anyhow::Result<Arc<dyn Authorizer>> {
        Ok(match self {
            Self::Rbac(config) => {
                let rbac = Rbac::load(&config.files)?;
                files.push(rbac.watcher());
                Arc::new(rbac)
            }
            Self::Node(config) => Arc::new(NodeAuthorizer::new(config)),
            Self::Webhook(config) => {
                let (webhook, watcher) = SubjectAccessReviewer::load(config)?;
                files.push(watcher);
                Arc::new(webhook)
            }
            Self::Paths(rules) => Arc::new(Paths::new(rules.clone())),
        })
    }
}
