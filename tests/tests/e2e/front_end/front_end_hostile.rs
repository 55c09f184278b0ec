//! Callers that hold on to connections, seats and watches, or get no answer, take nothing from other callers.

use bytes::Bytes;
use futures_util::future::join_all;
use http_body_util::Full;
use hyper::{Request, StatusCode, header};
use tests::{
    apiserver::Kind,
    cluster::SOON,
    front_end::{Credential, FrontEnd, GREEDY, Http, Setup},
    h2,
    load::completes,
    process::eventually,
};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpSocket,
    task::JoinSet,
};

const ATTACKER: [u8; 4] = [127, 0, 0, 7];

/// The status of one request on a connection of its own.
async fn status(front_end: &FrontEnd, credential: Credential, bearer: Option<&str>) -> u16 {
    let bearer = bearer.map(str::to_owned).or_else(|| front_end.bearer(credential));
    let Ok(mut caller) = front_end.caller_with(credential, bearer, Http::V1).await else { return 0 };
    let request = Request::get("/echo").body(Full::<Bytes>::default()).unwrap();
    caller.ask(request).await.map_or(0, |answer| answer.status.as_u16())
}

#[tokio::test]
async fn one_address_has_so_many_connections_and_no_more() {
    let limits = Some("{max_connections_per_address: 50, max_connections: 80}".to_owned());
    let front_end = FrontEnd::start(Setup { limits, ..Setup::default() }).await.unwrap();
    let mut open = Vec::new();
    for _ in 0..50 {
        open.push(front_end.connect_from(ATTACKER, Credential::None, Http::V1).await.unwrap());
    }
    for _ in 0..5 {
        assert!(front_end.connect_from(ATTACKER, Credential::None, Http::V1).await.is_err());
    }
    assert_eq!(status(&front_end, Credential::Token, None).await, 200, "another address is served");
    let mut others = Vec::new();
    while let Ok(stream) = front_end.connect_from([127, 0, 0, 8], Credential::None, Http::V1).await {
        others.push(stream);
        assert!(others.len() <= 30, "more than max_connections");
    }
    assert!(others.len() >= 29, "{}", others.len());
    drop((open, others));
    eventually("the places are free again", SOON, async || {
        front_end.connect_from(ATTACKER, Credential::None, Http::V1).await.ok()
    })
    .await;
}

#[tokio::test]
async fn one_user_who_takes_all_does_not_keep_another_out() {
    let limits =
        "{max_in_flight: 20, max_in_flight_per_user: 10, queue_per_user: 5, queue_timeout: 1m}".to_owned();
    for http in [Http::V1, Http::V2] {
        let setup = Setup { limits: Some(limits.clone()), ..Setup::default() };
        let front_end = FrontEnd::start(setup).await.unwrap();
        front_end.upstream.hold(true);
        let mut greedy = JoinSet::new();
        for _ in 0..40 {
            let bearer = Some(GREEDY.to_owned());
            let mut caller = front_end.caller_with(Credential::None, bearer, http).await.unwrap();
            greedy.spawn(async move { caller.get("/greedy").await.unwrap() });
        }
        // Those for whom there is neither a seat nor a place in the queue are told at once.
        for _ in 0..25 {
            let answer = completes("429", greedy.join_next()).await.unwrap().unwrap();
            assert_eq!(answer.status, StatusCode::TOO_MANY_REQUESTS, "{answer:?}");
            let retry = answer.headers.get(header::RETRY_AFTER).and_then(|value| value.to_str().ok());
            assert!(
                retry.is_some_and(|seconds| (1..60).contains(&seconds.parse::<u32>().unwrap())),
                "{retry:?}"
            );
            assert_eq!(answer.json()["reason"], "TooManyRequests", "{answer:?}");
        }
        eventually("ten are served", SOON, async || (front_end.upstream.waiting() == 10).then_some(())).await;
        // Another user's requests pass all of that, as kube-apiserver sees.
        let mut others = JoinSet::new();
        for _ in 0..5 {
            let mut caller = front_end.caller(Credential::Token, http).await.unwrap();
            others.spawn(async move { caller.get("/other").await.unwrap() });
        }
        eventually("the other is served", SOON, async || (front_end.upstream.waiting() == 15).then_some(()))
            .await;
        front_end.upstream.hold(false);
        let mut left = others.join_all().await;
        left.extend(greedy.join_all().await);
        assert_eq!(left.len(), 20);
        assert!(left.iter().all(|answer| answer.status == StatusCode::OK), "{left:?}");
    }
}

