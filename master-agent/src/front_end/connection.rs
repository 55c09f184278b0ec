//! One connection of a caller, and the identity that is known for it.

use std::{
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicU32, Ordering},
    },
    time::{Duration, Instant},
};

use access::{
    authn::{Authenticated, Certificates},
    moment::Moment,
    peer::Peer,
    user::{UNAUTHENTICATED, User},
};
use hyper::StatusCode;
use tokio_util::sync::CancellationToken;

use super::{
    admission::Admission,
    headers::{IdentityLines, UnsendableIdentity},
    recorder::ConnectionRecords,
    server::FrontEnd,
};
use crate::http::{generations::Generation, watched::Activity};

/// How long a connection remembers the user of its certificate.
const MAX_REMEMBERED_AGE: Duration = Duration::from_secs(10);
/// The largest identity of a user whose headers a connection remembers, in bytes.
const MAX_IDENTITY: usize = 4 * 1024;
/// The number of 429 answers on a connection without an authenticated caller before the connection ends.
const MAX_LIMITED: u32 = 16;

/// One accepted connection.
pub(super) struct Connection {
    pub front_end: Arc<FrontEnd>,
    pub peer: Peer,
    /// What the records of its requests have in common.
    pub records: Arc<ConnectionRecords>,
    pub certificates: Certificates,
    remembered: Mutex<Option<Remembered>>,
    /// The user on whose behalf the last request was made, and the headers that say so.
    identity: Mutex<Option<(Arc<User>, Arc<IdentityLines>)>>,
    /// The user of every caller on the plain port, whatever credential the caller presents.
    pub known: Option<Authenticated>,
    pub activity: Activity,
    pub admission: Admission,
    pub generation: Generation,
    /// Cancelled when the connection must take no more requests.
    pub ending: CancellationToken,
    /// The number of requests that were answered with 429.
    limited: AtomicU32,
}

/// The user of the connection's certificate, according to one generation of the authenticators' files.
struct Remembered {
    generation: u64,
    at: Instant,
    caller: Authenticated,
}

impl Connection {
    /// Creates a connection whose caller may have presented certificates in the TLS handshake.
    pub(super) fn over_tls(
        front_end: Arc<FrontEnd>,
        peer: Peer,
        certificates: Certificates,
        admission: Admission,
    ) -> Self {
        let (audit, metrics) = (front_end.audit.clone(), front_end.metrics.clone());
        Self {
            generation: front_end.generations.present(),
            front_end,
            records: Arc::new(ConnectionRecords::new(audit, metrics, &peer)),
            peer,
            certificates,
            remembered: Mutex::default(),
            identity: Mutex::default(),
            known: None,
            activity: Activity::default(),
            admission,
            ending: CancellationToken::new(),
            limited: AtomicU32::new(0),
        }
    }

    /// Creates a connection to the plain port, whose caller is `known` whatever credential it presents.
    pub(super) fn plain(
        front_end: Arc<FrontEnd>,
        peer: Peer,
        known: Authenticated,
        admission: Admission,
    ) -> Self {
        let connection = Self::over_tls(front_end, peer, Certificates::default(), admission);
        Self { known: Some(known), ..connection }
    }

    /// Returns the headers that tell kube-apiserver on whose behalf a request of this connection is made. They are made
    /// once for requests in a row with the same remembered credential.
    pub(super) fn identity_lines(&self, user: &Arc<User>) -> Result<Arc<IdentityLines>, UnsendableIdentity> {
        let mut identity = self.identity.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some((known, lines)) = &*identity
            && Arc::ptr_eq(known, user)
        {
            return Ok(lines.clone());
        }
        let lines = Arc::new(self.front_end.identity.lines(user, self.peer.ip())?);
        *identity = (lines.size() <= MAX_IDENTITY).then(|| (user.clone(), lines.clone()));
        Ok(lines)
    }

    /// Protects the connection from eviction, unless the caller is anonymous.
    pub(super) fn authenticated(&self, caller: &Authenticated) {
        if !caller.user.in_group(UNAUTHENTICATED) {
            self.admission.authenticated();
        }
    }

    /// Whether the connection ends after an answer with this status, because nobody has authenticated on it and its
    /// requests fail. After a 429, a caller may try again a few times, because another connection would cost a
    /// handshake, which is more expensive than the answer.
    pub(super) fn is_to_end_after(&self, status: StatusCode) -> bool {
        let may_ask_again = || {
            status == StatusCode::TOO_MANY_REQUESTS
                && self.limited.fetch_add(1, Ordering::Relaxed) < MAX_LIMITED
        };
        status.is_client_error() && self.admission.is_unauthenticated() && !may_ask_again()
    }

    /// Returns the remembered user of the connection's certificate, if that is still valid.
    pub(super) fn remembered(&self, now: &Moment) -> Option<Authenticated> {
        let remembered = self.remembered.lock().unwrap_or_else(PoisonError::into_inner);
        let Remembered { generation, at, caller } = remembered.as_ref()?;
        let good = *generation == self.front_end.authn.generation()
            && now.monotonic.saturating_duration_since(*at) < MAX_REMEMBERED_AGE
            && caller.validity.expires.is_none_or(|end| now.wall < end);
        good.then(|| caller.clone())
    }

    pub(super) fn remember(&self, generation: u64, now: &Moment, caller: &Authenticated) {
        let mut remembered = self.remembered.lock().unwrap_or_else(PoisonError::into_inner);
        *remembered = Some(Remembered { generation, at: now.monotonic, caller: caller.clone() });
    }
}
