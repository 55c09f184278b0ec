//! Servers behind the front end learn who a caller is under the configured names, and from the front end alone,
//! whatever the caller's head and trailers say.

use std::sync::{Arc, Mutex};

use bytes::Bytes;
use tests::{
    cluster::{Kind, SOON},
    front_end::{Credential, FrontEnd, Http, SAM, Setup, TOKEN, hear, role},
    h2::{Answer, Connection, DATA, END_HEADERS, END_STREAM, Frame, HEADERS, block},
    process::eventually,
    upstream::Received,
};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpListener, TcpStream},
};

/// In every value that a caller makes up.
const EVIL: &str = "evil";

/// Headers that no caller may set, in lower case as HTTP/2 has them.
const CLAIMS: [&str; 28] = [
    "x-remote-user",
    "x_remote_user",
    "x-remote_user",
    "x.remote.user",
    "x~remote~user",
    "x-remote-group",
    "x_remote_group",
    "x-remote-uid",
    "x-remote-extra-scopes",
    "x_remote_extra_scopes",
    "x-kube-user",
    "x_kube_user",
    "x-kube_user",
    "x.kube.user",
    "x-old-user",
    "x_old_user",
    "x-kube-uid",
    "x-kube-group",
    "x_kube_group",
    "x-kube-extra-scopes",
    "x_kube_extra_scopes",
    "x-forwarded-user",
    "x_forwarded_user",
    "x-forwarded-groups",
    "x-forwarded-email",
    "x-forwarded-preferred-username",
    "x-forwarded-access-token",
    "x-auth-request-user",
];

const NAMES: &str = ", requestheader_username_headers: [X-Kube-User, X-Old-User], requestheader_uid_headers: [X-Kube-Uid], \
     requestheader_group_headers: [X-Kube-Group], requestheader_extra_headers_prefix: [X-Kube-Extra-]";

fn lines(names: &[&str]) -> String {
    names.iter().map(|name| format!("{name}: {EVIL}\r\n")).collect()
}

/// A POST over HTTP/1.1 that makes every claim in its head and in its trailers, and names them all in `Connection`.
fn forged_http1(path: &str) -> Vec<u8> {
    let names = CLAIMS.join(", ");
    let claims = lines(&CLAIMS);
    format!(
        "POST {path} HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer {TOKEN}\r\n{claims}Connection: TE, {names}\r\n\
         Connection: X-Kube-User, x-kube-group, X-Forwarded-For\r\nTE: trailers\r\nX-Kept: 1\r\n\
         Transfer-Encoding: chunked\r\nTrailer: X-Sum, {names}\r\n\r\n5\r\nhello\r\n0\r\nX-Sum: 2\r\n{claims}\r\n"
    )
    .into_bytes()
}

/// The same over HTTP/2, which has no `Connection`.
async fn send_forged_http2(front_end: &FrontEnd, path: &str) -> u16 {
    let stream = front_end.connect(Credential::None, Http::V2).await.unwrap();
    let mut connection = Connection::start(stream).await.unwrap();
    let bearer = format!("Bearer {TOKEN}");
    let names = CLAIMS.join(", ");
    let mut fields = vec![
        (":method", "POST"),
        (":scheme", "https"),
        (":authority", "localhost"),
        (":path", path),
        ("authorization", &bearer),
        ("te", "trailers"),
        ("trailer", &names),
        ("x-kept", "1"),
    ];
    fields.extend(CLAIMS.map(|name| (name, EVIL)));
    let trailers: Vec<_> = CLAIMS.into_iter().map(|name| (name, EVIL)).chain([("x-sum", "2")]).collect();
    for frame in [
        Frame::new(HEADERS, END_HEADERS, 1, block(&fields)),
        Frame::new(DATA, 0, 1, Bytes::from_static(b"hello")),
        Frame::new(HEADERS, END_HEADERS | END_STREAM, 1, block(&trailers)),
    ] {
        connection.send(&frame).await.unwrap();
    }
    match connection.answer(1).await.unwrap() {
        Answer::Response(response) => response.status,
        other => panic!("{other:?}"),
    }
}

async fn send_forged(front_end: &FrontEnd, http: Http, path: &str) -> u16 {
    if http == Http::V2 {
        return send_forged_http2(front_end, path).await;
    }
    let mut stream = front_end.connect(Credential::None, Http::V1).await.unwrap();
    stream.write_all(&forged_http1(path)).await.unwrap();
    stream.flush().await.unwrap();
    hear(&mut stream).await.unwrap().expect("an answer").status
}

