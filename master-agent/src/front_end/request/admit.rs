//! Phase 1: rejects requests that exceed the rate of their address, and ambiguous heads.

use hyper::{Request, body::Incoming};

use super::{rejection::Rejection, stages::Admitted};
use crate::front_end::{connection::Connection, headers};

pub(super) fn admit(connection: &Connection, request: Request<Incoming>) -> Result<Admitted, Rejection> {
    connection.front_end.limits.request(&connection.peer).map_err(Rejection::TooMany)?;
    let (head, body) = request.into_parts();
    headers::reject_ambiguous(&head)?;
    Ok(Admitted { head, body })
}
