//! The front end answers proxy URLs itself: it decides who may use them, hides the caller from the target, and records
//! the request.

use std::sync::{Arc, Mutex};

use tests::{
    client::Stream,
    cluster::{Kind, SOON},
    front_end::{Credential, FrontEnd, Http, SAM, Setup, hear, role},
    process::{eventually, free_port},
};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpListener, TcpStream},
};

/// `sam` reads, the service account does everything, and nobody else anything.
fn roles() -> String {
    let rule = |verbs: &str| format!("apiGroups: [''], resources: [nodes/proxy], verbs: ['{verbs}']");
    let builder = "kind: ServiceAccount, name: builder, namespace: default";
    role("reader", &rule("get"), &[SAM]) + &role("operator", &rule("*"), &[builder])
}

/// The target on the node. It answers every request with `ok`, changes to another protocol when asked to, and sends
/// back what comes then.
struct Target {
    port: u16,
    heads: Arc<Mutex<Vec<String>>>,
}

impl Target {
    async fn start() -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let (port, heads) = (listener.local_addr().unwrap().port(), Arc::<Mutex<Vec<String>>>::default());
        let kept = heads.clone();
        tokio::spawn(async move {
            while let Ok((socket, _)) = listener.accept().await {
                tokio::spawn(serve(socket, kept.clone()));
            }
        });
        Self { port, heads }
    }

    fn url(&self, rest: &str) -> String {
        format!("/api/v1/nodes/http:n1:{}/proxy/{rest}", self.port)
    }

    /// In lower case, since the last time.
    fn heard(&self) -> Vec<String> {
        std::mem::take(&mut self.heads.lock().unwrap())
    }
}

async fn serve(mut socket: TcpStream, heads: Arc<Mutex<Vec<String>>>) {
    let mut read = Vec::new();
    while !read.ends_with(b"\r\n\r\n") {
        match socket.read_u8().await {
            Ok(byte) => read.push(byte),
            Err(_) => return,
        }
    }
    let head = String::from_utf8(read).unwrap().to_lowercase();
    let upgrades = head.contains("\r\nupgrade: ");
    heads.lock().unwrap().push(head);
    if !upgrades {
        let _ =
            socket.write_all(b"HTTP/1.1 200 OK\r\nConnection: close\r\nContent-Length: 2\r\n\r\nok").await;
        return;
    }
    let line = "HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\r\n";
    socket.write_all(line.as_bytes()).await.unwrap();
    let (mut read, mut write) = socket.split();
    let _ = tokio::io::copy(&mut read, &mut write).await;
}

async fn start(target: &Target) -> FrontEnd {
    let setup = Setup {
        lines: "  serve_proxy_urls: true\n".to_owned(),
        master_config: "proxy_urls: {}\n".to_owned(),
        nodes: vec![("n1".to_owned(), Kind::Dialled)],
        ports: vec![target.port],
        ..Setup::default()
    };
    let front_end = FrontEnd::start(setup).await.unwrap();
    front_end.replace("rbac.yaml", &roles()).unwrap();
    eventually("the new rules", SOON, async || {
        (ask(&front_end, Credential::Token, "GET", &target.url("ready"), "").await.0 == 200).then_some(())
    })
    .await;
    target.heard();
    front_end.upstream.take();
    front_end
}

/// The status, and the connection as it is then.
async fn ask(
    front_end: &FrontEnd,
    credential: Credential,
    method: &str,
    path: &str,
    lines: &str,
) -> (u16, Stream) {
    let mut stream = front_end.connect(credential, Http::V1).await.unwrap();
    let bearer = front_end.bearer(credential);
    let bearer = bearer.map(|token| format!("Authorization: Bearer {token}\r\n")).unwrap_or_default();
    let request = format!("{method} {path} HTTP/1.1\r\nHost: localhost\r\n{bearer}{lines}\r\n");
    stream.write_all(request.as_bytes()).await.unwrap();
    let heard = hear(&mut stream).await.unwrap().expect("an answer");
    (heard.status, stream)
}