/// All statements about the caller, in headers and trailers.
fn said(received: &Received) -> Vec<String> {
    let of_identity = |name: &str| ["kube", "remote", "old", "auth"].iter().any(|part| name.contains(part));
    let all = received.headers.iter().chain(&received.trailers);
    let mut said: Vec<_> =
        all.filter(|(name, _)| of_identity(name)).map(|(name, value)| format!("{name}: {value}")).collect();
    said.sort();
    said
}

#[tokio::test]
async fn kube_apiserver_hears_of_nobody_but_the_caller_under_the_names_that_it_reads() {
    for http2 in [false, true] {
        let setup = Setup { upstream: NAMES, http2, ..Setup::default() };
        let front_end = FrontEnd::start(setup).await.unwrap();
        for http in [Http::V1, Http::V2] {
            assert_eq!(send_forged(&front_end, http, "/echo").await, 200, "{http:?}");
            let [received] = &front_end.upstream.take()[..] else { panic!("one request") };
            let expected = [
                "x-kube-group: group1",
                "x-kube-group: group2",
                "x-kube-group: system:authenticated",
                "x-kube-uid: uid-7",
                "x-kube-user: sam",
            ];
            assert_eq!(said(received), expected, "{http:?} {received:?}");
            let shown = format!("{received:?}");
            assert!(!shown.contains(EVIL) && received.trailers.is_empty(), "{shown}");
            assert_eq!((received.header("x-kept"), &received.body[..]), (vec!["1"], &b"hello"[..]));
        }
    }
}

/// The target on the node. It keeps each request as it came, to the end of its trailers.
async fn target() -> (u16, Arc<Mutex<Vec<String>>>) {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let (port, requests) = (listener.local_addr().unwrap().port(), Arc::<Mutex<Vec<String>>>::default());
    let kept = requests.clone();
    tokio::spawn(async move {
        while let Ok((socket, _)) = listener.accept().await {
            tokio::spawn(serve(socket, kept.clone()));
        }
    });
    (port, requests)
}

async fn serve(mut socket: TcpStream, requests: Arc<Mutex<Vec<String>>>) {
    let mut read = Vec::new();
    // A chunked body ends as a head does.
    let ends = |read: &[u8]| read.windows(4).filter(|bytes| *bytes == b"\r\n\r\n").count();
    let chunked = |read: &[u8]| String::from_utf8_lossy(read).to_lowercase().contains("chunked");
    while ends(&read) == 0 || chunked(&read) && ends(&read) == 1 {
        match socket.read_u8().await {
            Ok(byte) => read.push(byte),
            Err(_) => return,
        }
    }
    requests.lock().unwrap().push(String::from_utf8(read).unwrap().to_lowercase());
    let _ = socket.write_all(b"HTTP/1.1 200 OK\r\nConnection: close\r\nContent-Length: 2\r\n\r\nok").await;
}

#[tokio::test]
async fn a_proxied_target_hears_of_nobody_in_heads_and_trailers() {
    let (port, requests) = target().await;
    let setup = Setup {
        lines: "  serve_proxy_urls: true\n".to_owned(),
        master_config: "proxy_urls: {}\n".to_owned(),
        nodes: vec![("n1".to_owned(), Kind::Dialled)],
        ports: vec![port],
        upstream: NAMES,
        ..Setup::default()
    };
    let front_end = FrontEnd::start(setup).await.unwrap();
    front_end
        .replace("rbac.yaml", &role("all", "apiGroups: [''], resources: [nodes/proxy], verbs: ['*']", &[SAM]))
        .unwrap();
    let path = format!("/api/v1/nodes/http:n1:{port}/proxy/a");
    eventually("the new rules", SOON, async || {
        (send_forged(&front_end, Http::V1, &path).await == 200).then_some(())
    })
    .await;
    requests.lock().unwrap().clear();
    for http in [Http::V1, Http::V2] {
        assert_eq!(send_forged(&front_end, http, &path).await, 200, "{http:?}");
        let heard = std::mem::take(&mut *requests.lock().unwrap());
        let [request] = &heard[..] else { panic!("one request: {heard:?}") };
        for hidden in [
            EVIL,
            "sam",
            TOKEN,
            "remote",
            "kube",
            "x-old",
            "forwarded-user",
            "forwarded_user",
            "auth-request",
        ] {
            assert!(!request.contains(hidden), "{http:?} {hidden}: {request}");
        }
        assert!(request.contains("\r\nx-kept: 1\r\n") && request.contains("hello"), "{request}");
        assert!(request.contains("\r\nx-forwarded-for: 127.0.0.1\r\n"), "{request}");
    }
}
