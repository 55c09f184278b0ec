//! The HTTPS front end stands before a stub kube-apiserver that checks what it receives.

mod authorization;
mod bound_tokens;
mod front_end_bootstrap;
mod front_end_credentials;
mod front_end_h2;
mod front_end_held;
mod front_end_hostile;
mod front_end_identity;
mod front_end_kubectl;
mod front_end_proxy_urls;
mod front_end_smuggling;
mod front_end_upstream;
mod local_endpoint;
mod local_endpoint_lifetimes;

use std::time::{Duration, Instant};

use bytes::Bytes;
use http_body_util::{BodyExt, Full};
use hyper::{Request, StatusCode, Version, body::Incoming, header};
use serde_json::{Value, json};
use tests::{
    apiserver::Kind,
    cluster::SOON,
    front_end::{Caller, Credential, FrontEnd, Http, Setup, TOKEN, exchange, hear},
    load::completes,
    process::{eventually, free_port},
    steady::Health,
    upstream::{Behaviour, GOODBYE, Upstream},
};
use tokio::io::{AsyncReadExt, AsyncWriteExt};

const PROTOCOLS: [Http; 2] = [Http::V1, Http::V2];

fn request(method: &str, target: &str, body: impl Into<Bytes>) -> Request<Full<Bytes>> {
    Request::builder().method(method).uri(target).body(Full::new(body.into())).unwrap()
}

#[tokio::test]
async fn kube_apiserver_is_told_who_calls_by_every_kind_of_credential() {
    for http2 in [false, true] {
        let front_end = FrontEnd::start(Setup { http2, ..Setup::default() }).await.unwrap();
        let upstream = &front_end.upstream;
        for (credential, http) in Credential::ALL.into_iter().flat_map(|c| PROTOCOLS.map(|http| (c, http))) {
            let mut caller = front_end.caller(credential, http).await.unwrap();
            let target = "/echo/a%20b/%C3%BC/...?x=%2Fy&x=+&z";
            let mut post = request("POST", target, "the body");
            post.headers_mut().insert("x-own", "kept".parse().unwrap());
            let answer = caller.ask(post).await.unwrap();
            assert_eq!(
                answer.status,
                StatusCode::OK,
                "{credential:?} {http:?} {answer:?}\n{}",
                front_end.log()
            );
            let [received] = upstream.take().try_into().unwrap();
            let mut identity = received.identity().unwrap();
            if credential == Credential::Certificate {
                // Only what identifies the certificate itself may come beside.
                identity.extra.retain(|(key, _)| key != "authentication.kubernetes.io%2fcredential-id");
            }
            assert_eq!(identity, credential.identity(), "{http:?}");
            assert_eq!((received.method.as_str(), received.target.as_str()), ("POST", target));
            assert_eq!((&received.body[..], received.whole), (&b"the body"[..], true));
            assert_eq!(received.header("x-own"), ["kept"]);
            assert_eq!(received.header("x-forwarded-for"), ["127.0.0.1"]);
            for gone in ["authorization", "forwarded", "via", "x-real-ip"] {
                assert!(received.header(gone).is_empty(), "{received:?}");
            }
            let version = if http2 { Version::HTTP_2 } else { Version::HTTP_11 };
            assert_eq!(received.version, version);
        }
        assert!(upstream.connections() < 4 + Credential::ALL.len(), "connections are used again");
        for secret in [TOKEN, tests::front_end::BOOTSTRAP] {
            let leaked = [front_end.log(), std::fs::read_to_string(front_end.file("audit.log")).unwrap()];
            assert!(leaked.iter().all(|text| !text.contains(secret)), "a token is in the log");
        }
    }
}

