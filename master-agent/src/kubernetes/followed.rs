//! The kinds of object that are followed, and why.

use crate::routing::cluster::Kind;

/// A kind of object that is followed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) enum Followed {
    /// A kind that gives routes.
    Routed(Kind),
    /// Service accounts, of which it matters only that they exist.
    ServiceAccounts,
}

impl Followed {
    pub(super) const ALL: [Self; 5] = [
        Self::Routed(Kind::Nodes),
        Self::Routed(Kind::Pods),
        Self::Routed(Kind::Services),
        Self::Routed(Kind::EndpointSlices),
        Self::ServiceAccounts,
    ];

    /// The plural that the API's paths use.
    pub(super) fn name(self) -> &'static str {
        match self {
            Self::Routed(kind) => kind.name(),
            Self::ServiceAccounts => "serviceaccounts",
        }
    }
}
