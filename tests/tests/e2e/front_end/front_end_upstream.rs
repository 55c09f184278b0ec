//! The front end keeps, shares, replaces and bounds its connections to kube-apiserver.

use std::collections::BTreeSet;

use bytes::Bytes;
use http_body_util::{BodyExt, Full};
use hyper::{Request, StatusCode, header};
use serde_json::json;
use tests::{
    apiserver::Kind,
    cluster::SOON,
    front_end::{Credential, FrontEnd, Http, RELOADED, Setup},
    load::completes,
    process::eventually,
    upstream::PROXY_NAME,
};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    task::JoinSet,
};

/// The answer to one caller.
async fn get(front_end: &FrontEnd) -> StatusCode {
    let mut caller = front_end.caller(Credential::Token, Http::V1).await.unwrap();
    caller.get("/echo").await.unwrap().status
}

/// The connection that the last request came on.
fn last(front_end: &FrontEnd) -> usize {
    front_end.upstream.received().last().unwrap().connection
}

#[tokio::test]
async fn a_replaced_front_proxy_certificate_reaches_requests_on_kept_connections() {
    for http2 in [false, true] {
        let front_end = FrontEnd::start(Setup { http2, ..Setup::default() }).await.unwrap();
        let upstream = &front_end.upstream;
        for _ in 0..3 {
            assert_eq!(get(&front_end).await, StatusCode::OK);
        }
        let old = last(&front_end);
        // A request that is under way.
        let mut caller = front_end.caller(Credential::Token, Http::V1).await.unwrap();
        let watch = Request::get("/api/v1/pods?watch=1&resourceVersion=0").body(Full::<Bytes>::default());
        let mut watch = caller.send(watch.unwrap()).await.unwrap().into_body();
        upstream.api().wait_watched(Kind::Pods).await;

        upstream.proxies().client(upstream.directory(), PROXY_NAME).unwrap();
        let before = upstream.connections();
        for end in ["crt", "key"] {
            let from = upstream.file(&format!("{PROXY_NAME}.{end}"));
            std::fs::copy(from, front_end.file(&format!("front-proxy.{end}"))).unwrap();
        }
        eventually("the new certificate is used", RELOADED * 2, async || {
            assert_eq!(get(&front_end).await, StatusCode::OK);
            (last(&front_end) >= before).then_some(())
        })
        .await;
        for _ in 0..5 {
            assert_eq!(get(&front_end).await, StatusCode::OK);
            assert!(last(&front_end) >= before && old < before, "HTTP/2 {http2}");
        }

        let event = json!({"metadata": {"name": "after-rotation", "namespace": "default"}});
        upstream.api().send(Kind::Pods, "ADDED", event);
        let mut read = Vec::new();
        while !String::from_utf8_lossy(&read).contains("after-rotation") {
            let frame = completes("the event", watch.frame()).await.unwrap().unwrap();
            read.extend_from_slice(&frame.into_data().unwrap());
        }
    }
}

#[tokio::test]
async fn health_checks_and_requests_share_connections() {
    for http2 in [false, true] {
        let front_end = FrontEnd::start(Setup { http2, ..Setup::default() }).await.unwrap();
        let upstream = &front_end.upstream;
        assert_eq!(get(&front_end).await, StatusCode::OK);
        let more_checks = async || {
            let first = upstream.checks();
            eventually("three checks", SOON, async || (upstream.checks() >= first + 3).then_some(())).await;
        };
        more_checks().await;
        let connections = upstream.connections();
        more_checks().await;
        assert_eq!(get(&front_end).await, StatusCode::OK);
        assert_eq!(upstream.connections(), connections, "HTTP/2 {http2}");
    }
}

#[tokio::test]
async fn an_old_connection_is_replaced() {
    for http2 in [false, true] {
        let setup = Setup { http2, upstream: ", max_age: 100ms", ..Setup::default() };
        let front_end = FrontEnd::start(setup).await.unwrap();
        assert_eq!(get(&front_end).await, StatusCode::OK);
        let first = last(&front_end);
        eventually("a younger connection", SOON, async || {
            assert_eq!(get(&front_end).await, StatusCode::OK);
            (last(&front_end) > first).then_some(())
        })
        .await;
    }
}

