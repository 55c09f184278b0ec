//! Phase 2: finds out who the caller is, from its certificate, its bearer token or its join token.

use access::{
    authn::{self, Authenticated, Presented},
    moment::Moment,
};
use hyper::http::request::Parts;

use super::{
    join_token,
    rejection::Rejection,
    stages::{Admitted, Identified},
};
use crate::{
    front_end::{
        browser,
        connection::Connection,
        limits::{Attempt, too_many},
        recorder::Recorder,
    },
    http::status::StatusError,
};

pub(super) async fn identify(
    connection: &Connection,
    request: Admitted,
    record: &mut Recorder,
) -> Result<Identified, Rejection> {
    let Admitted { head, body } = request;
    let caller = match join_token::identify(connection, &head).await? {
        Some(caller) => caller,
        None => by_credential(connection, &head, record).await?,
    };
    record.authenticated(&caller);
    connection.authenticated(&caller);
    Ok(Identified { head, body, caller })
}

async fn by_credential(
    connection: &Connection,
    head: &Parts,
    record: &Recorder,
) -> Result<Authenticated, Rejection> {
    if let Some(caller) = &connection.known {
        browser::reject_web_pages(&connection.peer, head).map_err(Rejection::FromWebPage)?;
        return Ok(caller.clone());
    }
    let attempt = connection.front_end.limits.attempt(&connection.peer);
    let failure = match recognize(connection, head, &attempt).await {
        Ok(caller) => {
            attempt.forgive();
            return Ok(caller);
        }
        Err(failure) => failure,
    };
    if let Some(caller) = join_token::link_unchecked(connection, head, &failure) {
        attempt.forgive();
        return Ok(caller);
    }
    record.unrecognized(&failure);
    Err(unrecognized(connection, attempt, &failure))
}

/// Asks the authenticators. The connection remembers the user of its certificate for a few seconds.
async fn recognize(
    connection: &Connection,
    head: &Parts,
    attempt: &Attempt<'_>,
) -> Result<Authenticated, authn::AuthenticationFailure> {
    let now = Moment::now();
    let presented = Presented::of(head, &connection.certificates)?;
    let by_certificate = presented.bearer.is_none() && !connection.certificates.is_empty();
    if by_certificate && let Some(caller) = connection.remembered(&now) {
        return Ok(caller);
    }
    let authenticators = &connection.front_end.authn;
    let generation = authenticators.generation();
    let caller = authenticators.authenticate(presented.guarded(attempt), now).await?;
    if by_certificate {
        connection.remember(generation, &now, &caller);
    }
    Ok(caller)
}

fn unrecognized(
    connection: &Connection,
    attempt: Attempt<'_>,
    why: &authn::AuthenticationFailure,
) -> Rejection {
    let Connection { front_end, peer, .. } = connection;
    let limited = match why.not_tried() {
        Some(after) => Some(too_many(after)),
        None if why.is_only_unavailable() => {
            attempt.forgive();
            None
        }
        None => attempt.fail().err().map(StatusError::from),
    };
    if let Some(limited) = limited {
        front_end.limits.count("failures_per_address");
        return Rejection::TooMany(limited);
    }
    if why.is_unavailable() {
        tracing::debug!(%peer, reason = %why, "a credential can't be checked");
        return Rejection::CredentialUnchecked("credential");
    }
    tracing::info!(%peer, reason = %why, "caller not recognized");
    Rejection::Unauthenticated
}
