//! Bounds what callers of the front end can hold and for how long: connections without a credential, upgrades,
//! responses that nobody reads, and what was granted for a credential that has ended.

use std::{
    collections::HashSet,
    time::{Duration, SystemTime},
};

use bytes::Bytes;
use http_body_util::{BodyExt, Full};
use hyper::{Request, StatusCode, header};
use tests::{
    client::Stream,
    cluster::SOON,
    front_end::{Credential, FrontEnd, GREEDY, Heard, Http, RELOADED, Setup, TOKEN, hear},
    h2::{self, END_HEADERS, END_STREAM, Frame, GOAWAY, HEADERS, PING, RST_STREAM, SETTINGS, block},
    load::completes,
    process::eventually,
    steady::raise_descriptor_limit,
};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    task::JoinSet,
};

const ATTACKER: [u8; 4] = [127, 0, 0, 7];

/// Limits that no test reaches by accident, and `lines`.
fn setup(lines: &str) -> Setup {
    let limits = format!(
        "{{requests_per_second_per_user: 1000000, requests_per_second_per_address: 1000000, {lines}}}"
    );
    Setup { limits: Some(limits), ..Setup::default() }
}

fn head(target: &str, token: &str, more: &str) -> String {
    format!("GET {target} HTTP/1.1\r\nHost: api\r\nAuthorization: Bearer {token}\r\n{more}\r\n")
}

async fn ask(stream: &mut Stream, target: &str, token: &str, more: &str) -> Heard {
    stream.write_all(head(target, token, more).as_bytes()).await.unwrap();
    completes("an answer", hear(stream)).await.unwrap().unwrap()
}

async fn upgrade(front_end: &FrontEnd, target: &str, token: &str) -> Stream {
    let mut stream = front_end.connect_from(ATTACKER, Credential::None, Http::V1).await.unwrap();
    let heard = ask(&mut stream, target, token, "Connection: Upgrade\r\nUpgrade: SPDY/3.1\r\n").await;
    assert_eq!(heard.status, 101, "{heard:?}");
    stream
}

fn h2_head(target: &str, token: &str) -> Bytes {
    let bearer = format!("Bearer {token}");
    block(&[
        (":method", "GET"),
        (":scheme", "https"),
        (":authority", "api"),
        (":path", target),
        ("authorization", &bearer),
    ])
}

/// Reads frames until the connection ends; whether a GOAWAY was among them.
async fn goes_away(mut connection: h2::Connection) -> bool {
    let mut said = false;
    while let Some(frame) = completes("the connection's end", connection.read()).await {
        said |= frame.kind == GOAWAY;
    }
    said
}

#[tokio::test]
async fn who_is_not_recognised_does_not_keep_the_connection() {
    // Only a few attempts of an address are looked at; the others are answered with 429.
    let front_end = FrontEnd::start(setup("failures_per_second_per_address: 1")).await.unwrap();
    let (mut statuses, mut leaving) = (HashSet::new(), JoinSet::new());
    for i in 0..20 {
        let http = [Http::V1, Http::V2][i % 2];
        let stream = front_end.connect_from(ATTACKER, Credential::None, http).await.unwrap();
        if http == Http::V1 {
            let mut stream = stream;
            let mut heard = ask(&mut stream, "/echo", "wrong", "").await;
            statuses.insert((i % 2, heard.status));
            // A caller that has asked too often may do so a few times more.
            for _ in 0..16 {
                if heard.status == 429 && heard.header("connection").is_none() {
                    heard = ask(&mut stream, "/echo", "wrong", "").await;
                }
            }
            assert_eq!(heard.header("connection"), Some("close"), "{}", heard.status);
            assert_eq!(completes("the end", stream.read_to_end(&mut Vec::new())).await.unwrap_or(0), 0);
            continue;
        }
        let mut connection = h2::Connection::start(stream).await.unwrap();
        let request = Frame::new(HEADERS, END_HEADERS | END_STREAM, 1, h2_head("/echo", "wrong"));
        connection.send(&request).await.unwrap();
        let h2::Answer::Response(response) = completes("an answer", connection.answer(1)).await.unwrap()
        else {
            panic!("no response")
        };
        statuses.insert((i % 2, response.status));
        for again in 0..if response.status == 429 { 16 } else { 0 } {
            let request =
                Frame::new(HEADERS, END_HEADERS | END_STREAM, 3 + 2 * again, h2_head("/echo", "wrong"));
            let _ = connection.send(&request).await;
        }
        leaving.spawn(goes_away(connection));
    }
    assert_eq!(statuses, HashSet::from([(0, 401), (0, 429), (1, 401), (1, 429)]));
    // Nor who is not understood.
    let stream = front_end.connect_from(ATTACKER, Credential::None, Http::V2).await.unwrap();
    let mut connection = h2::Connection::start(stream).await.unwrap();
    let fields =
        [(":method", "GET"), (":scheme", "https"), (":authority", "a"), (":path", "/"), ("host", "b")];
    connection.send(&Frame::new(HEADERS, END_HEADERS | END_STREAM, 1, block(&fields))).await.unwrap();
    let answer = completes("an answer", connection.answer(1)).await.unwrap();
    assert!(matches!(&answer, h2::Answer::Response(response) if response.status == 400), "{answer:?}");
    leaving.spawn(goes_away(connection));
    // Each of them has ten seconds for its last requests.
    assert_eq!(leaving.join_all().await, [true; 11]);
}

