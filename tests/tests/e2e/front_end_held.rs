//! What callers of the front end can hold, and for how long: connections without a credential, upgrades, responses
//! that nobody reads, what was granted for a credential that has ended.

use std::collections::HashSet;

use hyper::{Request, StatusCode, header};
use tests::{
    client::Stream,
    cluster::SOON,
    front_end::{Credential, FrontEnd, Heard, Http, Setup, TOKEN, hear},
    h2::{self, END_HEADERS, END_STREAM, Frame, GOAWAY, HEADERS, block},
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

fn h2_head(target: &str, token: &str) -> bytes::Bytes {
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
    // Of an address only a few are looked at: the others' answer is 429.
    let front_end = FrontEnd::start(setup("failures_per_second_per_address: 1")).await.unwrap();
    let mut statuses = HashSet::new();
    for i in 0..20 {
        let http = [Http::V1, Http::V2][i % 2];
        let stream = front_end.connect_from(ATTACKER, Credential::None, http).await.unwrap();
        if http == Http::V1 {
            let mut stream = stream;
            let heard = ask(&mut stream, "/echo", "wrong", "").await;
            assert_eq!(heard.header("connection"), Some("close"));
            statuses.insert((i % 2, heard.status));
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
        assert!(goes_away(connection).await);
    }
    assert_eq!(statuses, HashSet::from([(0, 401), (0, 429), (1, 401), (1, 429)]));
}

#[tokio::test]
async fn who_was_recognised_keeps_the_connection_when_a_token_is_not() {
    let front_end = FrontEnd::start(setup("failures_per_second_per_address: 100")).await.unwrap();
    for http in [Http::V1, Http::V2] {
        let mut caller = front_end.caller_with(Credential::None, None, http).await.unwrap();
        for (token, status) in [(TOKEN, 200), ("wrong", 401), (TOKEN, 200)] {
            let request = Request::get("/echo").header(header::AUTHORIZATION, format!("Bearer {token}"));
            let answer = caller.ask(request.body(http_body_util::Full::default()).unwrap()).await.unwrap();
            assert_eq!(answer.status, status);
        }
    }
}

/// Of connections on which nobody has authenticated there are 1024, and newcomers take the place of others.
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
