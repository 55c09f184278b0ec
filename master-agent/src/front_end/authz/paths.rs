//! Path rules: an ordered list; the first rule that fits a request decides.
//!
//! A path is compared decoded, and with or without one slash at its end, since kube-apiserver reads both alike. Path
//! rules know nothing of resources: one object can have several paths (`/api/v1/watch/…`), so rights over resources
//! belong into RBAC. An upgrade to exec, attach, port-forward or a proxy counts as `POST`, whatever its method.

use super::{Attributes, Authorizer, BoxFuture, Decision};

/// Who may reach which paths, or not.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct PathRule {
    /// For the audit line.
    pub name: String,
    pub users: Vec<String>,
    /// Of users and groups, one must be the caller's; both empty is everyone.
    pub groups: Vec<String>,
    /// In capital letters; empty for all.
    pub methods: Vec<String>,
    /// Exact, or beginning so if there is a `*` at the end.
    pub paths: Vec<String>,
    pub allow: bool,
}

pub struct Paths(Vec<PathRule>);

impl Paths {
    pub fn new(rules: Vec<PathRule>) -> Self {
        Self(rules)
    }

    fn decide(&self, attributes: &Attributes<'_>) -> Decision {
        match self.0.iter().find(|rule| rule.fits(attributes)) {
            Some(PathRule { name, allow: true, .. }) => Decision::Allow { rule: name.clone() },
            Some(PathRule { name, allow: false, .. }) => {
                Decision::Deny { rule: name.clone(), reason: format!("denied by path rule {name:?}") }
            }
            None => Decision::none(),
        }
    }
}

impl Authorizer for Paths {
    fn authorize<'a>(&'a self, attributes: &'a Attributes<'a>) -> BoxFuture<'a, Decision> {
        Box::pin(std::future::ready(self.decide(attributes)))
    }
}

impl PathRule {
    fn fits(&self, Attributes { user, request }: &Attributes<'_>) -> bool {
        let everyone = self.users.is_empty() && self.groups.is_empty();
        let who = everyone
            || self.users.contains(&user.name)
            || self.groups.iter().any(|group| user.in_group(group));
        let trimmed = request.path.strip_suffix('/').unwrap_or(&request.path);
        who && (self.methods.is_empty() || self.methods.contains(&request.method))
            && self.paths.iter().any(|pattern| match pattern.strip_suffix('*') {
                Some(beginning) => request.path.starts_with(beginning),
                None => *pattern == request.path || pattern == trimmed,
            })
    }
}