#[tokio::test]
async fn who_was_recognised_keeps_the_connection_when_a_token_is_not() {
    let front_end = FrontEnd::start(setup("failures_per_second_per_address: 100")).await.unwrap();
    for http in [Http::V1, Http::V2] {
        let mut caller = front_end.caller_with(Credential::None, None, http).await.unwrap();
        for (token, status) in [(TOKEN, 200), ("wrong", 401), (TOKEN, 200)] {
            let request = Request::get("/echo").header(header::AUTHORIZATION, format!("Bearer {token}"));
            let answer = caller.ask(request.body(Full::default()).unwrap()).await.unwrap();
            assert_eq!(answer.status, status);
        }
    }
}

/// At most 1024 connections are unauthenticated, and newcomers take the place of others.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn strangers_give_way_and_who_has_authenticated_does_not() {
    const STRANGERS: usize = 1100;
    raise_descriptor_limit(4096).unwrap();
    let front_end = FrontEnd::start(setup("head_timeout: 10m, idle_timeout: 10m")).await.unwrap();
    let mut known = Vec::new();
    for http in [Http::V1, Http::V2] {
        let stream = front_end.connect_from(ATTACKER, Credential::None, http).await.unwrap();
        let mut caller = front_end.caller_on(stream, Some(TOKEN.to_owned()), http).await.unwrap();
        assert_eq!(caller.get("/echo").await.unwrap().status, StatusCode::OK);
        known.push(caller);
    }
    let mut ends = JoinSet::new();
    for i in 0..STRANGERS {
        let http = [Http::V1, Http::V2][i % 2];
        let mut stream = front_end.connect_from(ATTACKER, Credential::None, http).await.unwrap();
        ends.spawn(async move { stream.read_to_end(&mut Vec::new()).await });
    }
    for _ in 0..STRANGERS - 1024 {
        assert!(completes("a stranger's end", ends.join_next()).await.is_some());
    }
    for caller in &mut known {
        assert_eq!(caller.get("/echo").await.unwrap().status, StatusCode::OK);
    }
    assert!(ends.try_join_next().is_none(), "no more than were needed");
}

#[tokio::test]
async fn an_upgrade_counts_as_the_connection_that_it_was() {
    let front_end = FrontEnd::start(setup("max_connections_per_address: 2")).await.unwrap();
    let open = [upgrade(&front_end, "/tunnel", TOKEN).await, upgrade(&front_end, "/tunnel", TOKEN).await];
    for _ in 0..5 {
        assert!(front_end.connect_from(ATTACKER, Credential::None, Http::V1).await.is_err());
    }
    drop(open);
    eventually("the places are free again", SOON, async || {
        front_end.connect_from(ATTACKER, Credential::None, Http::V1).await.ok()
    })
    .await;
}

/// A request over HTTP/2 whose response the caller lets come no further than `window` bytes.
async fn unread(front_end: &FrontEnd, window: u32) -> h2::Connection {
    let stream = front_end.connect_from(ATTACKER, Credential::None, Http::V2).await.unwrap();
    let mut connection = h2::Connection::raw(stream);
    connection.write(h2::PREFACE).await.unwrap();
    let window = [&[0, 4][..], &window.to_be_bytes()].concat();
    connection.send(&Frame::new(SETTINGS, 0, 0, window)).await.unwrap();
    let request = Frame::new(HEADERS, END_HEADERS | END_STREAM, 1, h2_head("/unread", TOKEN));
    connection.send(&request).await.unwrap();
    connection
}

