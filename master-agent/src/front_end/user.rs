//! Who a caller is.

use std::collections::BTreeMap;

/// The group of everyone who has authenticated.
pub const AUTHENTICATED: &str = "system:authenticated";
/// The group of everyone who has not.
pub const UNAUTHENTICATED: &str = "system:unauthenticated";
pub const ANONYMOUS: &str = "system:anonymous";

/// A user as Kubernetes has them (`UserInfo` of authentication.k8s.io).
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct User {
    pub name: String,
    pub uid: Option<String>,
    /// In the order in which they were given, each once.
    pub groups: Vec<String>,
    /// Keys are lower-case.
    pub extra: BTreeMap<String, Vec<String>>,
}

impl User {
    /// The node whose agent or kubelet this is: user `system:node:NAME` in group `system:nodes`.
    pub fn node(&self) -> Option<&str> {
        let name = self.name.strip_prefix("system:node:")?;
        self.in_group("system:nodes").then_some(name).filter(|name| !name.is_empty())
    }

    pub fn in_group(&self, group: &str) -> bool {
        self.groups.iter().any(|g| g == group)
    }
}
