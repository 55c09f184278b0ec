//! The page on the front end, for callers who are authorized there.

use std::{sync::Arc, time::Duration};

use futures_util::future::BoxFuture;
use hyper::{Request, Response, StatusCode};
use proto_net::{admin, dialer::Origin};
use tokio::time::Instant;

use super::{
    answer::{Viewer, answer},
    guard,
    paths::{EVENTS, FRONT_END, Site, below},
    response::refusal,
    state::Page,
};
use crate::front_end::{page, upstream::RequestBody};

/// The time after which a viewer on the front end has to be authorized again.
const AUTHORIZED: Duration = Duration::from_secs(60);

impl page::Page for Page {
    fn serves(&self, path: &str) -> bool {
        below(path, FRONT_END).is_some()
    }

    fn is_long_running(&self, path: &str) -> bool {
        below(path, FRONT_END) == Some(EVENTS)
    }

    fn answer(
        self: Arc<Self>,
        path: String,
        request: Request<RequestBody>,
        user: String,
        origin: Origin,
    ) -> BoxFuture<'static, Response<admin::Body>> {
        Box::pin(async move {
            let Some(path) = below(&path, FRONT_END) else {
                return refusal(StatusCode::NOT_FOUND, "no such page");
            };
            let own = guard::own_page_through_proxies(&request);
            let viewer = Viewer { origin, end: Instant::now() + AUTHORIZED, site: Site::FrontEnd { user } };
            answer(&self, path, request, own, viewer).await
        })
    }
}