#[tokio::test]
async fn a_response_that_nobody_reads_ends() {
    let front_end = FrontEnd::start(setup("idle_timeout: 1s")).await.unwrap();
    let mut connection = unread(&front_end, 0).await;
    assert_eq!(completes("the reset", connection.answer(1)).await.unwrap(), h2::Answer::Reset(8));
    let ping = Bytes::from_static(b"still up");
    connection.send(&Frame::new(PING, 0, 0, ping.clone())).await.unwrap();
    assert_eq!(completes("a pong", connection.answer(0)).await.unwrap(), h2::Answer::Pong(ping));
    // Once some of it is on its way the rest can't be taken back.
    assert!(goes_away(unread(&front_end, 5).await).await);
}

#[tokio::test]
async fn a_response_that_nobody_reads_is_its_users_loss() {
    let limits = "idle_timeout: 10m, max_in_flight: 2, max_in_flight_per_user: 1, queue_per_user: 1, queue_timeout: 10m";
    let front_end = FrontEnd::start(setup(limits)).await.unwrap();
    for window in [0, 5] {
        let mut connection = unread(&front_end, window).await;
        eventually("the request is answered", SOON, async || {
            front_end.upstream.take().iter().any(|received| received.target == "/unread").then_some(())
        })
        .await;
        let mut more = JoinSet::new();
        for _ in 0..2 {
            let mut caller = front_end.caller(Credential::Token, Http::V1).await.unwrap();
            more.spawn(async move { caller.get("/more").await.unwrap().status });
        }
        let refused = completes("who finds no room in the line", more.join_next()).await.unwrap().unwrap();
        assert_eq!(refused, StatusCode::TOO_MANY_REQUESTS);
        let mut other =
            front_end.caller_with(Credential::None, Some(GREEDY.to_owned()), Http::V1).await.unwrap();
        assert_eq!(other.get("/echo").await.unwrap().status, StatusCode::OK);
        let mine = front_end.upstream.take();
        assert!(mine.iter().all(|received| received.target == "/echo"), "{mine:?}");
        let cancel = Bytes::from_static(&[0, 0, 0, 8]);
        connection.send(&Frame::new(RST_STREAM, 0, 1, cancel)).await.unwrap();
        assert_eq!(completes("a turn", more.join_next()).await.unwrap().unwrap(), StatusCode::OK);
    }
}

#[tokio::test]
async fn an_upgrade_that_is_none_is_a_request_like_others() {
    let limits = "request_timeout: 2s, max_in_flight_per_user: 1, queue_per_user: 1, queue_timeout: 10m";
    let front_end = FrontEnd::start(setup(limits)).await.unwrap();
    front_end.upstream.hold(true);
    let mut asking = JoinSet::new();
    for _ in 0..3 {
        let mut stream = front_end.connect_from(ATTACKER, Credential::None, Http::V1).await.unwrap();
        asking.spawn(async move {
            ask(&mut stream, "/api/v1/pods", TOKEN, "Connection: Upgrade\r\nUpgrade: websocket\r\n").await
        });
    }
    let mut statuses: Vec<_> =
        completes("the answers", asking.join_all()).await.iter().map(|heard| heard.status).collect();
    statuses.sort_unstable();
    assert_eq!(statuses, [429, 504, 504]);
}

#[tokio::test]
async fn what_changes_to_another_protocol_is_long_running_whatever_it_was() {
    let front_end = FrontEnd::start(setup("long_running_per_user: 1")).await.unwrap();
    let first = upgrade(&front_end, "/tunnel", TOKEN).await;
    let again = async || {
        let mut stream = front_end.connect_from(ATTACKER, Credential::None, Http::V1).await.unwrap();
        let more = "Connection: Upgrade\r\nUpgrade: SPDY/3.1\r\n";
        ask(&mut stream, "/tunnel", TOKEN, more).await.status
    };
    assert_eq!(again().await, 429);
    drop(first);
    eventually("there is room", SOON, async || (again().await == 101).then_some(())).await;
}

