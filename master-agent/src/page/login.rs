//! The page on the admin address, for viewers who have logged in.

use std::net::SocketAddr;

use hyper::{
    Method, Request, Response, StatusCode,
    body::Incoming,
    header::{self, HeaderValue},
};
use proto_net::{
    admin::{self, Answer},
    dialer::Origin,
};
use tokio::time::Instant;

use super::{
    answer::{Viewer, answer},
    guard,
    paths::{ADMIN, Site, below},
    response::{HTML, TEXT, guarded, redirect, refusal},
    sessions::SESSION,
    state::Page,
};

const POLICY: &str = "default-src 'none'; frame-ancestors 'none'; base-uri 'none'; form-action 'none'";
const NO_SESSION: &str = "<!DOCTYPE html>\n<html lang=\"en\">\n<head><meta charset=\"utf-8\">\
     <meta name=\"viewport\" content=\"width=device-width, initial-scale=1\"><meta name=\"color-scheme\" content=\"light dark\">\
     <title>master-agent: not logged in</title></head>\n<body><main><h1>Not logged in</h1>\n<p>Run <code>master-agent page</code> \
     as root on the master's host, and open the address that it prints within a minute. It is good once.</p></main></body>\n</html>\n";

/// Returns the answer to `POST /page/token` on the admin socket.
pub fn token(page: &Page) -> Answer {
    match page.admin {
        Some(_) => (StatusCode::OK, TEXT, page.sessions.invite(Instant::now())),
        None => (
            StatusCode::NOT_FOUND,
            TEXT,
            "the running agent has no page: configure `admin: {page: true}` and restart it\n".to_owned(),
        ),
    }
}

/// Answers a request on the admin address. Returns `None` if the page has no such path there.
pub async fn serve(page: &Page, request: Request<Incoming>) -> Option<Response<admin::Body>> {
    let listen = page.admin?;
    let path = request.uri().path().to_owned();
    let path = below(&path, ADMIN)?;
    let Some(host) = guard::local_host(&request, listen) else {
        let message =
            format!("only localhost and loopback addresses, with port {}, are served here", listen.port());
        return Some(refusal(StatusCode::FORBIDDEN, &message));
    };
    let (sessions, now) = (&page.sessions, Instant::now());
    if path == "login" && request.method() == Method::GET {
        let token = request.uri().query().and_then(|query| query.strip_prefix("token="));
        let session = token.and_then(|token| sessions.login(token, now));
        let Some(session) = session else { return Some(unauthorized()) };
        tracing::info!("login to the page");
        let cookie = format!(
            "{}={session}; Path={ADMIN}; Max-Age={}; HttpOnly; SameSite=Strict",
            cookie_name(listen),
            SESSION.as_secs()
        );
        let mut response = redirect("./", StatusCode::SEE_OTHER);
        if let Ok(mut cookie) = HeaderValue::try_from(cookie) {
            cookie.set_sensitive(true);
            response.headers_mut().insert(header::SET_COOKIE, cookie);
        }
        return Some(response);
    }
    let name = cookie_name(listen);
    let cookies = request.headers().get_all(header::COOKIE).iter().filter_map(|line| line.to_str().ok());
    let mut shown = cookies
        .flat_map(|line| line.split(';'))
        .filter_map(|pair| pair.trim().strip_prefix(&*name)?.strip_prefix('='))
        .take(4);
    let Some(end) = shown.find_map(|session| sessions.until(session, now)) else {
        return Some(unauthorized());
    };
    let own = guard::own_page(&request, host);
    let viewer = Viewer { origin: Origin("page".to_owned()), end, site: Site::Admin };
    Some(answer(page, path, request, own, viewer).await)
}

/// Returns the name of the cookie. It differs between two agents on one host, since browsers send cookies to all ports.
fn cookie_name(listen: SocketAddr) -> String {
    format!("master-agent-{}", listen.port())
}

fn unauthorized() -> Response<admin::Body> {
    guarded(admin::respond((StatusCode::UNAUTHORIZED, HTML, NO_SESSION.to_owned())), POLICY)
}
