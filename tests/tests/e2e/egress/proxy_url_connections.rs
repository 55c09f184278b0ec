//! Connections behind proxy URLs are bounded in time, and end together with those who use them.

use std::time::Duration;

use http_body_util::BodyExt;
use hyper::client::conn::http1;
use hyper_util::rt::TokioIo;
use tests::{cluster::SOON, load::completes, process::eventually, steady::Health};
use tokio::io::{AsyncReadExt, AsyncWriteExt};

use super::proxy_urls::{Site, get, head, one};

#[tokio::test]
async fn slow_large_and_idle_heads_end() {
    let site =
        Site::start_with("  head_timeout: 500ms\n  idle_timeout: 3s").await.with_kubelet(&["n1"]).await;
    let health = Health::of(&site.cluster.master);
    let start = b"GET /api/v1/nodes/n1/proxy/healthz HTTP/1.1\r\nHost: x\r\n";
    // The callers send nothing, a part of a head, and a line now and then.
    for said in [&b""[..], b"GET /", start] {
        let mut socket = site.unix().await;
        socket.write_all(said).await.unwrap();
        let _ = completes("the end", socket.read_to_end(&mut Vec::new())).await;
    }
    let mut socket = site.unix().await;
    socket.write_all(start).await.unwrap();
    eventually("the slow one is cut off", SOON, async || {
        tokio::time::sleep(Duration::from_millis(50)).await;
        socket.write_all(b"X: y\r\n").await.is_err().then_some(())
    })
    .await;
    // A kept connection may wait for longer than a head, between requests.
    let mut socket = site.unix().await;
    for _ in 0..3 {
        socket.write_all(&[&start[..], b"\r\n"].concat()).await.unwrap();
        assert!(head(&mut socket).await.starts_with("HTTP/1.1 200 "));
        let mut ok = [0; 2];
        socket.read_exact(&mut ok).await.unwrap();
        tokio::time::sleep(Duration::from_millis(800)).await;
    }
    socket.write_all(start).await.unwrap();
    let _ = completes("the end of a slow later head", socket.read_to_end(&mut Vec::new())).await;
    for more in ["X: y\r\n".repeat(200), format!("X: {}\r\n", "y".repeat(200_000))] {
        let mut socket = site.unix().await;
        let raw = [&start[..], more.as_bytes(), b"\r\n"].concat();
        // It may be refused in the middle.
        let _ = socket.write_all(&raw).await;
        let mut answer = Vec::new();
        let _ = completes("the end", socket.read_to_end(&mut answer)).await;
        assert!(
            answer.is_empty() || answer.starts_with(b"HTTP/1.1 431 "),
            "{}",
            String::from_utf8_lossy(&answer)
        );
    }
    health.check(20_000_000).await;
}

#[tokio::test]
async fn who_leaves_takes_the_target_along_and_what_is_cut_short_does_not_look_whole() {
    let site = Site::start().await;
    let listener = site.listen().await;
    let raw = format!("GET {} HTTP/1.1\r\nHost: x\r\n\r\n", site.own("/follow"));
    for answer in [
        "",
        "HTTP/1.1 200 OK\r\n\r\nfirst\n",
        "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n1\r\na\r\n",
    ] {
        let mut socket = site.unix().await;
        socket.write_all(raw.as_bytes()).await.unwrap();
        let (_, mut target) = one(&listener).await;
        target.write_all(answer.as_bytes()).await.unwrap();
        if !answer.is_empty() {
            head(&mut socket).await;
        }
        drop(socket);
        // A reset is an end, too.
        let _ = completes("the target's end", target.read_to_end(&mut Vec::new())).await;
    }
    // Without a length, the end of the connection is the end of the body: unless it was no end in order.
    let mut response = {
        let sent = site.send(get(&site.own("/")));
        let target = async {
            let (_, mut target) = one(&listener).await;
            target.write_all(b"HTTP/1.1 200 OK\r\n\r\nhalf").await.unwrap();
            target
        };
        let (response, target) = tokio::join!(sent, target);
        let mut response = response.into_body();
        let half = completes("a half", response.frame()).await.unwrap().unwrap();
        assert_eq!(half.into_data().unwrap(), &b"half"[..]);
        socket2::SockRef::from(&target).set_linger(Some(Duration::ZERO)).unwrap();
        response
    };
    assert!(completes("an error", response.frame()).await.unwrap().is_err());
}

