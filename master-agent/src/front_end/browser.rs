//! The protection of the plain port against web pages in the browser of somebody who works on the master's host.

use access::peer::Peer;
use hyper::http::request::Parts;

use crate::http::browser;

/// Rejects requests that a browser sends on behalf of a web page. The error is the reason.
pub(super) fn reject_web_pages(peer: &Peer, head: &Parts) -> Result<(), String> {
    let Peer::Local(Some(_)) = peer else { return Ok(()) };
    browser::refuse_other_hosts(&head.uri, &head.headers)
        .and_then(|()| browser::refuse_other_origins("http", &head.uri, &head.headers))
}
