//! The kinds of object that are followed, and why.

use crate::routing::cluster::Kind;

/// A kind of object that is followed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Followed {
    /// For its routes.
    Routed(Kind),
    /// To know which exist.
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

    /// As in the API's paths.
    pub(super) fn name(self) -> &'static str {
        match self {
            Self::Routed(kind) => kind.name(),
            Self::ServiceAccounts => "serviceaccounts",
        }
    }
}
