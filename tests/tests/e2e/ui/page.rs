//! The page on the admin address is shown to those who may see it, and holds in a real browser.

use std::{net::SocketAddr, process::Command};

use bytes::Bytes;
use http_body_util::{BodyExt, Full};
use hyper::Request;
use tests::{
    browser::{drive, screenshots},
    cluster::{Cluster, Kind, Options, SOON, binary},
    figures,
    front_end::{Credential, FrontEnd, Http, Setup},
    process::{Process, eventually, free_port},
};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpStream, UnixStream},
};

fn local(port: u16) -> SocketAddr {
    SocketAddr::from(([127, 0, 0, 1], port))
}

struct Answer {
    status: u16,
    head: String,
    body: String,
}

impl Answer {
    fn header(&self, name: &str) -> Option<&str> {
        self.head.lines().find_map(|line| {
            let (found, value) = line.split_once(": ")?;
            found.eq_ignore_ascii_case(name).then_some(value)
        })
    }
}

/// Sends a request with these lines of its head; nothing is added but `Connection: close`.
async fn ask<S>(mut socket: S, line: &str, head: &[&str], body: &[u8]) -> Answer
where
    S: tokio::io::AsyncRead + tokio::io::AsyncWrite + Unpin,
{
    let lines: String = head.iter().map(|line| format!("{line}\r\n")).collect();
    let length = format!("Content-Length: {}\r\n", body.len());
    let text = format!("{line} HTTP/1.1\r\n{lines}{length}Connection: close\r\n\r\n");
    socket.write_all(text.as_bytes()).await.unwrap();
    // Whoever refuses need not read it all.
    let _ = socket.write_all(body).await;
    let mut answer = Vec::new();
    let _ = socket.read_to_end(&mut answer).await;
    let answer = String::from_utf8(answer).unwrap();
    let (head, body) = answer.split_once("\r\n\r\n").expect("an answer");
    let status = head.split(' ').nth(1).unwrap().parse().unwrap();
    Answer { status, head: head.to_owned(), body: body.to_owned() }
}

/// A master with its page, and who asks.
struct Site {
    cluster: Cluster,
    host: String,
}

impl Site {
    async fn start(options: Options) -> Self {
        let cluster = Cluster::start(Options { admin: ", page: true", ..options }).await.unwrap();
        let host = format!("Host: {}", cluster.admin);
        Self { cluster, host }
    }

    async fn ask(&self, line: &str, head: &[&str], body: &str) -> Answer {
        let socket = TcpStream::connect(self.cluster.admin).await.unwrap();
        ask(socket, line, head, body.as_bytes()).await
    }

    async fn told(&self, line: &str, body: &[u8]) -> Answer {
        let socket = UnixStream::connect(self.cluster.path().join("admin.sock")).await.unwrap();
        ask(socket, line, &["Host: x"], body).await
    }

    /// The path of a login, with its token.
    fn invitation(&self) -> String {
        let url = self.cluster.command(&["page"]).unwrap();
        url.trim().strip_prefix(&format!("http://{}", self.cluster.admin)).unwrap().to_owned()
    }

    /// The line of a cookie that is a session.
    async fn login(&self) -> String {
        let answer = self.ask(&format!("GET {}", self.invitation()), &[&self.host], "").await;
        assert_eq!((answer.status, answer.header("location")), (303, Some("./")));
        let cookie = answer.header("set-cookie").unwrap();
        let name = format!("master-agent-{}=", self.cluster.admin.port());
        assert!(cookie.starts_with(&name), "{cookie}");
        for part in ["; Path=/page/", "; HttpOnly", "; SameSite=Strict", "; Max-Age=43200"] {
            assert!(cookie.contains(part), "{cookie}");
        }
        format!("Cookie: other=x; {}", cookie.split(';').next().unwrap())
    }

    async fn statuses(&self, rows: &[(&str, &[&str], u16)]) {
        for (line, head, status) in rows {
            let answer = self.ask(line, head, "n1:1").await;
            assert_eq!(answer.status, *status, "{line} {head:?}: {}{}", answer.head, answer.body);
            let policy = answer.header("content-security-policy").unwrap();
            assert!(policy.starts_with("default-src 'none'; "), "{line}: {policy}");
            for (name, value) in [
                ("x-content-type-options", "nosniff"),
                ("referrer-policy", "no-referrer"),
                ("cache-control", "no-store"),
                ("x-frame-options", "DENY"),
                ("cross-origin-resource-policy", "same-origin"),
            ] {
                assert_eq!(answer.header(name), Some(value), "{line}");
            }
        }
    }
}