#[tokio::test]
async fn who_is_not_recognised_gets_401_and_reaches_nothing() {
    let front_end = FrontEnd::start(Setup::default()).await.unwrap();
    let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap().as_secs();
    let jwt = |claims: &[(&str, Value)]| front_end.service_account_token(claims).unwrap();
    let tokens = [
        ("no token", None),
        ("an unknown token", Some("static-token-of-nobody".to_owned())),
        ("the beginning of a token", Some(TOKEN[..TOKEN.len() - 1].to_owned())),
        ("more than a token", Some(format!("{TOKEN}x"))),
        ("an unknown bootstrap token", Some("abcdeg.0123456789abcdef".to_owned())),
        ("a bootstrap token's wrong secret", Some("abcdef.0123456789abcdeg".to_owned())),
        ("an expired JWT", Some(jwt(&[("exp", json!(now - 100)), ("nbf", json!(now - 200))]))),
        ("a JWT that is not yet valid", Some(jwt(&[("nbf", json!(now + 1000))]))),
        ("a JWT for another audience", Some(jwt(&[("aud", json!(["vault"]))]))),
        ("a JWT of another issuer", Some(jwt(&[("iss", json!("https://other.example"))]))),
        ("a JWT with a broken signature", Some(jwt(&[]) + "A")),
    ];
    for ((what, token), http) in tokens.iter().flat_map(|row| PROTOCOLS.map(|http| (row, http))) {
        for path in ["/echo", "/", "/api/v1/pods", "/healthz", "/readyz", "/livez", "/version", "/metrics"] {
            let mut caller = front_end.caller_with(Credential::None, token.clone(), http).await.unwrap();
            let answer = caller.get(path).await.unwrap();
            assert_eq!(answer.status, StatusCode::UNAUTHORIZED, "{what} {path}");
            let status = answer.json();
            let said = (&status["kind"], &status["reason"], &status["message"], &status["code"]);
            assert_eq!(said, (&json!("Status"), &json!("Unauthorized"), &json!("Unauthorized"), &json!(401)));
        }
    }
    assert_eq!(front_end.upstream.received().len(), 0, "{:?}", front_end.upstream.received());
    // A certificate of another authority is no credential either: TLS itself, or 401.
    let stranger = tests::pki::Authority::new("clients CA").unwrap();
    stranger.client_in(front_end.path(), "jane", "jane", ["system:masters", "dev"]).unwrap();
    for http in PROTOCOLS {
        if let Ok(mut caller) = front_end.caller(Credential::Certificate, http).await
            && let Ok(answer) = caller.get("/echo").await
        {
            assert_eq!(answer.status, StatusCode::UNAUTHORIZED);
        }
    }
    assert_eq!(front_end.upstream.received().len(), 0);
}

/// Everything that a stranger on the network can see.
#[tokio::test]
async fn strangers_learn_no_version_no_product_and_no_path() {
    for unconfigured in [true, false] {
        let front_end = FrontEnd::start(Setup { unconfigured, ..Setup::default() }).await.unwrap();
        let mut bodies = std::collections::BTreeSet::new();
        for http in PROTOCOLS {
            for (method, path) in [
                ("GET", "/"),
                ("GET", "/version"),
                ("GET", "/api/v1/nodes/n1/proxy/healthz"),
                ("POST", "/apis/certificates.k8s.io/v1/certificatesigningrequests"),
                ("DELETE", "/no/such/path"),
                ("OPTIONS", "/x"),
                ("TRACE", "/x"),
                ("PROPFIND", "/x"),
            ] {
                let mut caller = front_end.caller(Credential::None, http).await.unwrap();
                let answer = caller.ask(request(method, path, "")).await.unwrap();
                assert_eq!(answer.status, StatusCode::UNAUTHORIZED, "{method} {path}");
                let names: Vec<&str> = answer.headers.keys().map(|name| name.as_str()).collect();
                for name in &names {
                    let known = [
                        "connection",
                        "content-type",
                        "content-length",
                        "date",
                        "www-authenticate",
                        "cache-control",
                    ];
                    assert!(known.contains(name), "{names:?}");
                }
                if method != "HEAD" {
                    bodies.insert(answer.body.to_vec());
                }
            }
        }
        assert_eq!(bodies.len(), 1, "{bodies:?}");
        let mut texts: Vec<Vec<u8>> = bodies.into_iter().collect();
        for bytes in [
            "GARBAGE\r\n\r\n",
            "GET / HTTP/1.1\r\nConnection: close\r\n\r\n",
            "GET / HTTP/1.1\r\nHost: a\r\nHost: b\r\n\r\n",
        ] {
            let mut stream = front_end.connect(Credential::None, Http::V1).await.unwrap();
            for heard in completes(bytes, exchange(&mut stream, bytes.as_bytes())).await.unwrap() {
                assert!([400, 401].contains(&heard.status), "{bytes} {heard:?}");
                texts.push(format!("{heard:?}{}", String::from_utf8_lossy(&heard.body)).into_bytes());
            }
        }
        for text in texts {
            let text = String::from_utf8(text).unwrap().to_lowercase();
            for word in [
                env!("CARGO_PKG_VERSION"),
                "master",
                "agent",
                "hyper",
                "rust",
                "/tmp",
                "127.0.0.1",
                "server:",
            ] {
                assert!(!text.contains(word), "{word:?} in {text}");
            }
        }
        // An unauthenticated client sees the certificate for the name that it asks for, and no other.
        assert_eq!(front_end.upstream.received().len(), 0);
    }
}

