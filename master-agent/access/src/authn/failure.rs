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

    /// Whether nothing but that was in the way. If another authenticator has found the credential wrong, it may be a
    /// guess.
    pub fn is_only_unavailable(&self) -> bool {
        !self.said.is_empty() && self.reasons().all(|reason| matches!(reason, FailureReason::Unavailable(_)))
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_wrong_credential_is_wrong_whatever_else_is_unavailable() {
        let (away, wrong) = (FailureReason::Unavailable("away".to_owned()), FailureReason::Signature);
        for (reasons, unavailable, only) in [
            (vec![], false, false),
            (vec![away.clone()], true, true),
            (vec![away.clone(), away.clone()], true, true),
            (vec![wrong.clone(), away.clone()], true, false),
            (vec![away, wrong.clone()], true, false),
            (vec![wrong], false, false),
        ] {
            let said = reasons.into_iter().map(|reason| ("test", reason)).collect();
            let failure = AuthenticationFailure { said, unchecked: None };
            assert_eq!(
                (failure.is_unavailable(), failure.is_only_unavailable()),
                (unavailable, only),
                "{failure}"
            );
        }
    }
}