#[tokio::test]
async fn all_users_together_have_so_many_watches_and_no_more() {
    let front_end = FrontEnd::start(setup("max_long_running: 2")).await.unwrap();
    let watch = async |token: &str, http| {
        let mut caller = front_end.caller_with(Credential::None, Some(token.to_owned()), http).await.unwrap();
        let request = Request::get("/api/v1/pods?watch=1&resourceVersion=239").body(Full::default()).unwrap();
        (caller.send(request).await.unwrap(), caller)
    };
    let open = [watch(GREEDY, Http::V1).await, watch(TOKEN, Http::V2).await];
    assert!(open.iter().all(|(response, _)| response.status() == StatusCode::OK));
    for token in [GREEDY, TOKEN] {
        assert_eq!(watch(token, Http::V2).await.0.status(), StatusCode::TOO_MANY_REQUESTS);
    }
    drop(open);
    eventually("there is room", SOON, async || {
        (watch(TOKEN, Http::V1).await.0.status() == StatusCode::OK).then_some(())
    })
    .await;
}

/// In whole seconds, as tokens and certificates have it.
fn in_a_moment() -> SystemTime {
    let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap();
    SystemTime::UNIX_EPOCH + Duration::from_secs(now.as_secs() + 6)
}

fn unix(time: SystemTime) -> u64 {
    time.duration_since(SystemTime::UNIX_EPOCH).unwrap().as_secs()
}

#[tokio::test]
async fn what_a_credential_was_granted_ends_with_it() {
    let front_end = FrontEnd::start(setup("idle_timeout: 10m")).await.unwrap();
    let end = in_a_moment();
    let token = front_end.service_account_token(&[("exp", unix(end).into())]).unwrap();
    let mut open = Vec::new();
    for http in [Http::V1, Http::V2] {
        let mut caller = front_end.caller_with(Credential::None, Some(token.clone()), http).await.unwrap();
        let request = Request::get("/api/v1/pods?watch=1&resourceVersion=239").body(Full::default()).unwrap();
        let response = caller.send(request).await.unwrap();
        assert_eq!(response.status(), StatusCode::OK);
        open.push((caller, response));
    }
    let mut upgraded = upgrade(&front_end, "/tunnel", &token).await;
    upgraded.write_all(b"hello").await.unwrap();
    let mut heard = [0; 5];
    completes("an echo", upgraded.read_exact(&mut heard)).await.unwrap();
    for (mut caller, response) in open {
        // A clean end: what is cut off is an error.
        completes("the watch's end", response.into_body().collect()).await.unwrap();
        assert!(SystemTime::now() >= end);
        assert_eq!(caller.get("/echo").await.unwrap().status, StatusCode::UNAUTHORIZED);
    }
    assert_eq!(completes("the upgrade's end", upgraded.read(&mut heard)).await.unwrap(), 0);
    eventually("nothing is left", SOON, async || (front_end.upstream.upgraded() == 0).then_some(())).await;
}

#[tokio::test]
async fn a_certificate_is_looked_at_again_on_a_kept_connection() {
    let front_end = FrontEnd::start(setup("idle_timeout: 10m")).await.unwrap();
    let ca = std::fs::read_to_string(front_end.file("clients-ca.crt")).unwrap();
    let mut kept = Vec::new();
    for http in [Http::V1, Http::V2] {
        let mut caller = front_end.caller(Credential::Certificate, http).await.unwrap();
        assert_eq!(caller.get("/echo").await.unwrap().status, StatusCode::OK);
        kept.push(caller);
    }
    let other = tests::pki::Authority::new("another clients CA").unwrap();
    std::fs::write(front_end.file("clients-ca.crt"), other.pem()).unwrap();
    for caller in &mut kept {
        eventually("the CA is no good any more", RELOADED, async || {
            (caller.get("/echo").await.unwrap().status == StatusCode::UNAUTHORIZED).then_some(())
        })
        .await;
    }
    std::fs::write(front_end.file("clients-ca.crt"), ca).unwrap();
    eventually("the CA is back", RELOADED, async || {
        (kept[0].get("/echo").await.unwrap().status == StatusCode::OK).then_some(())
    })
    .await;
    let end = in_a_moment();
    front_end.clients.client_until(front_end.path(), "jane", end).unwrap();
    for (caller, http) in kept.iter_mut().zip([Http::V1, Http::V2]) {
        *caller = front_end.caller(Credential::Certificate, http).await.unwrap();
        assert_eq!(caller.get("/echo").await.unwrap().status, StatusCode::OK);
    }
    for caller in &mut kept {
        eventually("the certificate has ended", SOON, async || {
            let status = caller.get("/echo").await.unwrap().status;
            assert!(status == StatusCode::OK || SystemTime::now() >= end);
            (status == StatusCode::UNAUTHORIZED).then_some(())
        })
        .await;
    }
}