#[tokio::test]
async fn one_user_has_so_many_watches_and_another_has_their_own() {
    let limits = Some("{long_running_per_user: 5, max_in_flight: 4, max_in_flight_per_user: 2}".to_owned());
    let front_end = FrontEnd::start(Setup { limits, ..Setup::default() }).await.unwrap();
    let api = front_end.upstream.api();
    let watch = async |credential, bearer: Option<&str>| {
        let bearer = bearer.map(str::to_owned).or_else(|| front_end.bearer(credential));
        let mut caller = front_end.caller_with(credential, bearer, Http::V1).await.unwrap();
        let request = Request::get("/api/v1/pods?watch=1&resourceVersion=239").body(Full::default()).unwrap();
        let response = caller.send(request).await.unwrap();
        (response.status(), response, caller)
    };
    let mut open = Vec::new();
    for _ in 0..5 {
        open.push(watch(Credential::None, Some(GREEDY)).await);
    }
    assert!(open.iter().all(|(status, ..)| *status == StatusCode::OK));
    assert_eq!(watch(Credential::None, Some(GREEDY)).await.0, StatusCode::TOO_MANY_REQUESTS);
    open.push(watch(Credential::Token, None).await);
    assert_eq!((open[5].0, api.watches(Kind::Pods)), (StatusCode::OK, 6));
    // Watches take no seats of requests.
    assert_eq!(status(&front_end, Credential::None, Some(GREEDY)).await, 200);
    open.clear();
    eventually("the watches are over", SOON, async || (api.watches(Kind::Pods) == 0).then_some(())).await;
    eventually("there is room for a watch", SOON, async || {
        (watch(Credential::None, Some(GREEDY)).await.0 == StatusCode::OK).then_some(())
    })
    .await;
}

#[tokio::test]
async fn requests_that_kube_apiserver_does_not_answer_end() {
    let limits = Some("{request_timeout: 1s}".to_owned());
    let front_end = FrontEnd::start(Setup { limits, ..Setup::default() }).await.unwrap();
    front_end.upstream.hold(true);
    for http in [Http::V1, Http::V2] {
        let mut caller = front_end.caller(Credential::Token, http).await.unwrap();
        let answer = completes("an answer", caller.get("/echo")).await.unwrap();
        assert_eq!((answer.status, &answer.json()["kind"]), (StatusCode::GATEWAY_TIMEOUT, &"Status".into()));
    }
    // The requests are given up at kube-apiserver as well.
    eventually("nothing waits", SOON, async || (front_end.upstream.waiting() == 0).then_some(())).await;
    // Callers that leave take their requests with them.
    let callers: Vec<_> = join_all((0..10).map(|_| front_end.caller(Credential::Token, Http::V2))).await;
    let asking: Vec<_> = callers
        .into_iter()
        .map(|caller| {
            let mut caller = caller.unwrap();
            tokio::spawn(async move { caller.get("/echo").await })
        })
        .collect();
    eventually("ten wait", SOON, async || (front_end.upstream.waiting() == 10).then_some(())).await;
    asking.iter().for_each(tokio::task::JoinHandle::abort);
    eventually("nothing waits", SOON, async || (front_end.upstream.waiting() == 0).then_some(())).await;
}

/// TLS as it must be: no old version, no certificate for the asking, no plain HTTP.
#[tokio::test]
async fn what_is_no_tls_hears_nothing() {
    let front_end = FrontEnd::start(Setup::default()).await.unwrap();
    for bytes in [
        &b"GET / HTTP/1.1\r\nHost: api\r\n\r\n"[..],
        h2::PREFACE,
        b"SSH-2.0-x\r\n",
        b"\x16\x03\x01\xff\xff\x01",
        // A ClientHello of TLS 1.0.
        b"\x16\x03\x01\x00\x2f\x01\x00\x00\x2b\x03\x01aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa\x00\x00\x04\x00\x2f\x00\x35\x01\x00",
    ] {
        let socket = TcpSocket::new_v4().unwrap();
        let mut socket = socket.connect(front_end.address).await.unwrap();
        socket.write_all(bytes).await.unwrap();
        let mut heard = Vec::new();
        let _ = completes("the end", socket.read_to_end(&mut heard)).await;
        // The answer is a TLS alert at most.
        assert!(heard.is_empty() || (heard.len() <= 7 && heard[0] == 0x15), "{heard:?}");
    }
    assert_eq!(front_end.upstream.received().len(), 0);
}
