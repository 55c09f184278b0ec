//! Phase 4: reserves room for the request's audit record, and waits for one of its user's seats.

use super::{
    rejection::Rejection,
    stages::{Handler, Reserved, Resolved},
};
use crate::front_end::{audit::QueueFull, connection::Connection, recorder::Recorder};

/// Reserves room and a seat. This phase comes before authorization, which may be expensive, so that a user with many
/// requests waits for their own seats only.
pub(super) async fn reserve(
    connection: &Connection,
    request: Resolved,
    record: &mut Recorder,
) -> Result<Reserved, Rejection> {
    let limits = &connection.front_end.limits;
    if let Err(QueueFull) = record.reserve(request.may_last()).await {
        limits.count("audit");
        return Err(Rejection::NotRecorded);
    }
    let user = &request.caller.user.name;
    let seat = match &request.handler {
        // Many nodes may share one user, and each of them has limits of its own.
        Handler::CallHome(_) => {
            limits.admit(&format!("{user} calling home as {}", request.info.name), true).await
        }
        Handler::ProxyUrl(_) | Handler::Page(_) | Handler::Upstream => {
            limits.admit(user, request.long_running).await
        }
    };
    Ok(Reserved { seat: seat.map_err(Rejection::TooMany)?, request })
}
