//! The failure to recognise a caller, with the reasons of all authenticators.

use std::{fmt, time::Duration};

use super::{authenticated::Authenticated, reason::FailureReason};

/// The reasons of all authenticators for not recognising a caller. They are for the log and not for the caller.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct AuthenticationFailure {
    pub(super) said: Vec<(&'static str, FailureReason)>,
    pub(super) unchecked: Option<Box<Authenticated>>,
}

impl AuthenticationFailure {
    pub fn reasons(&self) -> impl Iterator<Item = &FailureReason> {
        self.said.iter().map(|(_, reason)| reason)
    }

    /// Returns the reason of each authenticator with its name.
    pub fn by_authenticator(&self) -> impl Iterator<Item = (&'static str, &FailureReason)> {
        self.said.iter().map(|(authenticator, reason)| (*authenticator, reason))
    }

    /// Returns the caller whose credential is valid except that the objects to which it is bound could not be checked.
    pub fn unchecked(&self) -> Option<&Authenticated> {
        self.unchecked.as_deref()
    }

    /// Returns the time until the guard allows another attempt, if it has stopped this one.
    pub fn not_tried(&self) -> Option<Duration> {
        self.reasons()
            .find_map(|reason| if let FailureReason::NotTried(after) = reason { Some(*after) } else { None })
    }

    /// Whether a server that may know the credential could not be asked. The credential may be valid.
    pub fn is_unavailable(&self) -> bool {
        self.reasons().any(|reason| matches!(reason, FailureReason::Unavailable(_)))
    }
}

impl From<FailureReason> for AuthenticationFailure {
    fn from(reason: FailureReason) -> Self {
        Self { said: vec![("request", reason)], unchecked: None }
    }
}

impl std::error::Error for AuthenticationFailure {}

impl fmt::Display for AuthenticationFailure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (i, (authenticator, reason)) in self.said.iter().enumerate() {
            let separator = if i == 0 { "" } else { "; " };
            write!(f, "{separator}{authenticator}: {reason}")?;
        }
        Ok(())
    }
}
