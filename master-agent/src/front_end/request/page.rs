//! The handler of the agent's own page.

use std::sync::Arc;

use hyper::Request;

use super::{handled::Handled, stages::Authorized};
use crate::front_end::{
    answer::Content, connection::Connection, page::Page, recorder::Recorder, upstream::RequestBody,
};

pub(super) async fn answer(
    connection: &Connection,
    page: Arc<dyn Page>,
    request: Authorized,
    record: &Recorder,
) -> Handled {
    let Authorized { head, body, info, seat, caller, user, validity, .. } = request;
    let limits = connection.front_end.body_limits();
    let body = RequestBody::new(body, limits, || record.received_bytes());
    let origin = record.origin(&user);
    let (path, request) = (info.path.clone(), Request::from_parts(head, body));
    let response = page.answer(path, request, caller.name.clone(), origin).await;
    Handled::response(response.map(Content::Page), seat, validity)
}
