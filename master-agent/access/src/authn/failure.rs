//! Why a caller is not recognised, according to all authenticators.

use std::{fmt, time::Duration};

use super::{authenticated::Authenticated, reason::Reason};

/// The reasons of all authenticators for not recognising a caller. They are for the log and not for the caller.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Failure {
    pub(super) said: Vec<(&'static str, Reason)>,
    pub(super) unchecked: Option<Box<Authenticated>>,
}

impl Failure {
    pub fn reasons(&self) -> impl Iterator<Item = &Reason> {
        self.said.iter().map(|(_, reason)| reason)
    }

    /// The reason of each authenticator, with its name.
    pub fn by_authenticator(&self) -> impl Iterator<Item = (&'static str, &Reason)> {
        self.said.iter().map(|(authenticator, reason)| (*authenticator, reason))
    }

    /// Who the caller is if the objects still exist that its credential is bound to, which could not be checked. The
    /// credential is good in all other respects.
    pub fn unchecked(&self) -> Option<&Authenticated> {
        self.unchecked.as_deref()
    }

    /// The time until the guard allows another attempt, if it has stopped this one.
    pub fn not_tried(&self) -> Option<Duration> {
        self.reasons()
            .find_map(|reason| if let Reason::NotTried(after) = reason { Some(*after) } else { None })
    }

    /// Whether a server could not be asked that may know the credential. The credential may be good.
    pub fn is_unavailable(&self) -> bool {
        self.reasons().any(|reason| matches!(reason, Reason::Unavailable(_)))
    }
}

impl From<Reason> for Failure {
    fn from(reason: Reason) -> Self {
        Self { said: vec![("request", reason)], unchecked: None }
    }
}

impl std::error::Error for Failure {}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (i, (authenticator, reason)) in self.said.iter().enumerate() {
            let separator = if i == 0 { "" } else { "; " };
            write!(f, "{separator}{authenticator}: {reason}")?;
        }
        Ok(())
    }
}
