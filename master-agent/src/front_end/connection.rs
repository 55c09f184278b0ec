//! One connection of a caller, and what is known of who is at its other end.

use std::{
    sync::{Arc, Mutex, PoisonError, atomic::AtomicU32},
    time::{Duration, Instant},
};

use access::{
    authn::{Authenticated, Certificates},
    moment::Moment,
    peer::Peer,
    user::UNAUTHENTICATED,
};
use tokio_util::sync::CancellationToken;

use super::{admission::Admission, server::FrontEnd};
use crate::http::watched::Activity;

/// How long who a certificate is may be remembered on its connection.
const REMEMBERED: Duration = Duration::from_secs(10);

/// One accepted connection.
pub(super) struct Connection {
    pub front_end: Arc<FrontEnd>,
    pub peer: Peer,
    pub certificates: Certificates,
    /// Who the certificate was, by the files of which generation, and when.
    pub remembered: Mutex<Option<(u64, Instant, Authenticated)>>,
    /// Who the caller is whatever it presents, on the plain port.
    pub known: Option<Authenticated>,
    pub activity: Activity,
    pub admission: Admission,
    /// Cancelled once no more requests are taken.
    pub ending: CancellationToken,
    /// How often its requests were too many.
    pub limited: AtomicU32,
}

impl Connection {
    pub(super) fn new(
        front_end: Arc<FrontEnd>,
        peer: Peer,
        known: Option<Authenticated>,
        admission: Admission,
    ) -> Self {
        Self {
            front_end,
            peer,
            certificates: Certificates::default(),
            remembered: Mutex::default(),
            known,
            activity: Activity::default(),
            admission,
            ending: CancellationToken::new(),
            limited: AtomicU32::new(0),
        }
    }

    /// Whether nobody has authenticated here.
    pub(super) fn is_strangers(&self) -> bool {
        self.admission.is_strangers()
    }

    /// Somebody has authenticated.
    pub(super) fn authenticated(&self, who: &Authenticated) {
        if !who.user.in_group(UNAUTHENTICATED) {
            self.admission.authenticated();
        }
    }

    /// Who the connection's certificate was a moment ago.
    pub(super) fn remembered(&self, now: &Moment) -> Option<Authenticated> {
        let remembered = self.remembered.lock().unwrap_or_else(PoisonError::into_inner);
        let (generation, at, who) = remembered.as_ref()?;
        let good = *generation == self.front_end.authn.generation()
            && now.monotonic.saturating_duration_since(*at) < REMEMBERED
            && who.validity.expires.is_none_or(|end| now.wall < end);
        good.then(|| who.clone())
    }

    pub(super) fn remember(&self, generation: u64, now: &Moment, who: &Authenticated) {
        let mut remembered = self.remembered.lock().unwrap_or_else(PoisonError::into_inner);
        *remembered = Some((generation, now.monotonic, who.clone()));
    }
}
