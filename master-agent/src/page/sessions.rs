//! The sessions of viewers who may see the page on the admin address. Whoever may use the admin socket gets a login
//! token, which can be exchanged for a session once and within a minute. Only hashes of tokens and sessions are kept,
//! in memory.

use std::{
    collections::VecDeque,
    sync::{Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use base64::{Engine, engine::general_purpose::URL_SAFE_NO_PAD};
use sha2::{Digest, Sha256};
use subtle::{Choice, ConstantTimeEq};
use tokio::time::Instant;

/// How long a login token can be used.
const LOGIN: Duration = Duration::from_secs(60);
/// How long a session lasts.
pub(super) const SESSION: Duration = Duration::from_secs(12 * 60 * 60);
/// The maximum number of tokens, and of sessions. The oldest one gives way to a new one.
const MAX_SECRETS: usize = 32;

#[derive(Default)]
pub(super) struct Sessions(Mutex<Kept>);

#[derive(Default)]
struct Kept {
    logins: Secrets,
    sessions: Secrets,
}

impl Sessions {
    fn kept(&self) -> MutexGuard<'_, Kept> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Creates a login token.
    pub(super) fn invite(&self, now: Instant) -> String {
        self.kept().logins.create(now + LOGIN, now)
    }

    /// Exchanges a login token for a new session.
    pub(super) fn login(&self, token: &str, now: Instant) -> Option<String> {
        let Kept { logins, sessions } = &mut *self.kept();
        let at = logins.find(token, now)?;
        logins.0.remove(at);
        Some(sessions.create(now + SESSION, now))
    }

    /// Returns when a session ends, if there is such a session.
    pub(super) fn until(&self, session: &str, now: Instant) -> Option<Instant> {
        let Kept { sessions, .. } = &mut *self.kept();
        let at = sessions.find(session, now)?;
        sessions.0.get(at).map(|(_, end)| *end)
    }
}

/// The hashes of secrets, with the times at which they expire. The oldest comes first.
#[derive(Default)]
struct Secrets(VecDeque<([u8; 32], Instant)>);

impl Secrets {
    fn create(&mut self, end: Instant, now: Instant) -> String {
        self.0.retain(|(_, end)| now < *end);
        if self.0.len() >= MAX_SECRETS {
            self.0.pop_front();
        }
        let secret = URL_SAFE_NO_PAD.encode(rand::random::<[u8; 32]>());
        self.0.push_back((hash(&secret), end));
        secret
    }

    /// Returns the index of a secret. All secrets are compared, so that the time does not depend on which one matches.
    fn find(&mut self, secret: &str, now: Instant) -> Option<usize> {
        self.0.retain(|(_, end)| now < *end);
        let hash = hash(secret);
        let mut found = None;
        for (at, (known, _)) in self.0.iter().enumerate() {
            let same: Choice = known.ct_eq(&hash);
            if same.into() {
                found = Some(at);
            }
        }
        found
    }
}

fn hash(secret: &str) -> [u8; 32] {
    Sha256::digest(secret).into()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_token_is_good_once_and_for_a_minute() {
        let (sessions, now) = (Sessions::default(), Instant::now());
        let (token, late) = (sessions.invite(now), sessions.invite(now));
        assert!(token != late && token.len() == 43, "{token}");
        assert_eq!(sessions.until(&token, now), None, "a token is no session");
        let session = sessions.login(&token, now + LOGIN / 2).unwrap();
        assert_eq!(sessions.login(&token, now + LOGIN / 2), None, "twice");
        assert_eq!(sessions.login(&session, now), None, "a session is no token");
        assert_eq!(sessions.login(&late, now + LOGIN), None, "too late");
        assert_eq!(sessions.login("", now), None);
    }

    #[test]
    fn sessions_end_and_are_bounded() {
        let (sessions, now) = (Sessions::default(), Instant::now());
        let new = |now| sessions.login(&sessions.invite(now), now).unwrap();
        let first = new(now);
        assert_eq!(sessions.until(&first, now + SESSION / 2), Some(now + SESSION));
        assert_eq!(sessions.until(&first, now + SESSION), None);
        let all: Vec<String> = (0..=MAX_SECRETS).map(|_| new(now)).collect();
        assert_eq!(sessions.until(&all[0], now), None, "the oldest gave way");
        assert!(all[1..].iter().all(|session| sessions.until(session, now).is_some()));
        let tokens: Vec<String> = (0..=MAX_SECRETS).map(|_| sessions.invite(now)).collect();
        assert!(sessions.login(&tokens[0], now).is_none() && sessions.login(&tokens[1], now).is_some());
    }
}
