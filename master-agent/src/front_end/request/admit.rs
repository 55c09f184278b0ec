//! Phase 1: rejects what exceeds the rate of its address, and heads that two servers could understand differently.

use hyper::{Request, body::Incoming};

use super::{rejection::Rejection, stages::Admitted};
use crate::front_end::{connection::Connection, headers};

pub(super) fn admit(connection: &Connection, request: Request<Incoming>) -> Result<Admitted, Rejection> {
    connection.front_end.limits.address(&connection.peer).map_err(Rejection::TooMany)?;
    let (head, body) = request.into_parts();
    headers::reject_ambiguous(&head)?;
    Ok(Admitted { head, body })
}
