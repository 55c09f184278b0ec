//! Heads, bodies and trailers pass through proxy URLs unchanged, and connections can be upgraded.

use bytes::Bytes;
use futures_util::{SinkExt, StreamExt};
use http_body_util::{BodyExt, StreamBody};
use hyper::{Method, body::Frame};
use tests::{kubelet_port, load::completes};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpListener,
    sync::mpsc,
};

use super::proxy_urls::{Site, head, one, request};

#[tokio::test]
async fn a_body_that_trickles_arrives_piece_by_piece_both_ways() {
    let site = Site::start().await;
    let listener = site.listen().await;
    let (up, pieces) = mpsc::unbounded_channel::<Result<Frame<Bytes>, std::convert::Infallible>>();
    let body = StreamBody::new(futures_util::stream::unfold(pieces, |mut pieces| async {
        pieces.recv().await.map(|piece| (piece, pieces))
    }));
    let sent = site.send(request(Method::POST, &site.own("/a"), BodyExt::boxed(body)));
    let target = async {
        let (head, mut socket) = one(&listener).await;
        assert!(
            head.starts_with("POST /a HTTP/1.1\r\n") && head.contains("transfer-encoding: chunked"),
            "{head}"
        );
        socket.write_all(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n").await.unwrap();
        socket
    };
    let (response, mut socket) = tokio::join!(sent, target);
    let mut body = response.into_body();
    // Each piece goes only after the one before has been seen at the other end.
    for i in 0..20 {
        let piece = format!("{i:05}");
        up.send(Ok(Frame::data(Bytes::from(piece.clone())))).unwrap();
        let mut seen = [0; 10];
        completes("a piece on its way up", socket.read_exact(&mut seen)).await.unwrap();
        assert_eq!(seen, format!("5\r\n{piece}\r\n").as_bytes());
        socket.write_all(&seen).await.unwrap();
        let frame = completes("a piece on its way down", body.frame()).await.unwrap().unwrap();
        assert_eq!(frame.into_data().unwrap(), piece.as_bytes());
    }
    drop(up);
    socket.write_all(b"0\r\n\r\n").await.unwrap();
    assert!(completes("the end", body.frame()).await.is_none());
}

#[tokio::test]
async fn websockets_are_relayed() {
    let site = Site::start().await;
    let listener = site.listen().await;
    tokio::spawn(async move {
        let (socket, _) = listener.accept().await.unwrap();
        let mut socket = tokio_tungstenite::accept_async(socket).await.unwrap();
        while let Some(Ok(message)) = socket.next().await {
            if socket.send(message).await.is_err() {
                break;
            }
        }
    });
    let url = format!("ws://localhost{}", site.own("/echo?x=%20y"));
    let handshake = tokio_tungstenite::client_async(url, site.unix().await);
    let (mut socket, response) = completes("a handshake", handshake).await.unwrap();
    assert_eq!(response.status(), 101);
    for i in 0..200 {
        let text = format!("{i}").repeat(i + 1);
        socket.send(text.as_str().into()).await.unwrap();
        let heard = completes("an echo", socket.next()).await.unwrap().unwrap();
        assert_eq!(heard.into_text().unwrap().as_str(), text);
    }
    socket.close(None).await.unwrap();
    while let Some(Ok(_)) = completes("the close", socket.next()).await {}
}

#[tokio::test]
async fn any_protocol_can_be_upgraded_to_over_tls_and_halves_close_alone() {
    let site = Site::start().await;
    let acceptor = site.pki.acceptor("spdy", &["n1"]);
    let _reserved = kubelet_port::reserve().await;
    let listener = TcpListener::bind(("127.0.0.1", kubelet_port::PORT)).await.unwrap();
    let target = tokio::spawn(async move {
        let (socket, _) = listener.accept().await.unwrap();
        let mut socket = acceptor.accept(socket).await.unwrap();
        let head = head(&mut socket).await;
        socket
            .write_all(
                b"HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: SPDY/3.1\r\n\r\nfirst",
            )
            .await
            .unwrap();
        let mut heard = Vec::new();
        // The caller's end is seen while the other direction stays open.
        socket.read_to_end(&mut heard).await.unwrap();
        socket.write_all(&heard).await.unwrap();
        socket.shutdown().await.unwrap();
        head
    });
    let mut socket = site.unix().await;
    socket
        .write_all(b"POST /api/v1/nodes/n1/proxy/exec/default/web/web?command=ls&stdin=1 HTTP/1.1\r\nHost: x\r\nConnection: Upgrade\r\nUpgrade: SPDY/3.1\r\nX-Stream-Protocol-Version: v4.channel.k8s.io\r\nAuthorization: Bearer secret\r\nContent-Length: 0\r\n\r\n")
        .await
        .unwrap();
    let answer = completes("101", head(&mut socket)).await;
    assert!(
        answer.starts_with("HTTP/1.1 101 ") && answer.to_lowercase().contains("upgrade: spdy/3.1"),
        "{answer}"
    );
    let mut first = [0; 5];
    completes("the first bytes", socket.read_exact(&mut first)).await.unwrap();
    assert_eq!(&first, b"first");
    let said: Vec<u8> = (0..=255).cycle().take(1_000_000).collect();
    socket.write_all(&said).await.unwrap();
    socket.shutdown().await.unwrap();
    let mut heard = Vec::new();
    completes("the echo", socket.read_to_end(&mut heard)).await.unwrap();
    assert!(heard == said, "{} bytes", heard.len());
    let head = target.await.unwrap();
    assert!(head.starts_with("POST /exec/default/web/web?command=ls&stdin=1 HTTP/1.1\r\n"), "{head}");
    let head = head.to_lowercase();
    assert!(
        head.contains("x-stream-protocol-version: v4.channel.k8s.io") && !head.contains("secret"),
        "{head}"
    );
}

/// Gives what a target receives of a request, and what the caller receives of a fixed answer.
async fn exchange(site: &Site, listener: &TcpListener, raw: &str, answer: &str) -> (String, String) {
    let mut socket = site.unix().await;
    socket.write_all(raw.as_bytes()).await.unwrap();
    let (got, mut target) = one(listener).await;
    target.write_all(answer.as_bytes()).await.unwrap();
    target.shutdown().await.unwrap();
    let mut heard = Vec::new();
    completes("an answer", socket.read_to_end(&mut heard)).await.unwrap();
    (got, String::from_utf8(heard).unwrap())
}

#[tokio::test]
async fn methods_paths_queries_and_headers_arrive_as_they_are() {
    let site = Site::start().await;
    let listener = site.listen().await;
    let rest = "/..%2f..%2Fetc/%20a;b=c//d/./e?x=%2F&y=a+b&&z";
    for method in ["GET", "PUT", "PATCH", "DELETE", "OPTIONS", "PROPFIND", "X-OWN"] {
        let raw = format!(
            "{method} {} HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer secret\r\nCookie: a=b\r\n\
             X-Own: 1\r\nX-Hop: 2\r\nConnection: close, X-Hop\r\n\r\n",
            site.own(rest)
        );
        let (got, heard) = exchange(
            &site,
            &listener,
            &raw,
            "HTTP/1.1 299 Fine\r\nX-Target: 1\r\nKeep-Alive: 5\r\nLocation: /login/\r\nSet-Cookie: c=d\r\n\r\nbody",
        )
        .await;
        assert!(got.starts_with(&format!("{method} {rest} HTTP/1.1\r\n")), "{got}");
        let head = got.to_lowercase();
        for line in [
            "cookie: a=b".to_owned(),
            "x-own: 1".to_owned(),
            "connection: close".to_owned(),
            format!("host: n1:{}", site.port),
            "x-forwarded-host: localhost".to_owned(),
            "x-forwarded-proto: http".to_owned(),
            format!("x-forwarded-uri: {}", site.own(rest.split('?').next().unwrap()).to_lowercase()),
        ] {
            assert_eq!(head.matches(&format!("\r\n{line}\r\n")).count(), 1, "{line}:\n{got}");
        }
        assert!(!got.contains("secret") && !head.contains("x-hop"), "{got}");
        let head = heard.to_lowercase();
        assert!(heard.starts_with("HTTP/1.1 299 ") && heard.contains("body"), "{heard}");
        let location = format!("location: {}\r\n", site.own("/login/"));
        assert!(
            head.contains("x-target: 1") && head.contains("set-cookie: c=d") && head.contains(&location),
            "{heard}"
        );
        assert!(!head.contains("keep-alive"), "{heard}");
    }
}

#[tokio::test]
async fn trailers_pass_both_ways() {
    let site = Site::start().await;
    let listener = site.listen().await;
    let mut socket = site.unix().await;
    let raw = format!(
        "POST {} HTTP/1.1\r\nHost: localhost\r\nTE: trailers\r\nConnection: TE\r\nTransfer-Encoding: chunked\r\nTrailer: X-Up\r\n\r\n2\r\nhi\r\n0\r\nX-Up: 1\r\n\r\n",
        site.own("/")
    );
    socket.write_all(raw.as_bytes()).await.unwrap();
    let (got, mut target) = one(&listener).await;
    assert!(got.to_lowercase().contains("te: trailers"), "{got}");
    let body = completes("a body with trailers", head(&mut target)).await.to_lowercase();
    assert_eq!(body, "2\r\nhi\r\n0\r\nx-up: 1\r\n\r\n");
    let answer = "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\nTrailer: X-Down\r\n\r\n2\r\nho\r\n0\r\nX-Down: 2\r\n\r\n";
    target.write_all(answer.as_bytes()).await.unwrap();
    let answer = completes("a head", head(&mut socket)).await.to_lowercase();
    assert!(answer.contains("trailer: x-down"), "{answer}");
    let body = completes("a body with trailers", head(&mut socket)).await.to_lowercase();
    assert_eq!(body, "2\r\nho\r\n0\r\nx-down: 2\r\n\r\n");
}
