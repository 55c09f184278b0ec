//! The interface of the page, which the front end serves to authenticated and authorized callers.

use std::sync::Arc;

use futures_util::future::BoxFuture;
use hyper::{Request, Response};
use proto_net::{admin, dialer::Origin};

use super::upstream::RequestBody;

/// Serves the page to authenticated and authorized callers.
pub trait Page: Send + Sync {
    /// Whether a path belongs to the page.
    fn serves(&self, path: &str) -> bool;

    /// Whether the answer at a path continues for as long as the caller stays.
    fn is_long_running(&self, path: &str) -> bool;

    /// Answers a request of a user. `origin` names the caller in the records of streams that the page opens.
    fn answer(
        self: Arc<Self>,
        path: String,
        request: Request<RequestBody>,
        user: String,
        origin: Origin,
    ) -> BoxFuture<'static, Response<admin::Body>>;
}
