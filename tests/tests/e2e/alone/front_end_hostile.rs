//! Honest callers are served every time while the front end is under load or under attack. How long they wait is noted
//! beside how long they wait when it is quiet.

use std::{
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicUsize, Ordering},
    },
    time::{Duration, Instant},
};

use bytes::{Bytes, BytesMut};
use http_body_util::Full;
use hyper::{Request, StatusCode, header};
use tests::{
    cluster::SOON,
    figures,
    front_end::{Credential, FrontEnd, GREEDY, Http, RELOADED, Setup, TOKEN, hear},
    h2::{self, END_HEADERS, END_STREAM, Frame, HEADERS, RST_STREAM, block},
    load::completes,
    process::eventually,
    steady::{Health, raise_descriptor_limit},
};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpStream,
    task::JoinSet,
};

const ATTACKER: [u8; 4] = [127, 0, 0, 7];

/// Honest callers, who go on for as long as this lives and are served every time.
struct Honest {
    stop: Arc<AtomicBool>,
    tasks: JoinSet<Result<Vec<Duration>, String>>,
    began: Instant,
}

impl Honest {
    /// `callers` of them, each with a request every `pause` and a new connection for every tenth.
    fn start(front_end: &Arc<FrontEnd>, callers: usize, pause: Duration) -> Self {
        let (stop, mut tasks) = (Arc::new(AtomicBool::new(false)), JoinSet::new());
        for i in 0..callers {
            let (front_end, stop) = (front_end.clone(), stop.clone());
            let credential = [Credential::Certificate, Credential::Token][i % 2];
            let http = [Http::V1, Http::V2][i / 2 % 2];
            tasks.spawn(async move {
                let mut took = Vec::new();
                let failed = |error: anyhow::Error| format!("{credential:?} {http:?}: {error:#}");
                while !stop.load(Ordering::SeqCst) {
                    let mut caller = front_end.caller(credential, http).await.map_err(failed)?;
                    for _ in 0..10 {
                        let started = Instant::now();
                        let answer = caller.get("/echo").await.map_err(failed)?;
                        if answer.status != StatusCode::OK {
                            return Err(format!("{credential:?} {http:?}: {answer:?}"));
                        }
                        took.push(started.elapsed());
                        tokio::time::sleep(pause).await;
                    }
                }
                Ok(took)
            });
        }
        Self { stop, tasks, began: Instant::now() }
    }

    /// The 99th percentile of such callers' requests while nothing else happens.
    async fn quiet(front_end: &Arc<FrontEnd>, callers: usize, pause: Duration) -> Duration {
        let honest = Self::start(front_end, callers, pause);
        tokio::time::sleep(Duration::from_secs(3)).await;
        honest.end("quiet", None).await.1
    }

    /// Ends them; notes how many requests there were, how long they took, and how much longer than when it was quiet.
    /// Gives how many there were, and the 99th percentile.
    async fn end(mut self, what: &str, quiet: Option<Duration>) -> (usize, Duration) {
        let lasted = self.began.elapsed();
        self.stop.store(true, Ordering::SeqCst);
        let mut all = Vec::new();
        while let Some(took) = completes("the honest", self.tasks.join_next()).await {
            all.extend(took.unwrap().unwrap_or_else(|error| panic!("{what}: {error}")));
        }
        all.sort();
        let at = |part: f64| all[((all.len() - 1) as f64 * part) as usize];
        let (rate, p99) = (all.len() as f64 / lasted.as_secs_f64(), at(0.99));
        let ratio = quiet.map_or_else(String::new, |quiet| {
            format!(", {:.2} x that of quiet ({quiet:?})", p99.as_secs_f64() / quiet.as_secs_f64())
        });
        figures::note(&format!(
            "{what}: {} honest requests, {rate:.0}/s, p50 {:?}, p99 {p99:?}{ratio}",
            all.len(),
            at(0.5)
        ));
        assert!(all.len() >= 10);
        (all.len(), p99)
    }
}

