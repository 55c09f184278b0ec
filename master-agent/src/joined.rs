//! Joins the egress listener of proxy URLs to the front end, which knows it by a trait only.

use std::{net::IpAddr, sync::Arc};

use futures_util::future::BoxFuture;
use hyper::{Request, body::Incoming};

use crate::{
    egress::proxy_urls::call::ProxyUrls,
    front_end::proxy_urls::{self, Answered},
    http::watched::Activity,
    stream::caller::Caller,
};

impl proxy_urls::ProxyUrls for ProxyUrls {
    fn answer(
        self: Arc<Self>,
        caller: Caller,
        peer: IpAddr,
        activity: Activity,
        request: Request<Incoming>,
    ) -> BoxFuture<'static, Answered> {
        Box::pin(async move { self.answer_authorized(caller, peer, &activity, request).await })
    }
}