#[tokio::test]
async fn connections_to_kube_apiserver_are_so_many_and_no_more() {
    let setup = Setup { upstream: ", max_connections: 4", ..Setup::default() };
    let front_end = std::sync::Arc::new(FrontEnd::start(setup).await.unwrap());
    let upstream = &front_end.upstream;
    for _ in 0..2 {
        upstream.hold(true);
        let (before, mut held) = (upstream.waiting(), JoinSet::new());
        for _ in 0..4 {
            let front_end = front_end.clone();
            held.spawn(async move {
                loop {
                    // A health check may be in the way.
                    match get(&front_end).await {
                        StatusCode::SERVICE_UNAVAILABLE => {}
                        status => break status,
                    }
                }
            });
        }
        eventually("all are under way", SOON, async || (upstream.waiting() == before + 4).then_some(()))
            .await;
        let mut caller = front_end.caller(Credential::Certificate, Http::V2).await.unwrap();
        for _ in 0..20 {
            let answer = completes("a refusal", caller.get("/echo")).await.unwrap();
            assert_eq!(answer.status, StatusCode::SERVICE_UNAVAILABLE);
            assert!(answer.headers.contains_key(header::RETRY_AFTER));
        }
        assert_eq!(upstream.waiting(), before + 4);
        upstream.hold(false);
        for status in completes("the others", held.join_all()).await {
            assert_eq!(status, StatusCode::OK);
        }
        assert_eq!(get(&front_end).await, StatusCode::OK);
    }
    // A lack of room is no failure of the server.
    assert!(!front_end.log().contains("does not work"), "{}", front_end.log());

    // An upgrade has a new connection, for which a kept one makes room; that of an upgrade that has ended is free.
    for _ in 0..10 {
        let mut stream = front_end.connect(Credential::Certificate, Http::V1).await.unwrap();
        let head = b"GET /echo HTTP/1.1\r\nHost: a\r\nConnection: Upgrade\r\nUpgrade: SPDY/3.1\r\n\r\n";
        stream.write_all(head).await.unwrap();
        let mut begin = [0; 12];
        completes("an answer", stream.read_exact(&mut begin)).await.unwrap();
        assert_eq!(String::from_utf8_lossy(&begin), "HTTP/1.1 101");
        drop(stream);
        eventually("the upgrade ends", SOON, async || (upstream.upgraded() == 0).then_some(())).await;
    }
}

#[tokio::test]
async fn many_requests_at_once_share_the_http2_connection_of_their_thread_from_the_first() {
    let front_end =
        std::sync::Arc::new(FrontEnd::start(Setup { http2: true, ..Setup::default() }).await.unwrap());
    let upstream = &front_end.upstream;
    upstream.refuse().await;
    upstream.accept().await.unwrap();
    let before = upstream.connections();
    let mut all = JoinSet::new();
    for _ in 0..50 {
        let front_end = front_end.clone();
        all.spawn(async move { get(&front_end).await });
    }
    for status in completes("all requests", all.join_all()).await {
        assert_eq!(status, StatusCode::OK);
    }
    // Each thread that serves callers makes one, and so does the health check.
    let threads = std::thread::available_parallelism().unwrap().get();
    assert!((before + 1..=before + threads + 1).contains(&upstream.connections()));
}

#[tokio::test]
async fn watches_take_further_connections_once_the_server_allows_no_more_streams() {
    // The stub allows 200 on one connection.
    const WATCHES: usize = 240;
    let front_end = FrontEnd::start(Setup { http2: true, ..Setup::default() }).await.unwrap();
    let upstream = &front_end.upstream;
    assert_eq!(get(&front_end).await, StatusCode::OK);
    let mut caller = front_end.caller(Credential::Token, Http::V2).await.unwrap();
    let mut watches = Vec::new();
    for i in 0..WATCHES {
        let watch = Request::get("/api/v1/pods?watch=1&resourceVersion=0").body(Full::<Bytes>::default());
        let response = completes("a watch", caller.send(watch.unwrap())).await.unwrap();
        assert_eq!(response.status(), StatusCode::OK, "watch {i}");
        watches.push(response.into_body());
    }
    let used: BTreeSet<usize> = upstream.received().iter().map(|received| received.connection).collect();
    assert!((2..=4).contains(&used.len()), "{used:?}");
    let event = json!({"metadata": {"name": "for-everyone", "namespace": "default"}});
    upstream.api().send(Kind::Pods, "ADDED", event);
    for watch in &mut watches {
        let mut read = Vec::new();
        while !String::from_utf8_lossy(&read).contains("for-everyone") {
            let frame = completes("the event", watch.frame()).await.unwrap().unwrap();
            read.extend_from_slice(&frame.into_data().unwrap());
        }
    }
}