/// The status of one request on a connection of its own.
async fn status(
    front_end: &FrontEnd,
    credential: Credential,
    bearer: Option<&str>,
    impersonate: bool,
) -> u16 {
    let bearer = bearer.map(str::to_owned).or_else(|| front_end.bearer(credential));
    let Ok(mut caller) = front_end.caller_with(credential, bearer, Http::V1).await else { return 0 };
    let mut request = Request::get("/echo").body(Full::<Bytes>::default()).unwrap();
    if impersonate {
        request.headers_mut().insert("impersonate-user", "other".parse().unwrap());
    }
    caller.ask(request).await.map_or(0, |answer| answer.status.as_u16())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn files_are_replaced_under_load_and_no_request_fails() {
    let front_end = Arc::new(FrontEnd::start(Setup::default()).await.unwrap());
    let honest = Honest::start(&front_end, 36, Duration::from_millis(50));
    let becomes = async |what: &str, wanted: u16, credential, bearer: Option<&'static str>, impersonate| {
        let started = Instant::now();
        let mut last = 0;
        eventually(what, RELOADED, async || {
            last = status(&front_end, credential, bearer, impersonate).await;
            (last == wanted).then_some(())
        })
        .await;
        println!("{what}: after {:?}", started.elapsed());
    };
    // Complaints of a file, which must name it.
    let complaints = |file: &str| {
        let log = front_end.log();
        log.lines().filter(|line| line.contains("the last good one stays") && line.contains(file)).count()
    };
    let complains = async |file: &str| {
        let what = format!("the log complains of {file}");
        eventually(&what, RELOADED * 2, async || (complaints(file) > 0).then_some(())).await;
    };

    let tokens = std::fs::read_to_string(front_end.file("tokens.csv")).unwrap();
    assert_eq!(status(&front_end, Credential::None, Some("new-token"), false).await, 401);
    front_end.replace("tokens.csv", &format!("{tokens}new-token,new,uid-9\n")).unwrap();
    becomes("a new token is good", 200, Credential::None, Some("new-token"), false).await;
    front_end.replace("tokens.csv", "only,two\n").unwrap();
    complains("tokens.csv").await;
    assert_eq!(status(&front_end, Credential::None, Some("new-token"), false).await, 200);
    front_end.replace("tokens.csv", &tokens).unwrap();
    becomes("a token that is gone is refused", 401, Credential::None, Some("new-token"), false).await;

    let before = front_end.served_certificate("localhost").await.unwrap();
    let other = front_end.served_certificate("other.example").await.unwrap();
    assert_ne!(before, other, "certificates are chosen by name");
    front_end.servers.server(front_end.path(), "front-end", &["localhost", "127.0.0.1"]).unwrap();
    eventually("the new certificate is served", RELOADED, async || {
        (front_end.served_certificate("localhost").await.unwrap() != before).then_some(())
    })
    .await;
    let good = std::fs::read_to_string(front_end.file("front-end.crt")).unwrap();
    let now = front_end.served_certificate("localhost").await.unwrap();
    std::fs::write(front_end.file("front-end.crt"), "no certificate").unwrap();
    complains("certificate").await;
    assert_eq!(front_end.served_certificate("localhost").await.unwrap(), now);
    std::fs::write(front_end.file("front-end.crt"), good).unwrap();

    let more = tests::pki::Authority::new("more clients CA").unwrap();
    more.client_in(front_end.path(), "jane2", "jane", ["dev", "a,b"]).unwrap();
    let ca = std::fs::read_to_string(front_end.file("clients-ca.crt")).unwrap();
    let with = async |name: &str| {
        let config =
            tests::pki::client_config(&front_end.file("ca.crt"), Some((front_end.path(), name))).unwrap();
        let door = tests::client::Door::Tls(front_end.address, config);
        let mut stream = door.enter().await.ok()?;
        stream.write_all(b"GET /echo HTTP/1.1\r\nHost: x\r\n\r\n").await.ok()?;
        Some(hear(&mut stream).await.ok()??.status)
    };
    assert_ne!(with("jane2").await, Some(200));
    std::fs::write(front_end.file("clients-ca.crt"), format!("{ca}{}", more.pem())).unwrap();
    eventually("the new client CA is good", RELOADED, async || {
        (with("jane2").await == Some(200)).then_some(())
    })
    .await;
    std::fs::write(front_end.file("clients-ca.crt"), "-----BEGIN CERTIFICATE-----\nno\n").unwrap();
    complains("clients-ca.crt").await;
    assert_eq!(with("jane2").await, Some(200));
    std::fs::write(front_end.file("clients-ca.crt"), ca).unwrap();
    eventually("the client CA that is gone is no good", RELOADED, async || {
        (with("jane2").await != Some(200)).then_some(())
    })
    .await;

    // Keys of ServiceAccounts.
    let keys = std::fs::read_to_string(front_end.file("sa.pub")).unwrap();
    let fresh = rcgen::KeyPair::generate().unwrap();
    let by_fresh = front_end.service_account_token_by(&fresh, &[]).unwrap();
    let answers = async |wanted: u16| {
        let what = format!("the fresh key's token is answered {wanted}");
        eventually(&what, RELOADED, async || {
            let last = status(&front_end, Credential::None, Some(&by_fresh), false).await;
            (last == wanted).then_some(())
        })
        .await;
    };
    answers(401).await;
    std::fs::write(front_end.file("sa.pub"), format!("{keys}{}", fresh.public_key_pem())).unwrap();
    answers(200).await;
    std::fs::write(front_end.file("sa.pub"), "-----BEGIN PUBLIC KEY-----\nno\n").unwrap();
    complains("sa.pub").await;
    assert_eq!(status(&front_end, Credential::ServiceAccount, None, false).await, 200);
    std::fs::write(front_end.file("sa.pub"), keys).unwrap();
    answers(401).await;

    let rbac = std::fs::read_to_string(front_end.file("rbac.yaml")).unwrap();
    assert_eq!(status(&front_end, Credential::Token, None, true).await, 403);
    std::fs::write(front_end.file("rbac.yaml"), rbac.replace("name: jane", "name: sam")).unwrap();
    becomes("a new rule allows", 200, Credential::Token, None, true).await;
    assert_eq!(status(&front_end, Credential::Certificate, None, true).await, 403);
    std::fs::write(front_end.file("rbac.yaml"), "kind: ClusterRole\nrules: [{verbs: 7}]\n").unwrap();
    complains("rbac.yaml").await;
    assert_eq!(status(&front_end, Credential::Token, None, true).await, 200);
    std::fs::write(front_end.file("rbac.yaml"), &rbac).unwrap();
    becomes("a rule that is gone allows no more", 403, Credential::Token, None, true).await;

    // The certificate towards kube-apiserver: of the same authority, then of one that is not the proxies'.
    front_end.upstream.proxies().client(front_end.upstream.directory(), tests::upstream::PROXY_NAME).unwrap();
    let renewed = front_end.upstream.connections();
    for end in ["crt", "key"] {
        let from = front_end.upstream.file(&format!("{}.{end}", tests::upstream::PROXY_NAME));
        std::fs::copy(from, front_end.file(&format!("front-proxy.{end}"))).unwrap();
    }
    eventually("the front-proxy certificate is read again", RELOADED * 2, async || {
        let log = front_end.log();
        log.lines().any(|line| line.contains("read again") && line.contains("front-proxy")).then_some(())
    })
    .await;
    assert_eq!(status(&front_end, Credential::Token, None, false).await, 200);
    println!("connections to kube-apiserver: {renewed}, then {}", front_end.upstream.connections());
    // Fewer requests would hardly meet the moments at which a file is replaced.
    let (requests, _) = honest.end("files replaced", None).await;
    assert!(requests >= 1000, "{requests}");
    assert!(!front_end.log().contains(TOKEN) && !front_end.log().contains("new-token"));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn slow_heads_and_bodies_end_and_hold_up_nobody() {
    raise_descriptor_limit(8192).unwrap();
    let front_end = Arc::new(FrontEnd::start(Setup::default()).await.unwrap());
    assert_eq!(status(&front_end, Credential::Token, None, false).await, 200);
    let health = Health::of(&front_end.cluster.master);
    let quiet = Honest::quiet(&front_end, 4, Duration::from_millis(20)).await;
    let honest = Honest::start(&front_end, 4, Duration::from_millis(20));
    let left = [(); 4].map(Arc::new);
    let mut slow = JoinSet::new();
    for i in 0..400 {
        let (front_end, still) = (front_end.clone(), left[i % 4].clone());
        slow.spawn(async move {
            let _still = still;
            let head = "GET /slow HTTP/1.1\r\nHost: api\r\nX-A: ";
            let body = format!("POST /slow HTTP/1.1\r\nHost: api\r\nAuthorization: Bearer {TOKEN}\r\nContent-Length: 1000\r\n\r\nx");
            let (start, http) = match i % 4 {
                // The caller says nothing at all, not even TLS.
                0 => {
                    let mut socket = TcpStream::connect(front_end.address).await.unwrap();
                    let _ = socket.read_to_end(&mut Vec::new()).await;
                    return;
                }
                1 => (head.as_bytes().to_vec(), Http::V1),
                2 => (body.into_bytes(), Http::V1),
                _ => (h2::PREFACE[..20].to_vec(), Http::V2),
            };
            let mut stream = front_end.connect_from(ATTACKER, Credential::None, http).await.unwrap();
            stream.write_all(&start).await.unwrap();
            let (mut reader, mut writer) = tokio::io::split(stream);
            let drip = async {
                // Heads go on forever, a byte at a time; bodies have stopped.
                while i % 4 == 1 && writer.write_all(b"x").await.is_ok() && writer.flush().await.is_ok() {
                    tokio::time::sleep(Duration::from_millis(300)).await;
                }
                std::future::pending::<()>().await;
            };
            tokio::select! {
                _ = async { reader.read_to_end(&mut Vec::new()).await } => {}
                () = drip => {}
            }
        });
    }
    // The server ends every one of them.
    let ends = async {
        while let Some(ended) = slow.join_next().await {
            ended.unwrap();
        }
    };
    if tokio::time::timeout(Duration::from_secs(120), ends).await.is_err() {
        let left = left.each_ref().map(Arc::strong_count).map(|count| count - 1);
        panic!("of each kind there are left {left:?}:\n{}\n{}", sockets(front_end.address), front_end.log());
    }
    honest.end("400 slow callers", Some(quiet)).await;
    front_end.upstream.refuse().await;
    front_end.upstream.accept().await.unwrap();
    health.check(100 << 20).await;
}

/// The kernel's view of connections to an address, from both ends.
fn sockets(address: std::net::SocketAddr) -> String {
    let listed =
        std::process::Command::new("ss").args(["--tcp", "--all", "--numeric", "--processes"]).output();
    let listed = String::from_utf8(listed.unwrap().stdout).unwrap();
    listed.lines().filter(|line| line.contains(&address.to_string())).collect::<Vec<_>>().join("\n")
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn ten_thousand_idle_connections_cost_little_and_go() {
    const IDLE: usize = 10_000;
    // Each connection needs a descriptor on either side, and the test needs some more.
    raise_descriptor_limit(12_000).unwrap();
    // The limits as they come, but for the quiet of the test, and its haste.
    let limits = Some("{idle_timeout: 10m, requests_per_second_per_user: 100000}".to_owned());
    let front_end = Arc::new(FrontEnd::start(Setup { limits, ..Setup::default() }).await.unwrap());
    assert_eq!(status(&front_end, Credential::Token, None, false).await, 200);
    let health = Health::of(&front_end.cluster.master);
    let quiet = Honest::quiet(&front_end, 4, Duration::from_millis(20)).await;
    let (count, mut idle) = (Arc::new(AtomicUsize::new(0)), JoinSet::new());
    for worker in 0..8_u8 {
        let (front_end, count) = (front_end.clone(), count.clone());
        idle.spawn(async move {
            let mut open = Vec::new();
            while count.fetch_add(1, Ordering::SeqCst) < IDLE {
                let http = [Http::V1, Http::V2][usize::from(worker % 2)];
                let source = [127, 0, 0, 20 + worker / 2];
                let stream = front_end.connect_from(source, Credential::None, http).await.unwrap();
                // Unauthenticated connections do not stay open.
                let mut caller = front_end.caller_on(stream, Some(TOKEN.to_owned()), http).await.unwrap();
                assert_eq!(caller.get("/echo").await.unwrap().status, StatusCode::OK);
                open.push(caller);
            }
            open
        });
    }
    let open = completes("the connections", idle.join_all()).await;
    assert_eq!(open.iter().map(Vec::len).sum::<usize>(), IDLE);
    let honest = Honest::start(&front_end, 4, Duration::from_millis(20));
    tokio::time::sleep(Duration::from_secs(5)).await;
    let (growth, _) = (health.growth(), honest.end("10000 idle connections", Some(quiet)).await);
    figures::note(&format!(
        "{IDLE} idle connections: {} KB, {} KB each",
        growth / 1024,
        growth / 1024 / IDLE as u64
    ));
    assert!(growth < IDLE as u64 * 100 * 1024);
    drop(open);
    front_end.upstream.refuse().await;
    front_end.upstream.accept().await.unwrap();
    // The allocator does not return all memory at once.
    health.check(growth + (64 << 20)).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn rapid_resets_are_ended_and_hold_up_nobody() {
    let front_end = Arc::new(FrontEnd::start(Setup::default()).await.unwrap());
    assert_eq!(status(&front_end, Credential::Token, None, false).await, 200);
    let health = Health::of(&front_end.cluster.master);
    let quiet = Honest::quiet(&front_end, 4, Duration::from_millis(20)).await;
    let honest = Honest::start(&front_end, 4, Duration::from_millis(20));
    let bearer = format!("Bearer {GREEDY}");
    let head = block(&[
        (":method", "GET"),
        (":scheme", "https"),
        (":authority", "api"),
        (":path", "/reset"),
        ("authorization", &bearer),
    ]);
    let mut ended = 0;
    for _ in 0..10 {
        let stream = front_end.connect_from(ATTACKER, Credential::None, Http::V2).await.unwrap();
        let mut connection = h2::Connection::start(stream).await.unwrap();
        let mut stream = 1;
        // Written in one go, as an attacker does, a hundred pairs at a time.
        'connection: for _ in 0..50 {
            let mut bytes = BytesMut::new();
            for _ in 0..100 {
                bytes.extend_from_slice(
                    &Frame::new(HEADERS, END_HEADERS | END_STREAM, stream, head.clone()).encode(),
                );
                bytes.extend_from_slice(
                    &Frame::new(RST_STREAM, 0, stream, Bytes::from_static(&[0, 0, 0, 8])).encode(),
                );
                stream += 2;
            }
            if connection.write(&bytes).await.is_err() {
                break 'connection;
            }
        }
        match completes("the answer to resets", async {
            let _ = connection.send(&Frame::new(h2::PING, 0, 0, Bytes::from_static(b"resets??"))).await;
            connection.answer(0).await
        })
        .await
        .unwrap()
        {
            h2::Answer::GoAway(_) | h2::Answer::Closed => ended += 1,
            other => println!("after 5000 resets: {other:?}"),
        }
    }
    println!("{ended} of 10 connections with 5000 resets were ended by the server");
    assert_eq!(ended, 10);
    honest.end("rapid resets", Some(quiet)).await;
    eventually("no request waits", SOON, async || (front_end.upstream.waiting() == 0).then_some(())).await;
    let reached = front_end.upstream.take().iter().filter(|received| received.target == "/reset").count();
    println!("{reached} of 50000 requests that were reset reached kube-apiserver");
    front_end.upstream.refuse().await;
    front_end.upstream.accept().await.unwrap();
    health.check(100 << 20).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn wrong_tokens_are_slowed_down_and_hold_up_nobody() {
    const WRONG: usize = 20_000;
    /// The time between two tokens of each of 16 attackers, who together send 100,000 a minute.
    const PACE: Duration = Duration::from_micros(9_600);
    let limits = Some("{}".to_owned());
    let front_end = Arc::new(FrontEnd::start(Setup { limits, ..Setup::default() }).await.unwrap());
    assert_eq!(status(&front_end, Credential::Token, None, false).await, 200);
    front_end.upstream.take();
    let health = Health::of(&front_end.cluster.master);
    let quiet = Honest::quiet(&front_end, 4, Duration::from_millis(20)).await;
    let honest = Honest::start(&front_end, 4, Duration::from_millis(20));
    let (count, mut attackers) = (Arc::new(AtomicUsize::new(0)), JoinSet::new());
    let tls = front_end.tls(Credential::None, Http::V2).unwrap();
    for _ in 0..16 {
        let (front_end, count, tls) = (front_end.clone(), count.clone(), tls.clone());
        attackers.spawn(async move {
            let mut statuses = [0_usize; 2];
            let mut pace = tokio::time::interval(PACE);
            while count.load(Ordering::SeqCst) < WRONG {
                let stream = front_end.connect_with(ATTACKER, tls.clone(), Http::V2).await.unwrap();
                let mut caller = front_end.caller_on(stream, None, Http::V2).await.unwrap();
                // Until the server has had enough of this connection.
                while count.fetch_add(1, Ordering::SeqCst) < WRONG {
                    let token = format!("Bearer wrong-{:016x}", rand::random::<u64>());
                    let request = Request::get("/evil").header(header::AUTHORIZATION, token);
                    let Ok(answer) = caller.ask(request.body(Full::default()).unwrap()).await else {
                        count.fetch_sub(1, Ordering::SeqCst);
                        break;
                    };
                    pace.tick().await;
                    match answer.status {
                        StatusCode::UNAUTHORIZED => statuses[0] += 1,
                        StatusCode::TOO_MANY_REQUESTS => {
                            assert!(answer.headers.contains_key(header::RETRY_AFTER));
                            statuses[1] += 1;
                        }
                        other => panic!("{other}"),
                    }
                }
            }
            statuses
        });
    }
    let started = Instant::now();
    let all = completes("wrong tokens", attackers.join_all()).await;
    let sum = |index: usize| all.iter().map(|statuses| statuses[index]).sum::<usize>();
    let took = started.elapsed();
    println!("{WRONG} wrong tokens in {took:?}: {} were looked at (401), {} not (429)", sum(0), sum(1));
    // Ten a second and a burst, but for a busy machine's sake far more than that.
    assert!((sum(0) as f64) < 200.0 + took.as_secs_f64() * 20.0 && sum(1) > 0);
    honest.end("wrong tokens", Some(quiet)).await;
    let received = front_end.upstream.take();
    assert!(received.iter().all(|received| received.target == "/echo"), "none reached kube-apiserver");
    // Not even the right token is looked at from there meanwhile, or it is: never anything else.
    front_end.upstream.refuse().await;
    front_end.upstream.accept().await.unwrap();
    health.check(100 << 20).await;
}