const ASSETS: [&str; 4] = ["", "page.css", "page.js", "icon.svg"];

#[tokio::test]
async fn the_page_is_for_whoever_has_a_session() {
    let site = Site::start(Options::default()).await;
    let host = &*site.host;
    let port = site.cluster.admin.port();
    for path in ASSETS.iter().chain(&["events", "nodes/n1", "comparison.json", "comparison.html", "nowhere"])
    {
        let line = format!("GET /page/{path}");
        let answer = site.ask(&line, &[host], "").await;
        assert_eq!(answer.status, 401, "{line}");
        assert!(answer.body.contains("<code>master-agent page</code>"), "{}", answer.body);
        let wrong = ["Cookie: master-agent=x", &format!("Cookie: master-agent-{port}=x")];
        for wrong in wrong {
            assert_eq!(site.ask(&line, &[host, wrong], "").await.status, 401, "{line} {wrong}");
        }
    }
    site.statuses(&[
        ("POST /page/explain", &[host], 401),
        ("GET /page/login", &[host], 401),
        ("GET /page/login?token=", &[host], 401),
        ("GET /page/login?token=x", &[host], 401),
    ])
    .await;

    // A token is good once, and a token is no session.
    let invitation = site.invitation();
    let token = invitation.rsplit('=').next().unwrap();
    let cookie = format!("Cookie: master-agent-{port}={token}");
    assert_eq!(site.ask("GET /page/", &[host, &cookie], "").await.status, 401);
    let login = format!("GET {invitation}");
    assert_eq!(site.ask(&login, &["Host: rebound.example"], "").await.status, 403);
    assert_eq!(site.ask(&login, &[host], "").await.status, 303);
    assert_eq!(site.ask(&login, &[host], "").await.status, 401);
    assert!(!site.cluster.master.log_text().contains(token));

    let session = &*site.login().await;
    for path in ASSETS {
        let answer = site.ask(&format!("GET /page/{path}"), &[host, session], "").await;
        assert_eq!(answer.status, 200, "{path}");
    }
    let other_port = format!("Host: 127.0.0.1:{}", port ^ 1);
    let localhost = format!("Host: localhost:{port}");
    let origin = format!("Origin: http://127.0.0.1:{port}");
    let elsewhere = format!("Origin: http://127.0.0.1:{}", port ^ 1);
    let same = "Sec-Fetch-Site: same-origin";
    site.statuses(&[
        ("GET /page", &[host, session], 308),
        ("GET /page/", &[&localhost, session], 200),
        ("GET /page/", &[session], 403),
        ("GET /page/", &["Host: rebound.example", session], 403),
        ("GET /page/", &[&other_port, session], 403),
        ("GET /page/", &["Host: 127.0.0.1", session], 403),
        ("GET http://rebound.example/page/", &[host, session], 403),
        ("GET /page/nowhere", &[host, session], 404),
        ("GET /page/../metrics", &[host, session], 404),
        ("GET /page/nodes/", &[host, session], 404),
        ("GET /page/nodes/unknown", &[host, session], 404),
        ("GET /page/comparison.json", &[host, session], 404),
        ("GET /page/comparison.html", &[host, session], 404),
        ("POST /page/", &[host, session, &origin], 405),
        ("DELETE /page/nodes/n1", &[host, session, &origin], 405),
        ("GET /page/explain", &[host, session, &origin], 405),
        ("GET /page/explain?n1:1", &[host, session, same], 405),
        ("POST /page/explain", &[host, session], 403),
        ("POST /page/explain", &[host, session, "Origin: http://page.example"], 403),
        ("POST /page/explain", &[host, session, "Origin: null"], 403),
        ("POST /page/explain", &[host, session, &elsewhere], 403),
        ("POST /page/explain", &[host, session, &origin, "Sec-Fetch-Site: cross-site"], 403),
        ("POST /page/explain", &[host, session, "Sec-Fetch-Site: same-site"], 403),
        ("POST /page/explain", &[host, session, same, "Origin: http://page.example"], 403),
        ("POST /page/explain", &["Host: rebound.example", session, same], 403),
        ("POST /page/explain", &[host, session, &origin], 200),
        ("POST /page/explain", &[host, session, same], 200),
    ])
    .await;
    let answer = site.ask("POST /page/explain", &[host, session, same], "no target").await;
    assert!(answer.status == 400 && answer.body.contains("is no target"), "{}", answer.body);
    let answer = site.ask("POST /page/explain", &[host, session, same], &"n".repeat(2000)).await;
    assert_eq!(answer.status, 400);

    // What was there before is there for everyone, and what is for root alone is not here.
    for (line, status) in [
        ("GET /livez", 200),
        ("GET /metrics", 200),
        ("GET /nodes", 404),
        ("GET /explain?n1:1", 404),
        ("POST /page/token", 401),
        ("PUT /comparison", 405),
    ] {
        assert_eq!(
            site.ask(line, &["Host: rebound.example"], "").await.status,
            if line.contains("token") || line.contains("metrics") { 403 } else { status }
        );
        assert_eq!(site.ask(line, &[host], "").await.status, status, "{line}");
    }
}

