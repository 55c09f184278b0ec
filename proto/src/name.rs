//! Names of nodes.

use std::{fmt, str::FromStr};

use serde::{Deserialize, Serialize};

/// A node's name: a DNS subdomain (RFC 1123), as Kubernetes requires of Node objects. At most 253
/// characters of `a-z0-9-.`, each label beginning and ending with a letter or digit.
///
/// The type says nothing about who claims the name. A verified name comes from a host certificate or a pin.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct NodeName(String);

#[derive(Debug, thiserror::Error)]
#[error("{0:?} is not a node name: use at most 253 of a-z, 0-9, '-' and '.', as in a Kubernetes Node's name")]
pub struct InvalidNodeName(String);

impl NodeName {
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl FromStr for NodeName {
    type Err = InvalidNodeName;

    fn from_str(s: &str) -> Result<Self, Self::Err> {
        let label = |l: &str| {
            let edge = |c: Option<char>| c.is_some_and(|c| c.is_ascii_lowercase() || c.is_ascii_digit());
            l.len() <= 63
                && edge(l.chars().next())
                && edge(l.chars().last())
                && l.chars().all(|c| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '-')
        };
        // A name that is also an address could shadow another node's address in routing.
        let address = s.parse::<std::net::IpAddr>().is_ok();
        if s.len() <= 253 && !address && s.split('.').all(label) {
            Ok(Self(s.to_owned()))
        } else {
            Err(InvalidNodeName(s.chars().take(80).collect()))
        }
    }
}

impl TryFrom<String> for NodeName {
    type Error = InvalidNodeName;

    fn try_from(s: String) -> Result<Self, Self::Error> {
        s.parse()
    }
}

impl From<NodeName> for String {
    fn from(name: NodeName) -> Self {
        name.0
    }
}

impl fmt::Display for NodeName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn accepts_what_kubernetes_accepts() {
        for good in ["n1", "ip-10-0-0-1.eu.internal", "a", "0abc"] {
            assert_eq!(good.parse::<NodeName>().unwrap().as_str(), good);
        }
        for bad in
            ["", "-a", "a-", "A", "a_b", "a..b", "10.0.0.1", "::1", "a b", &"a".repeat(64), &"a.".repeat(127)]
        {
            assert!(bad.parse::<NodeName>().is_err(), "{bad:?}");
        }
    }
}