#[tokio::test]
async fn who_may_do_what() {
    use Credential::{Bootstrap, Certificate, None, ServiceAccount, Token};
    let target = Target::start().await;
    let front_end = start(&target).await;
    let upgrade = "Connection: Upgrade\r\nUpgrade: websocket\r\n";
    let other = "Connection: Upgrade\r\nUpgrade: master-agent-link\r\n";
    let closed = format!("/api/v1/nodes/http:n1:{}/proxy/", free_port());
    let unknown = "/api/v1/nodes/n9/proxy/".to_owned();
    let (own, up) = (target.url("x?y=z"), target.url("../../n2/proxy/"));
    for (credential, method, path, lines, status, reaches) in [
        (Token, "GET", &own, "", 200, true),
        (Token, "POST", &own, "Content-Length: 0\r\n", 403, false),
        (Token, "DELETE", &own, "", 403, false),
        (Token, "BREW", &own, "", 403, false),
        // It is the same as create, whatever the method.
        (Token, "GET", &own, upgrade, 403, false),
        (ServiceAccount, "GET", &own, "", 200, true),
        (ServiceAccount, "POST", &own, "Content-Length: 0\r\n", 200, true),
        (ServiceAccount, "GET", &own, upgrade, 101, true),
        (ServiceAccount, "GET", &own, other, 400, false),
        (Certificate, "GET", &own, "", 403, false),
        (Bootstrap, "GET", &own, "", 403, false),
        (None, "GET", &own, "", 401, false),
        (Token, "GET", &up, "", 400, false),
        (Token, "GET", &closed, "", 403, false),
        (Token, "GET", &unknown, "", 404, false),
        (Token, "GET", &own, "Origin: https://evil.example\r\n", 403, false),
        (Token, "GET", &own, "Sec-Fetch-Site: cross-site\r\n", 403, false),
    ] {
        let case = format!("{credential:?} {method} {path} {lines:?}");
        assert_eq!(ask(&front_end, credential, method, path, lines).await.0, status, "{case}");
        assert_eq!(target.heard().len(), usize::from(reaches), "{case}");
    }
    assert!(front_end.upstream.take().is_empty(), "nothing of it is kube-apiserver's");
}

#[tokio::test]
async fn the_target_hears_nothing_of_who_asks() {
    let target = Target::start().await;
    let front_end = start(&target).await;
    let lines = "X-Remote-User: evil\r\nX_Remote_User: evil\r\nImpersonate-Extra-a: b\r\nX-Forwarded-For: 192.0.2.9\r\n\
                 Connection: X-Remote-Group\r\nX-Remote-Group: system:masters\r\nX-Kept: 1\r\n";
    // To act as somebody needs a right of its own, and is not passed on either.
    let (status, _) = ask(&front_end, Credential::Token, "GET", &target.url("a"), lines).await;
    assert_eq!((status, target.heard().len()), (400, 0));
    let lines = lines.replace("Impersonate-Extra-a: b\r\n", "");
    let (status, _) = ask(&front_end, Credential::Token, "GET", &target.url("b"), &lines).await;
    assert_eq!(status, 200);
    let [head] = &target.heard()[..] else { panic!("one request") };
    for hidden in ["authorization", "bearer", "sam", "evil", "masters", "x-remote", "x_remote", "192.0.2.9"] {
        assert!(!head.contains(hidden), "{hidden}: {head}");
    }
    assert!(
        head.contains("\r\nx-kept: 1\r\n") && head.contains("\r\nx-forwarded-for: 127.0.0.1\r\n"),
        "{head}"
    );
}

#[tokio::test]
async fn an_upgrade_is_carried_and_recorded() {
    let target = Target::start().await;
    let front_end = start(&target).await;
    let path = target.url("stream");
    let lines = "Connection: Upgrade\r\nUpgrade: websocket\r\n";
    let (status, mut stream) = ask(&front_end, Credential::ServiceAccount, "GET", &path, lines).await;
    assert_eq!(status, 101);
    stream.write_all(&[7; 100_000]).await.unwrap();
    let mut back = vec![0; 100_000];
    stream.read_exact(&mut back).await.unwrap();
    assert!(back.iter().all(|byte| *byte == 7));
    drop(stream);
    let record = front_end.audited(&path).await;
    for (field, expected) in [
        ("user", "system:serviceaccount:default:builder"),
        ("verb", "create"),
        ("resource", "nodes"),
        ("subresource", "proxy"),
        ("decision", "allow"),
        ("authorizer", "rbac"),
        ("node", "n1"),
    ] {
        assert_eq!(record[field], expected, "{field} of {record}");
    }
    assert_eq!(
        (&record["code"], &record["bytes_in"], &record["bytes_out"]),
        (&101.into(), &100_000.into(), &100_000.into())
    );
    // The stream's own record names the request.
    let id = record["id"].as_str().unwrap();
    let ended = eventually("the end of the stream is logged", SOON, async || {
        front_end
            .log()
            .lines()
            .find(|line| line.contains("stream ended") && line.contains(id))
            .map(str::to_owned)
    })
    .await;
    assert!(ended.contains("node=\"n1\""), "{ended}");
}