#[tokio::test]
async fn without_being_configured_there_is_no_page() {
    let cluster = Cluster::start(Options::default()).await.unwrap();
    let error = cluster.command(&["page"]).unwrap_err().to_string();
    assert!(error.contains("admin: {page: true}"), "{error}");
    let host = format!("Host: {}", cluster.admin);
    for path in ["/page", "/page/", "/page/login?token=x", "/page/events"] {
        let socket = TcpStream::connect(cluster.admin).await.unwrap();
        assert_eq!(ask(socket, &format!("GET {path}"), &[&host], b"").await.status, 404);
    }
}

#[tokio::test]
async fn a_comparison_is_checked_and_the_last_one_is_kept() {
    let site = Site::start(Options::default()).await;
    let head: &[&str] = &[&site.host, &site.login().await];
    let report = |started: &str| {
        format!(
            r#"{{"version": 1, "started": "{started}", "seconds": 1.5, "rounds": 2, "connections": 4, "targets": [
            {{"node": "n1", "url": "http://<b>x</b>", "paths": [{{"name": "tunnel", "way": "w", "closed": null, "status": 200,
            "attempts": 1, "failures": {{}}}}], "figures": [], "not_measured": []}}]}}"#
        )
    };
    for (body, status) in [
        ("", 400),
        ("{}", 400),
        (r#"{"version": 1}"#, 400),
        (&report("a").replace("\"version\": 1", "\"version\": 2"), 400),
        (&report("a"), 200),
        (&report("b"), 200),
    ] {
        assert_eq!(site.told("PUT /comparison", body.as_bytes()).await.status, status, "{body}");
    }
    let large = report(&"x".repeat(5 << 20));
    assert_eq!(site.told("PUT /comparison", large.as_bytes()).await.status, 413);
    let summary = site.ask("GET /page/comparison.json", head, "").await;
    let summary: serde_json::Value = serde_json::from_str(&summary.body).unwrap();
    assert_eq!(
        (&summary["started"], &summary["lines"][0]["target"]),
        (&"b".into(), &"n1: http://<b>x</b>".into())
    );
    let page = site.ask("GET /page/comparison.html", head, "").await;
    assert!(page.body.contains("&lt;b&gt;x&lt;/b&gt;") && !page.body.contains("<b>x</b>"), "{}", page.body);
    let policy = page.header("content-security-policy").unwrap();
    assert!(
        policy.starts_with("default-src 'none'; style-src 'unsafe-inline'; frame-ancestors 'none'"),
        "{policy}"
    );
}

/// Reads the events of one page as they come.
struct Events {
    socket: TcpStream,
    text: String,
}

impl Events {
    async fn of(site: &Site, session: &str) -> Self {
        let mut socket = TcpStream::connect(site.cluster.admin).await.unwrap();
        let head = format!("GET /page/events HTTP/1.1\r\n{}\r\n{session}\r\n\r\n", site.host);
        socket.write_all(head.as_bytes()).await.unwrap();
        Self { socket, text: String::new() }
    }

    /// Whether there was an end before the text came.
    async fn until(&mut self, text: &str) -> bool {
        let mut buffer = vec![0; 64 * 1024];
        while !self.text.contains(text) {
            let read = tokio::time::timeout(SOON, self.socket.read(&mut buffer))
                .await
                .expect("in time")
                .unwrap_or(0);
            if read == 0 {
                return true;
            }
            self.text.push_str(&String::from_utf8_lossy(&buffer[..read]));
        }
        false
    }
}

