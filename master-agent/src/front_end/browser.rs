//! What keeps web pages from using the plain port through the browser of somebody who works on its host.

use access::peer::Peer;
use hyper::{StatusCode, http::request::Parts};

use crate::http::{browser, status::Failure};

/// Refuses what a browser sends for a page.
pub(super) fn refuse_pages(peer: &Peer, head: &Parts) -> Result<(), Failure> {
    let Peer::Local(Some(_)) = peer else { return Ok(()) };
    browser::refuse_other_hosts(&head.uri, &head.headers)
        .and_then(|()| browser::refuse_other_origins("http", &head.uri, &head.headers))
        .map_err(|message| Failure::new(StatusCode::FORBIDDEN, message))
}