#[tokio::test]
async fn thousands_of_requests_leave_nothing() {
    let site = Site::start().await.with_kubelet(&["n1"]).await;
    let kept = async |path: String, requests: usize| {
        let (mut sender, connection) = http1::handshake(TokioIo::new(site.unix().await)).await.unwrap();
        tokio::spawn(connection);
        for _ in 0..requests {
            sender.ready().await.unwrap();
            let response = sender.send_request(get(&path)).await.unwrap();
            response.into_body().collect().await.unwrap();
        }
    };
    let (good, bad) = ("/api/v1/nodes/n1/proxy/healthz".to_owned(), "/api/v1/nodes/n9/proxy/".to_owned());
    completes("a warm-up", kept(good.clone(), 300)).await;
    let master = Health::of(&site.cluster.master);
    let node = Health::of(site.cluster.nodes[0].process.as_ref().unwrap());
    for _ in 0..4 {
        completes("requests", async {
            tokio::join!(kept(good.clone(), 400), kept(good.clone(), 400), kept(bad.clone(), 400))
        })
        .await;
        for _ in 0..100 {
            completes("one that leaves", async {
                let mut socket = site.unix().await;
                let raw = "GET /api/v1/nodes/n1/proxy/bytes/1000000 HTTP/1.1\r\nHost: x\r\n\r\n";
                socket.write_all(raw.as_bytes()).await.unwrap();
                socket.read_u8().await.unwrap();
            })
            .await;
        }
    }
    master.check(10_000_000).await;
    node.check(10_000_000).await;
}

#[tokio::test]
async fn an_idle_connection_does_not_hold_up_the_end() {
    let mut site = Site::start().await.with_kubelet(&["n1"]).await;
    let mut socket = site.unix().await;
    socket.write_all(b"GET /api/v1/nodes/n1/proxy/healthz HTTP/1.1\r\nHost: x\r\n\r\n").await.unwrap();
    assert!(head(&mut socket).await.starts_with("HTTP/1.1 200 "));
    site.cluster.master.signal("TERM");
    assert_eq!(site.cluster.master.wait(SOON).unwrap(), Some(0));
    let log = site.cluster.master.log_text();
    assert!(log.contains("cut=0"), "{log}");
}

#[tokio::test]
async fn a_target_that_has_ended_takes_a_silent_caller_along() {
    let site = Site::start_with("  half_closed_timeout: 1s").await;
    let health = Health::of(&site.cluster.master);
    let node = Health::of(site.cluster.nodes[0].process.as_ref().unwrap());
    let listener = site.listen().await;
    let mut kept = Vec::new();
    for _ in 0..5 {
        let mut socket = site.unix().await;
        let path = site.own("/");
        let raw = format!("GET {path} HTTP/1.1\r\nHost: x\r\nConnection: Upgrade\r\nUpgrade: own\r\n\r\n");
        socket.write_all(raw.as_bytes()).await.unwrap();
        let (_, mut target) = one(&listener).await;
        let answer = "HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: own\r\n\r\nlast";
        target.write_all(answer.as_bytes()).await.unwrap();
        head(&mut socket).await;
        target.shutdown().await.unwrap();
        let mut last = Vec::new();
        completes("the target's end", socket.read_to_end(&mut last)).await.unwrap();
        assert_eq!(last, b"last");
        // A reset is an end, too.
        let _ = completes("the end at the target", target.read_to_end(&mut Vec::new())).await;
        kept.push(socket);
    }
    // The callers neither say anything nor leave.
    health.check(20_000_000).await;
    node.check(20_000_000).await;
    for mut socket in kept {
        assert!(socket.write_all(b"x").await.is_err());
    }
}

#[tokio::test]
async fn a_body_that_stalls_is_cut_and_one_whose_response_has_begun_is_not() {
    let site = Site::start_with("  idle_timeout: 1s").await;
    let health = Health::of(&site.cluster.master);
    let listener = site.listen().await;
    let path = site.own("/");
    for (body, seen) in [
        ("Content-Length: 9\r\n\r\nhalf", "half"),
        ("Transfer-Encoding: chunked\r\n\r\n4\r\nhalf\r\n", "4\r\nhalf\r\n"),
    ] {
        let mut socket = site.unix().await;
        socket.write_all(format!("POST {path} HTTP/1.1\r\nHost: x\r\n{body}").as_bytes()).await.unwrap();
        let (_, mut target) = one(&listener).await;
        let mut answer = String::new();
        completes("an answer, and the end", socket.read_to_string(&mut answer)).await.unwrap();
        assert!(
            answer.starts_with("HTTP/1.1 408 ")
                && answer.contains("no bytes of the request's body have arrived for 1s"),
            "{answer}"
        );
        let mut got = Vec::new();
        // A reset is an end, too.
        let _ = completes("the end at the target", target.read_to_end(&mut got)).await;
        assert_eq!(String::from_utf8(got).unwrap(), seen);
    }
    health.check(20_000_000).await;

    let mut socket = site.unix().await;
    let raw = format!("POST {path} HTTP/1.1\r\nHost: x\r\nContent-Length: 8\r\n\r\nhalf");
    socket.write_all(raw.as_bytes()).await.unwrap();
    let (_, mut target) = one(&listener).await;
    target.write_all(b"HTTP/1.1 200 OK\r\nContent-Length: 8\r\n\r\n").await.unwrap();
    head(&mut socket).await;
    let mut heard = [0; 8];
    tokio::time::sleep(Duration::from_secs(2)).await;
    socket.write_all(b"+end").await.unwrap();
    completes("the body", target.read_exact(&mut heard)).await.unwrap();
    assert_eq!(&heard, b"half+end");
    target.write_all(&heard).await.unwrap();
    completes("the response", socket.read_exact(&mut heard)).await.unwrap();
    assert_eq!(&heard, b"half+end");
}
