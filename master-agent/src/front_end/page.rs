//! The page that the front end may serve, behind its authentication and authorization.

use std::sync::Arc;

use futures_util::future::BoxFuture;
use hyper::{Request, Response};
use proto_net::{admin, dialer::Origin};

use super::upstream::RequestBody;

/// Serves a page to callers who are authenticated and authorized.
pub trait Page: Send + Sync {
    /// Whether a path belongs to the page.
    fn serves(&self, path: &str) -> bool;

    /// Whether the answer at a path goes on for as long as somebody watches.
    fn is_long_running(&self, path: &str) -> bool;

    /// Answers a request. `origin` names the caller to the records of what it dials.
    fn answer(
        self: Arc<Self>,
        path: String,
        request: Request<RequestBody>,
        origin: Origin,
    ) -> BoxFuture<'static, Response<admin::Body>>;
}
