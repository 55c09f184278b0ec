//! Phase 4: reserves room for the request's audit record, and waits for one of its user's seats.

use super::{
    call_home::{limited_as, node_of},
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
    let user = &request.caller.user;
    let seat = match &request.handler {
        Handler::CallHome(_) if node_of(user).is_some() => {
            limits.admit(&limited_as(user, &request.info), true).await
        }
        // The node's name may be an invention. Until it is authorized, the call counts as a short request of its user.
        Handler::CallHome(_) => limits.admit(&user.name, false).await,
        Handler::ProxyUrl(_) | Handler::Page(_) | Handler::Upstream => {
            limits.admit(&user.name, request.long_running).await
        }
    };
    Ok(Reserved { seat: seat.map_err(Rejection::TooMany)?, request })
}
