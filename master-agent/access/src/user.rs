//! Users, and the names that Kubernetes gives users and groups.

use std::{collections::BTreeMap, fmt};

/// The group of everyone who has authenticated.
pub const AUTHENTICATED: &str = "system:authenticated";
/// The group of everyone who has not authenticated.
pub const UNAUTHENTICATED: &str = "system:unauthenticated";
pub const ANONYMOUS: &str = "system:anonymous";

const NODE_PREFIX: &str = "system:node:";
const NODES: &str = "system:nodes";
const SERVICE_ACCOUNT_PREFIX: &str = "system:serviceaccount:";
const SERVICE_ACCOUNTS: &str = "system:serviceaccounts";

/// A user as in `UserInfo` of authentication.k8s.io.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct User {
    pub name: String,
    pub uid: Option<String>,
    /// The groups without repetitions, in their original order.
    pub groups: Vec<String>,
    /// The keys are in lower case.
    pub extra: BTreeMap<String, Vec<String>>,
}

impl User {
    /// Returns the node that this user is, if the name is `system:node:NAME` and the groups contain `system:nodes`.
    pub fn node(&self) -> Option<&str> {
        let name = self.name.strip_prefix(NODE_PREFIX)?;
        self.in_group(NODES).then_some(name).filter(|name| !name.is_empty())
    }

    pub fn in_group(&self, group: &str) -> bool {
        self.groups.iter().any(|g| g == group)
    }
}

/// The name of a service account. It displays as the user name `system:serviceaccount:NAMESPACE:NAME`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ServiceAccountName<'a> {
    pub namespace: &'a str,
    pub name: &'a str,
}

impl<'a> ServiceAccountName<'a> {
    /// Reads a user name. The namespace must be a DNS label and the account's name a DNS subdomain (RFC 1123).
    pub fn parse(user: &'a str) -> Option<Self> {
        let (namespace, name) = user.strip_prefix(SERVICE_ACCOUNT_PREFIX)?.split_once(':')?;
        let valid = namespace.len() <= 63
            && is_label(namespace)
            && name.len() <= 253
            && name.split('.').all(is_label);
        valid.then_some(Self { namespace, name })
    }

    /// Returns the groups of which every service account is a member.
    pub fn groups(&self) -> Vec<String> {
        vec![SERVICE_ACCOUNTS.to_owned(), format!("{SERVICE_ACCOUNTS}:{}", self.namespace)]
    }
}

impl fmt::Display for ServiceAccountName<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{SERVICE_ACCOUNT_PREFIX}{}:{}", self.namespace, self.name)
    }
}

fn is_label(text: &str) -> bool {
    !text.is_empty()
        && text.bytes().all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'-')
        && !text.starts_with('-')
        && !text.ends_with('-')
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_service_accounts_name_is_read_as_it_is_shown() {
        let account = ServiceAccountName { namespace: "apps", name: "web.v1" };
        assert_eq!(account.to_string(), "system:serviceaccount:apps:web.v1");
        assert_eq!(ServiceAccountName::parse(&account.to_string()), Some(account));
        assert_eq!(account.groups(), ["system:serviceaccounts", "system:serviceaccounts:apps"]);
        for user in [
            "apps:web",
            "system:serviceaccount:apps",
            "system:serviceaccount::web",
            "system:serviceaccount:apps:",
            "system:serviceaccount:apps:web:x",
            "system:serviceaccount:apps:Web",
            "system:serviceaccount:apps:we..b",
            "system:serviceaccount:a.b:web",
            "system:serviceaccount:-apps:web",
        ] {
            assert_eq!(ServiceAccountName::parse(user), None, "{user}");
        }
    }

    #[test]
    fn a_node_needs_the_name_and_the_group() {
        let user = |name: &str, group: &str| User {
            name: name.to_owned(),
            groups: vec![group.to_owned()],
            ..User::default()
        };
        assert_eq!(user("system:node:n1", "system:nodes").node(), Some("n1"));
        assert_eq!(user("system:node:n1", "dev").node(), None);
        assert_eq!(user("system:node:", "system:nodes").node(), None);
        assert_eq!(user("n1", "system:nodes").node(), None);
    }
}