#[tokio::test]
async fn impersonation_is_for_those_who_may() {
    let front_end = FrontEnd::start(Setup::default()).await.unwrap();
    for http in PROTOCOLS {
        let ask = async |credential, headers: &[(&'static str, &str)]| {
            let mut caller = front_end.caller(credential, http).await.unwrap();
            let mut get = request("GET", "/echo", "");
            for (name, value) in headers {
                get.headers_mut().append(*name, value.parse().unwrap());
            }
            let answer = caller.ask(get).await.unwrap();
            (answer.status, front_end.upstream.take())
        };
        let as_admin = [("impersonate-user", "admin"), ("impersonate-group", "ops")];
        let (status, received) = ask(Credential::Certificate, &as_admin).await;
        assert_eq!(status, StatusCode::OK, "{}", front_end.log());
        let [received] = received.try_into().unwrap();
        let identity = received.identity().unwrap();
        let impersonated: Vec<_> =
            received.headers.iter().filter(|(n, _)| n.starts_with("impersonate")).collect();
        // Either the front end speaks for the impersonated, or passes on who wants to be whom.
        if identity.user == "admin" {
            assert!(identity.groups.contains(&"ops".to_owned()) && impersonated.is_empty(), "{received:?}");
            assert!(!identity.groups.contains(&"dev".to_owned()), "{received:?}");
        } else {
            assert_eq!((identity.user.as_str(), impersonated.len()), ("jane", 2), "{received:?}");
        }
        for credential in [Credential::Token, Credential::ServiceAccount, Credential::Bootstrap] {
            let (status, received) = ask(credential, &as_admin).await;
            assert_eq!((status, received.len()), (StatusCode::FORBIDDEN, 0), "{credential:?}");
        }
        // jane may not impersonate a UID, nor a group without a user.
        let refused = [StatusCode::FORBIDDEN, StatusCode::BAD_REQUEST];
        for headers in [
            &[("impersonate-user", "admin"), ("impersonate-uid", "1")][..],
            &[("impersonate-group", "system:masters")],
            &[("impersonate-user", "admin"), ("impersonate-extra-scopes", "all")],
        ] {
            let (status, received) = ask(Credential::Certificate, headers).await;
            assert!(refused.contains(&status) && received.is_empty(), "{headers:?} {status} {received:?}");
        }
    }
}

/// A watch's lines.
struct Lines {
    body: Incoming,
    read: Vec<u8>,
}

impl Lines {
    async fn of(caller: &mut Caller, target: &str) -> Self {
        let response = caller.send(request("GET", target, "")).await.unwrap();
        assert_eq!(response.status(), StatusCode::OK);
        Self { body: response.into_body(), read: Vec::new() }
    }

    /// `None` at the end, whether in good order or not.
    async fn next(&mut self) -> Option<Vec<u8>> {
        loop {
            if let Some(end) = self.read.iter().position(|byte| *byte == b'\n') {
                return Some(self.read.drain(..=end).collect());
            }
            let frame = completes("an event", self.body.frame()).await?.ok()?;
            self.read.extend_from_slice(&frame.into_data().ok()?);
        }
    }
}

#[tokio::test]
async fn watch_events_arrive_before_the_next_is_sent_and_watches_end_on_both_sides() {
    for http2 in [false, true] {
        let front_end = FrontEnd::start(Setup { http2, ..Setup::default() }).await.unwrap();
        let api = front_end.upstream.api();
        let target = "/api/v1/pods?watch=1&resourceVersion=239";
        for (credential, http) in Credential::ALL.into_iter().flat_map(|c| PROTOCOLS.map(|http| (c, http))) {
            let mut caller = front_end.caller(credential, http).await.unwrap();
            let mut events = Lines::of(&mut caller, "/api/v1/pods?watch=1&resourceVersion=0").await;
            let mut first = json!(null);
            while first["object"]["metadata"]["name"] != "web" {
                first = serde_json::from_slice(&events.next().await.unwrap()).unwrap();
            }
            let mut slowest = Duration::ZERO;
            for i in 0..20 {
                let sent = Instant::now();
                let name = format!("{credential:?}-{http:?}-{i}").to_lowercase();
                api.send(Kind::Pods, "ADDED", json!({"metadata": {"name": name, "namespace": "default"}}));
                // Those of the callers before may still be on their way.
                loop {
                    let event: Value = serde_json::from_slice(&events.next().await.unwrap()).unwrap();
                    if event["object"]["metadata"]["name"] == name.as_str() {
                        break;
                    }
                }
                slowest = slowest.max(sent.elapsed());
            }
            println!(
                "{credential:?} {http:?}, upstream HTTP/2 {http2}: the slowest of 20 events took {slowest:?}"
            );
            drop((events, caller));
            eventually("the watch is given up", SOON, async || (api.watches(Kind::Pods) == 0).then_some(()))
                .await;
        }
        let mut caller = front_end.caller(Credential::Token, Http::V2).await.unwrap();
        let mut ended = Lines::of(&mut caller, target).await;
        api.wait_watched(Kind::Pods).await;
        api.end_watches();
        while ended.next().await.is_some() {}
        let mut cut = Lines::of(&mut caller, target).await;
        api.wait_watched(Kind::Pods).await;
        front_end.upstream.refuse().await;
        while cut.next().await.is_some() {}
    }
}

#[tokio::test]
async fn upgrades_carry_bytes_both_ways_close_by_halves_and_leave_nothing() {
    let front_end = FrontEnd::start(Setup::default()).await.unwrap();
    let upstream = &front_end.upstream;
    let connect = async |protocol: &str, credential: Credential| {
        let mut stream = front_end.connect(credential, Http::V1).await.unwrap();
        let bearer = front_end.bearer(credential);
        let bearer = bearer.map_or_else(String::new, |token| format!("Authorization: Bearer {token}\r\n"));
        let head = format!(
            "POST /tunnel HTTP/1.1\r\nHost: {}\r\nConnection: Upgrade\r\nUpgrade: {protocol}\r\n{bearer}\r\n",
            front_end.address
        );
        stream.write_all(head.as_bytes()).await.unwrap();
        let heard = completes("101", hear(&mut stream)).await.unwrap().unwrap();
        assert_eq!((heard.status, heard.header("upgrade")), (101, Some(protocol)), "{}", front_end.log());
        assert!(heard.header("connection").unwrap().eq_ignore_ascii_case("upgrade"));
        stream
    };
    drop(connect("SPDY/3.1", Credential::Token).await);
    eventually("the first upgrade is gone", SOON, async || (upstream.upgraded() == 0).then_some(())).await;
    let health = Health::of(&front_end.cluster.master);
    for (protocol, credential) in [
        ("SPDY/3.1", Credential::Certificate),
        ("websocket", Credential::ServiceAccount),
        ("SPDY/3.1", Credential::Token),
    ] {
        let mut stream = connect(protocol, credential).await;
        assert_eq!(upstream.take().last().unwrap().identity().unwrap().user, credential.identity().user);
        for i in 0..50 {
            let words = format!("{i:08}");
            stream.write_all(words.as_bytes()).await.unwrap();
            let mut heard = [0; 8];
            completes("an echo", stream.read_exact(&mut heard)).await.unwrap();
            assert_eq!(heard, words.as_bytes());
        }
        let mut large = vec![0; 5_000_000];
        tests::pattern::fill(&mut large, 0);
        let (mut reader, mut writer) = tokio::io::split(stream);
        let (sent, mut heard) = (large.clone(), Vec::new());
        let write = async move {
            writer.write_all(&sent).await.unwrap();
            writer.shutdown().await.unwrap();
            writer
        };
        let both = async { tokio::join!(write, reader.read_to_end(&mut heard)) };
        let (writer, read) = completes("the volume", both).await;
        read.unwrap();
        large.extend_from_slice(GOODBYE);
        assert!(heard == large, "{protocol}: {} bytes of {}", heard.len(), large.len());
        drop(writer);
        eventually("the upgrade is gone", SOON, async || (upstream.upgraded() == 0).then_some(())).await;
    }
    // The upgrades are cut by the caller, and then by kube-apiserver.
    let mut open = Vec::new();
    for _ in 0..50 {
        open.push(connect("SPDY/3.1", Credential::Token).await);
    }
    assert_eq!(upstream.upgraded(), 50);
    open.truncate(25);
    eventually("the upgrades are cut", SOON, async || (upstream.upgraded() == 25).then_some(())).await;
    upstream.refuse().await;
    for mut stream in open {
        completes("an end", stream.read_to_end(&mut Vec::new())).await.ok();
    }
    upstream.accept().await.unwrap();
    health.check(64 << 20).await;
}

#[tokio::test]
async fn an_upgrade_takes_its_token_from_the_websocket_protocols_and_does_not_pass_it_on() {
    use base64::Engine as _;
    let front_end = FrontEnd::start(Setup::default()).await.unwrap();
    let encode = |token: &str| base64::prelude::BASE64_URL_SAFE_NO_PAD.encode(token);
    let ask = async |protocols: &str| {
        let mut stream = front_end.connect(Credential::None, Http::V1).await.unwrap();
        let head = format!(
            "GET /tunnel HTTP/1.1\r\nHost: x\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\
             Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n\
             Sec-WebSocket-Protocol: {protocols}\r\n\r\n"
        );
        stream.write_all(head.as_bytes()).await.unwrap();
        completes("an answer", hear(&mut stream)).await.unwrap().unwrap()
    };
    let bearer = |token| format!("base64url.bearer.authorization.k8s.io.{}", encode(token));
    let heard = ask(&format!("{}, v5.channel.k8s.io", bearer(TOKEN))).await;
    assert_eq!((heard.status, heard.header("sec-websocket-protocol")), (101, Some("v5.channel.k8s.io")));
    let [received] = front_end.upstream.take().try_into().unwrap();
    assert_eq!(received.identity().unwrap(), Credential::Token.identity());
    assert_eq!(received.header("sec-websocket-protocol"), ["v5.channel.k8s.io"]);
    for protocols in
        [bearer(TOKEN), format!("{}, v5.channel.k8s.io", bearer("wrong")), "v5.channel.k8s.io".to_owned()]
    {
        assert_eq!(ask(&protocols).await.status, 401, "{protocols}");
    }
    assert_eq!(front_end.upstream.received().len(), 0);
}

/// Bodies larger than any buffer, in both framings, and one that is larger than allowed.
#[tokio::test]
async fn bodies_pass_whole_and_within_bounds() {
    let limits = "{max_body: 3000000}".to_owned();
    let front_end = FrontEnd::start(Setup { limits: Some(limits), ..Setup::default() }).await.unwrap();
    let mut body = vec![0; 2_000_000];
    tests::pattern::fill(&mut body, 0);
    for http in PROTOCOLS {
        let mut caller = front_end.caller(Credential::Token, http).await.unwrap();
        assert_eq!(caller.ask(request("PUT", "/echo", body.clone())).await.unwrap().status, StatusCode::OK);
        let [received] = front_end.upstream.take().try_into().unwrap();
        assert!(received.body == body && received.whole);
    }
    let mut stream = front_end.connect(Credential::Token, Http::V1).await.unwrap();
    let mut bytes = format!(
        "PUT /echo HTTP/1.1\r\nHost: x\r\nConnection: close\r\nAuthorization: Bearer {TOKEN}\r\nTransfer-Encoding: chunked\r\n\r\n"
    )
    .into_bytes();
    for chunk in body.chunks(10_007) {
        bytes.extend(format!("{:x}\r\n", chunk.len()).as_bytes());
        bytes.extend(chunk);
        bytes.extend(b"\r\n");
    }
    bytes.extend(b"0\r\n\r\n");
    let heard = completes("chunks", exchange(&mut stream, &bytes)).await.unwrap();
    assert_eq!(heard[0].status, 200);
    let [received] = front_end.upstream.take().try_into().unwrap();
    assert!(received.body == body && received.whole);
    // A body that is too large is known from the head, or found out on the way.
    let large = vec![0; 3_000_001];
    for http in PROTOCOLS {
        let mut caller = front_end.caller(Credential::Token, http).await.unwrap();
        if let Ok(answer) = caller.ask(request("PUT", "/echo", large.clone())).await {
            assert_eq!(answer.status, StatusCode::PAYLOAD_TOO_LARGE, "{http:?}");
        }
    }
    let mut stream = front_end.connect(Credential::Token, Http::V1).await.unwrap();
    bytes.truncate(bytes.len() - 5);
    bytes.extend(format!("{:x}\r\n", large.len()).as_bytes());
    bytes.extend(&large);
    bytes.extend(b"\r\n0\r\n\r\n");
    for heard in completes("too many chunks", exchange(&mut stream, &bytes)).await.unwrap() {
        assert_eq!(heard.status, 413);
    }
    for received in front_end.upstream.take() {
        assert!(!received.whole && received.body.len() <= 3_000_000, "{}", received.body.len());
    }
}

#[tokio::test]
async fn without_kube_apiserver_callers_get_503_and_with_one_of_two_they_are_served() {
    let front_end = FrontEnd::start(Setup::default()).await.unwrap();
    for http in PROTOCOLS {
        let mut caller = front_end.caller(Credential::Token, http).await.unwrap();
        assert_eq!(caller.get("/echo").await.unwrap().status, StatusCode::OK);
        front_end.upstream.refuse().await;
        for _ in 0..5 {
            let mut caller = front_end.caller(Credential::Token, http).await.unwrap();
            let answer = caller.get("/echo").await.unwrap();
            assert_eq!(answer.status, StatusCode::SERVICE_UNAVAILABLE);
            let status = answer.json();
            assert_eq!((&status["kind"], &status["code"]), (&json!("Status"), &json!(503)), "{answer:?}");
            let text = String::from_utf8_lossy(&answer.body).into_owned();
            assert!(!text.contains(&front_end.upstream.address().port().to_string()), "{text}");
        }
        front_end.upstream.accept().await.unwrap();
        // Requests are served at once, without waiting for a health check.
        let mut caller = front_end.caller(Credential::Token, http).await.unwrap();
        assert_eq!(caller.get("/echo").await.unwrap().status, StatusCode::OK, "{}", front_end.log());
    }

    let dead = format!("https://127.0.0.1:{}", free_port());
    let setup = Setup { more_servers: vec![dead], ..Setup::default() };
    let front_end = FrontEnd::start(setup).await.unwrap();
    for http in PROTOCOLS {
        let mut caller = front_end.caller(Credential::Certificate, http).await.unwrap();
        for i in 0..40 {
            let answer = caller.ask(request("POST", "/echo", format!("{i}"))).await.unwrap();
            assert_eq!(answer.status, StatusCode::OK, "request {i}");
        }
    }
    assert_eq!(front_end.upstream.received().len(), 80);
}

#[tokio::test]
async fn kept_connections_that_kube_apiserver_closes_fail_nobody() {
    let front_end = FrontEnd::start(Setup::default()).await.unwrap();
    let upstream = &front_end.upstream;
    for http in PROTOCOLS {
        let mut caller = front_end.caller(Credential::Token, http).await.unwrap();
        for round in 0..20 {
            assert_eq!(caller.get("/echo").await.unwrap().status, StatusCode::OK, "{round}");
            // All connections are closed while they are idle.
            upstream.refuse().await;
            upstream.accept().await.unwrap();
            assert_eq!(caller.get("/echo").await.unwrap().status, StatusCode::OK, "{round}");
        }
        upstream.behave(Behaviour { close: true, ..Behaviour::default() });
        for i in 0..20 {
            let answer = caller.ask(request("POST", "/echo", format!("{i}"))).await.unwrap();
            assert_eq!(answer.status, StatusCode::OK, "{i}");
        }
        upstream.behave(Behaviour { status: Some(StatusCode::SERVICE_UNAVAILABLE), ..Behaviour::default() });
        let answer = caller.get("/echo").await.unwrap();
        assert_eq!(answer.json()["reason"], "Ordered", "what kube-apiserver says is passed on");
        upstream.behave(Behaviour::default());
    }
}

/// A front end must not speak to whoever answers at kube-apiserver's address.
#[tokio::test]
async fn an_impostor_in_the_place_of_kube_apiserver_gets_no_request() {
    let impostor = Upstream::start().await.unwrap();
    let front_end = FrontEnd::start(Setup::default()).await.unwrap();
    front_end.upstream.refuse().await;
    let relayed = front_end.upstream.address();
    let listener = tokio::net::TcpListener::bind(relayed).await.unwrap();
    let to = impostor.address();
    let relay = tokio::spawn(async move {
        while let Ok((mut from, _)) = listener.accept().await {
            tokio::spawn(async move {
                let mut to = tokio::net::TcpStream::connect(to).await.unwrap();
                let _ = tokio::io::copy_bidirectional(&mut from, &mut to).await;
            });
        }
    });
    let mut caller = front_end.caller(Credential::Token, Http::V1).await.unwrap();
    assert_eq!(caller.get("/echo").await.unwrap().status, StatusCode::SERVICE_UNAVAILABLE);
    assert_eq!((impostor.received().len(), impostor.connections()), (0, 0));
    relay.abort();
}

#[tokio::test]
async fn heads_of_responses_lose_what_is_for_one_hop_only() {
    let front_end = FrontEnd::start(Setup::default()).await.unwrap();
    front_end.upstream.behave(Behaviour { close: true, ..Behaviour::default() });
    for http in PROTOCOLS {
        let mut caller = front_end.caller(Credential::Token, http).await.unwrap();
        for _ in 0..3 {
            let answer = caller.get("/echo").await.unwrap();
            assert_eq!(answer.status, StatusCode::OK);
            assert_eq!(answer.headers.get(header::CONNECTION), None, "the caller's connection stays");
        }
    }
}

/// The whole answer of the plain port to a head.
async fn plainly(stream: impl tokio::io::AsyncRead + tokio::io::AsyncWrite, head: &str) -> String {
    let mut stream = std::pin::pin!(stream);
    stream
        .write_all(format!("GET /echo HTTP/1.1\r\n{head}Connection: close\r\n\r\n").as_bytes())
        .await
        .unwrap();
    let mut answer = String::new();
    completes("an answer", stream.read_to_string(&mut answer)).await.unwrap();
    answer
}

#[tokio::test]
async fn the_plain_port_has_one_user_and_is_for_no_web_page() {
    let port = free_port();
    let lines = format!(
        "  local: {{unix: {{path: plain.sock}}, tcp: {{listen: '127.0.0.1:{port}'}}, user: system:kube-scheduler, groups: [ops]}}\n"
    );
    let front_end = FrontEnd::start(Setup { lines, ..Setup::default() }).await.unwrap();
    let socket = front_end.cluster.path().join("plain.sock");
    let tcp = async |head: &str| {
        plainly(tokio::net::TcpStream::connect(("127.0.0.1", port)).await.unwrap(), head).await
    };
    let unix =
        async |head: &str| plainly(tokio::net::UnixStream::connect(&socket).await.unwrap(), head).await;
    let spoofed = "Host: localhost\r\nX-Remote-User: evil\r\nX-Remote-Group: system:masters\r\nAuthorization: Bearer x\r\n";
    for by_tcp in [true, false] {
        let answer = if by_tcp { tcp(spoofed).await } else { unix(spoofed).await };
        assert!(answer.starts_with("HTTP/1.1 200 "), "{answer}\n{}", front_end.log());
        let [received] = front_end.upstream.take().try_into().unwrap();
        let identity = received.identity().unwrap();
        assert_eq!(identity.user, "system:kube-scheduler");
        assert_eq!(identity.groups, ["ops", "system:authenticated"]);
        assert!(received.header("authorization").is_empty());
    }
    for head in [
        "Host: rebound.example\r\n",
        "Host: localhost\r\nOrigin: https://page.example\r\n",
        "Host: localhost\r\nSec-Fetch-Site: cross-site\r\n",
    ] {
        let answer = tcp(head).await;
        assert!(answer.starts_with("HTTP/1.1 403 "), "{head} {answer}");
    }
    let denied = "Host: localhost\r\nImpersonate-User: admin\r\n";
    assert!(unix(denied).await.starts_with("HTTP/1.1 403 "));
    assert!(front_end.upstream.take().is_empty());
}