#[tokio::test]
async fn watchers_are_few_and_end_with_the_agent() {
    let mut site = Site::start(Options::default()).await;
    let session = site.login().await;
    let mut open = Vec::new();
    for _ in 0..16 {
        let mut events = Events::of(&site, &session).await;
        assert!(!events.until("\"whole\":true").await, "{}", events.text);
        open.push(events);
    }
    let mut more = Events::of(&site, &session).await;
    assert!(
        !more.until("too many pages are open").await && more.text.starts_with("HTTP/1.1 503"),
        "{}",
        more.text
    );
    open.pop();
    eventually("there is room again", SOON, async || {
        let mut events = Events::of(&site, &session).await;
        (!events.until("\r\n\r\n").await && events.text.starts_with("HTTP/1.1 200")).then_some(())
    })
    .await;
    site.cluster.master.signal("TERM");
    for events in &mut open {
        assert!(events.until("never said").await);
    }
    assert_eq!(site.cluster.master.wait(SOON).unwrap(), Some(0));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_page_and_the_report_hold_in_a_real_browser() {
    let port = free_port();
    let kinds = [Kind::Dialled, Kind::CallHome, Kind::Dialled];
    let nodes = kinds.iter().enumerate().map(|(i, kind)| (format!("n{}", i + 1), *kind)).collect();
    let site = Site::start(Options { nodes, targets: vec![local(port)], ..Options::default() }).await;
    let mut command = Command::new(binary("standin"));
    command.arg("--pod").arg(format!("127.0.0.1:{port}"));
    let _standin = Process::start("standin", &mut command, &site.cluster.path().join("standin.log")).unwrap();
    eventually("the target listens", SOON, async || TcpStream::connect(local(port)).await.ok()).await;

    let door = &site.cluster.unix;
    assert_eq!(
        door.connect("169.254.169.254:80").await.unwrap().err().map(|refused| refused.status),
        Some(502)
    );
    assert_eq!(door.connect("n1:1").await.unwrap().err().map(|refused| refused.status), Some(403));
    let target = format!("127.0.0.1:{port}");
    let _stream = door.stream(&target).await.unwrap();
    let report = site.cluster.path().join("report.html");
    let url = format!("http://{target}/healthz");
    site.cluster
        .command(&[
            "compare",
            "--target",
            &url,
            "--rounds",
            "2",
            "--requests",
            "20",
            "--slice",
            "50ms",
            "--download",
            "/bytes/1000000",
            "--upload",
            "/upload",
            "--html",
            report.to_str().unwrap(),
        ])
        .unwrap();

    let shots = screenshots().unwrap();
    let shots = shots.to_str().unwrap();
    let outcome = drive(&["report", report.to_str().unwrap(), shots]).await.unwrap();
    assert_eq!(outcome.code, Some(0), "{}", outcome.stderr);
    // It calls home, and so is lost.
    let url = site.cluster.command(&["page"]).unwrap();
    let node = &site.cluster.nodes[1];
    let pid = node.process.as_ref().unwrap().pid().to_string();
    let outcome = drive(&["page", url.trim(), shots, &node.name, &pid, &target]).await.unwrap();
    assert_eq!(outcome.code, Some(0), "{}", outcome.stderr);
    for line in String::from_utf8_lossy(&outcome.stdout).lines() {
        figures::note(line);
    }
}

/// A large cluster has as many nodes. None of these ever connects.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn five_thousand_nodes_are_shown_a_part_at_a_time() {
    let site = Site::start(Options::default()).await;
    let nodes = (0..5000).map(|i| format!("  - {{name: n{i}, addresses: [10.0.{}.{}]}}\n", i / 250, i % 250));
    let inventory: String = ["nodes:\n".to_owned()].into_iter().chain(nodes).collect();
    std::fs::write(site.cluster.path().join("inventory.yaml"), inventory).unwrap();
    site.cluster.master.signal("HUP");
    eventually("the inventory is read again", SOON, async || {
        site.cluster.master.log_text().contains("inventory read again").then_some(())
    })
    .await;
    let url = site.cluster.command(&["page"]).unwrap();
    let shots = screenshots().unwrap();
    let pid = site.cluster.master.pid().to_string();
    let outcome = drive(&["many", url.trim(), shots.to_str().unwrap(), &pid]).await.unwrap();
    assert_eq!(outcome.code, Some(0), "{}", outcome.stderr);
    for line in String::from_utf8_lossy(&outcome.stdout).lines() {
        figures::note(line);
    }
}

