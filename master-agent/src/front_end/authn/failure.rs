//! Why a caller is not recognised, by all who were asked.

use std::{fmt, time::Duration};

use super::{authenticated::Authenticated, reason::Reason};

/// Why a caller is not recognised: what each authenticator said. For the log, not for the caller.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Failure {
    pub(super) said: Vec<(&'static str, Reason)>,
    pub(super) unchecked: Option<Box<Authenticated>>,
}

impl Failure {
    pub fn reasons(&self) -> impl Iterator<Item = &Reason> {
        self.said.iter().map(|(_, reason)| reason)
    }

    /// What each authenticator said.
    pub fn by_authenticator(&self) -> impl Iterator<Item = (&'static str, &Reason)> {
        self.said.iter().map(|(authenticator, reason)| (*authenticator, reason))
    }

    /// Who the caller is if what its credential is bound to still exists, which nobody could be asked. The credential is
    /// good in all else.
    pub fn unchecked(&self) -> Option<&Authenticated> {
        self.unchecked.as_deref()
    }

    /// Where the guard let something not be tried: how long until it may.
    pub fn not_tried(&self) -> Option<Duration> {
        self.reasons()
            .find_map(|reason| if let Reason::NotTried(after) = reason { Some(*after) } else { None })
    }

    /// Whether somebody who may know the credential could not be asked: then it need not be wrong.
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