/// Jane may see and explain, Sam may see, and the others may nothing.
#[tokio::test]
async fn on_the_front_end_the_page_is_for_whom_the_authorizers_let_in() {
    let lines = "  serve_page: true\n".to_owned();
    let limits = Some("{long_running_per_user: 1}".to_owned());
    let front_end = FrontEnd::start(Setup { lines, limits, ..Setup::default() }).await.unwrap();
    let origin = format!("https://{}", front_end.address);
    for http in [Http::V1, Http::V2] {
        let status = async |who, method: &str, path: &str, head: &[(&str, &str)]| {
            let mut caller = front_end.caller(who, http).await.unwrap();
            let request = Request::builder().method(method).uri(path);
            let request = head.iter().fold(request, |request, (name, value)| request.header(*name, *value));
            let body = if method == "POST" { "n1:1" } else { "" };
            let answer = caller.ask(request.body(Full::new(Bytes::from(body))).unwrap()).await.unwrap();
            if answer.status == 200 {
                let policy = answer.headers["content-security-policy"].to_str().unwrap();
                assert!(policy.starts_with("default-src 'none'; script-src 'self';"), "{policy}");
            }
            answer.status.as_u16()
        };
        let (jane, sam, nobody) = (Credential::Certificate, Credential::Token, Credential::None);
        let own = ("origin", &*origin);
        for (who, method, path, head, expected) in [
            (nobody, "GET", "/agent/page/", &[][..], 401),
            (Credential::ServiceAccount, "GET", "/agent/page/", &[], 403),
            (Credential::ServiceAccount, "GET", "/agent/page/events", &[], 403),
            (sam, "GET", "/agent/page", &[], 308),
            (sam, "GET", "/agent/page/", &[], 200),
            (sam, "GET", "/agent/page/page.js", &[], 200),
            (sam, "GET", "/agent/page/login", &[], 404),
            (sam, "GET", "/agent/page/nodes/n1", &[], 404),
            (sam, "POST", "/agent/page/explain", &[own], 403),
            (jane, "GET", "/agent/page/explain", &[own], 405),
            (jane, "POST", "/agent/page/explain", &[], 403),
            (jane, "POST", "/agent/page/explain", &[("origin", "https://page.example")], 403),
            (jane, "POST", "/agent/page/explain", &[("sec-fetch-site", "cross-site"), own], 403),
            (jane, "POST", "/agent/page/explain", &[own], 200),
            // This is what comes through `kubectl proxy`, whose own origin the page then has.
            (
                jane,
                "POST",
                "/agent/page/explain",
                &[("sec-fetch-site", "same-origin"), ("origin", "http://127.0.0.1:8001")],
                200,
            ),
        ] {
            assert_eq!(
                status(who, method, path, head).await,
                expected,
                "{http:?} {who:?} {method} {path} {head:?}"
            );
        }
        // A stream of events counts as a watch does.
        let mut caller = front_end.caller(sam, http).await.unwrap();
        let events = || Request::get("/agent/page/events").body(Full::default()).unwrap();
        let mut watched = caller.send(events()).await.unwrap();
        let mut first = Vec::new();
        while !first.windows(8).any(|bytes| bytes == b"\n\ndata: ") {
            first.extend_from_slice(&watched.body_mut().frame().await.unwrap().unwrap().into_data().unwrap());
        }
        assert!(first.starts_with(b"retry: 200\n\ndata: {"), "{first:?}");
        assert_eq!(status(sam, "GET", "/agent/page/events", &[]).await, 429);
        drop((watched, caller));
        eventually("there is room again", SOON, async || {
            let mut caller = front_end.caller(sam, http).await.unwrap();
            (caller.send(events()).await.unwrap().status() == 200).then_some(())
        })
        .await;
    }
    assert!(front_end.upstream.take().is_empty());
    // The log names the caller of each dial.
    eventually("the log says so", SOON, async || {
        let log = front_end.log();
        (log.contains("of \\\"jane\\\" from") || log.contains("of \"jane\" from")).then_some(())
    })
    .await;
    eventually("all is recorded", SOON, async || {
        let audit = std::fs::read_to_string(front_end.file("audit.log")).unwrap();
        let of =
            |path, user| audit.lines().filter(move |line| line.contains(path) && line.contains(user)).count();
        (of("/agent/page/explain", "jane") == 12 && of("/agent/page/events", "sam") >= 4).then_some(())
    })
    .await;
}

#[tokio::test]
async fn a_front_end_that_serves_no_page_hands_its_path_on() {
    let front_end = FrontEnd::start(Setup::default()).await.unwrap();
    let mut caller = front_end.caller(Credential::Certificate, Http::V1).await.unwrap();
    caller.get("/agent/page/").await.unwrap();
    assert_eq!(front_end.upstream.take().len(), 1);
}
