//! Hostile callers of HTTP CONNECT: they send malformed heads, dawdle, or are more than there is room for.

use std::{
    path::Path,
    sync::{
        Arc, Mutex,
        atomic::{AtomicUsize, Ordering},
    },
    time::Duration,
};

use rand::RngExt;
use tests::{
    client::Door,
    cluster::{Cluster, Kind, Options, SOON},
    hostile_bytes::{corpus, in_turns, mutate, rng, show, status, status_lines, throw},
    load::completes,
    process::eventually,
    second_reader,
    steady::{Echo, Health, Steady, raise_descriptor_limit},
    target,
};
use tokio::{
    io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt},
    net::{TcpStream, UnixStream},
    task::JoinSet,
};

const MB: u64 = 1024 * 1024;

fn one_node(port: u16) -> Options {
    Options { nodes: vec![("n1".to_owned(), Kind::Dialled)], ports: vec![port], ..Options::default() }
}

/// Heads and what they were answered.
type Answered = Arc<Mutex<Vec<(Vec<u8>, Vec<u8>)>>>;

/// Whatever led to a dial, another reader takes for a CONNECT request, too; all else has one refusal or none.
fn judge(answered: &Answered) {
    let answered = std::mem::take(&mut *answered.lock().unwrap());
    let readings = second_reader::read(answered.iter().map(|(head, _)| head)).unwrap();
    let mut dialled = 0;
    for ((head, answer), reading) in answered.iter().zip(readings) {
        let context = || format!("{}\nanswered with {}\nread as {reading:?}", show(head), show(answer));
        match status(answer) {
            // 403 and 502 are answers to a dial.
            Some(200 | 403 | 502 | 503) => {
                let request = reading.first().unwrap_or_else(|| panic!("{}", context()));
                assert!(request.whole && request.method == "CONNECT", "{}", context());
                assert_eq!(request.header("transfer-encoding"), None, "{}", context());
                assert!(
                    request.header("content-length").is_none_or(|length| length.trim() == "0"),
                    "{}",
                    context()
                );
                dialled += 1;
            }
            Some(400..=499) => {}
            _ => assert!(answer.is_empty(), "{}", context()),
        }
        if status(answer) != Some(200) {
            assert!(status_lines(answer) <= 1, "{}", context());
        }
    }
    println!("{} heads, of which {dialled} led to a dial", answered.len());
    assert!(dialled > 0);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn malformed_connect_heads_are_refused() {
    let port = target::start().await;
    let cluster = Cluster::start(one_node(port)).await.unwrap();
    let Door::Unix(path) = cluster.unix.clone() else { unreachable!() };
    let mut steady = Steady::start(&cluster, "n1", port).await.unwrap();

    for (name, head) in corpus("connect") {
        let want = name.split('-').next().unwrap();
        let answer =
            completes(&name, throw(UnixStream::connect(&path).await.unwrap(), &head, &mut rng(0))).await;
        let got = status(&answer).map_or_else(|| "closed".to_owned(), |status| status.to_string());
        assert_eq!(got, want, "{name}: {}\nanswered with {}", show(&head), show(&answer));
        assert!(status_lines(&answer) <= 1, "{name}: {}", show(&answer));
    }

    let valid = Arc::new([
        format!(
            "CONNECT n1:{port} HTTP/1.1\r\nHost: n1:{port}\r\nUser-Agent: kube-apiserver/v1.33.0\r\n\r\n"
        ),
        format!("CONNECT 127.0.0.1:{port} HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n"),
        "CONNECT [::1]:1 HTTP/1.1\r\nHost: x\r\nContent-Length: 0\r\n\r\necho\nhello".to_owned(),
        format!("CONNECT n1:{port} HTTP/1.0\r\n\r\n"),
        "CONNECT n1:10250 HTTP/1.1\r\nHost: x\r\nA: b\r\nC: d\r\nE: f\r\n\r\nGET / HTTP/1.1\r\n\r\n"
            .to_owned(),
    ]);
    let nasty: &[&[u8]] = &[
        b"\0",
        b"\r",
        b"\n",
        b"\r\n",
        b"\r\n\r\n",
        b"\x7f",
        b"\xff\xfe",
        b" ",
        b"\t",
        b":",
        b"\r\nContent-Length: 5",
        b"\r\nTransfer-Encoding: chunked",
        b"\r\n folded",
        b"http://",
        b"@",
        b"%0d%0a",
        b"[",
        b"]",
        b"HTTP/2.0",
        b"GET ",
        b"65536",
        b"18446744073709551616",
        b"\x16\x03\x01\x02\x00",
        &[b'a'; 17_000],
        &[b'\n'; 300],
    ];
    let head = move |number: usize| {
        let mut rng = rng(number);
        let base = valid[rng.random_range(0..valid.len())].as_bytes();
        (mutate(&mut rng, base, nasty), rng)
    };
    let answered = Answered::default();
    let unix = |number: usize| {
        let ((head, mut rng), path, answered) = (head(number), path.clone(), answered.clone());
        async move {
            let socket = UnixStream::connect(&path).await.unwrap();
            let answer = completes("a malformed head", throw(socket, &head, &mut rng)).await;
            answered.lock().unwrap().push((head, answer));
        }
    };
    let tls = |number: usize| {
        let ((head, mut rng), door, answered) = (head(number), cluster.tls.clone(), answered.clone());
        async move {
            let stream = door.enter().await.unwrap();
            let answer = completes("a malformed head over TLS", throw(stream, &head, &mut rng)).await;
            // A caller that has ended its TLS session has left, so it need not be answered.
            if !answer.is_empty() {
                answered.lock().unwrap().push((head, answer));
            }
        }
    };
    // Memory that is allocated once is not growth.
    in_turns(300, unix).await;
    in_turns(50, tls).await;
    let health = Health::of(&cluster.master);
    in_turns(10_000, unix).await;
    in_turns(300, tls).await;
    judge(&answered);
    endless_head(&path).await;

    steady.check(&cluster).await;
    Echo::open(&cluster.tls, &format!("n1:{port}")).await.unwrap();
    health.check(10 * MB).await;
    let refused =
        cluster.metric(cluster.admin, "master_agent_bad_requests_total{egress=\"connect-unix\"").await;
    assert!(refused.unwrap() > 5000.0);
}

/// A head without an end is cut off long before it fills the memory.
async fn endless_head(path: &Path) {
    let mut socket = UnixStream::connect(path).await.unwrap();
    let mut sent = 0;
    let chunk = vec![b'a'; 64 * 1024];
    let flood = async {
        while socket.write_all(&chunk).await.is_ok() {
            sent += chunk.len() as u64;
            assert!(sent < 16 * MB, "an endless head is read on and on");
        }
    };
    completes("an endless head", flood).await;
}

/// A request that comes byte by byte, for ever.
async fn dawdle(mut stream: impl AsyncRead + AsyncWrite + Unpin) -> Option<u16> {
    let head = b"CONNECT n1:1 HTTP/1.1\r\nHost: x\r\nA: ";
    let mut answer = Vec::new();
    let mut buffer = [0; 4096];
    for byte in head.iter().chain(std::iter::repeat(&b'b')) {
        if stream.write_all(&[*byte]).await.is_err() || stream.flush().await.is_err() {
            break;
        }
        match tokio::time::timeout(Duration::from_millis(100), stream.read(&mut buffer)).await {
            Ok(Ok(0) | Err(_)) => break,
            Ok(Ok(n)) => answer.extend_from_slice(&buffer[..n]),
            Err(_) => {}
        }
        if !answer.is_empty() {
            break;
        }
    }
    // Nothing more is sent: the other side has to close.
    while let Ok(n) = stream.read(&mut buffer).await {
        if n == 0 {
            break;
        }
        answer.extend_from_slice(&buffer[..n]);
    }
    status(&answer)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn callers_that_dawdle_are_cut_and_keep_nobody_out() {
    raise_descriptor_limit(4096).unwrap();
    let port = target::start().await;
    let cluster = start_with_egress(one_node(port), "  head_timeout: 1s\n").await;
    let mut steady = Steady::start(&cluster, "n1", port).await.unwrap();
    let Door::Tls(tls, _) = cluster.tls.clone() else { unreachable!() };
    let health = Health::of(&cluster.master);

    let cut = Arc::new(AtomicUsize::new(0));
    let rounds = Arc::new(AtomicUsize::new(1));
    let mut slow = JoinSet::new();
    let mut started = Vec::new();
    for i in 0..500 {
        let (doors, cut, rounds) = (cluster.doors(), cut.clone(), rounds.clone());
        let (tell, told) = tokio::sync::oneshot::channel();
        let mut tell = Some(tell);
        started.push(told);
        slow.spawn(async move {
            let mut mine = 0;
            while mine < rounds.load(Ordering::Relaxed) {
                mine += 1;
                match i % 5 {
                    // One TLS handshake never completes, and one never begins.
                    0 => {
                        let mut socket = TcpStream::connect(tls).await.unwrap();
                        let part: &[u8] =
                            if i % 2 == 0 { b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" } else { b"" };
                        socket.write_all(part).await.unwrap();
                        tell.take().map(|tell| tell.send(()));
                        let mut buffer = [0; 100];
                        while matches!(socket.read(&mut buffer).await, Ok(n) if n > 0) {}
                    }
                    kind => {
                        // On this busy machine a handshake may be among what is too slow.
                        let stream = doors[usize::from(kind == 1)].enter().await;
                        tell.take().map(|tell| tell.send(()));
                        if let Ok(stream) = stream {
                            let status = dawdle(stream).await;
                            assert!(matches!(status, Some(408) | None), "{status:?}");
                            if kind > 1 {
                                assert_eq!(status, Some(408), "a Unix caller is answered");
                            }
                        }
                    }
                }
                cut.fetch_add(1, Ordering::Relaxed);
            }
        });
    }
    for told in started {
        completes("a slow caller begins", told).await.unwrap();
    }
    for i in 0..40 {
        // Each slow caller is replaced until the honest ones are done.
        rounds.store(i + 2, Ordering::Relaxed);
        let mut echo = Echo::open(&cluster.doors()[i % 2], &format!("n1:{port}")).await.unwrap();
        echo.say().await.unwrap();
        steady.say().await.unwrap();
    }
    rounds.store(0, Ordering::Relaxed);
    completes("every slow caller is cut", slow.join_all()).await;
    assert!(cut.load(Ordering::Relaxed) >= 500);
    steady.check(&cluster).await;
    health.check(30 * MB).await;
}

/// Restarts the master with more lines of `http_connect:`.
async fn start_with_egress(options: Options, lines: &str) -> Cluster {
    let mut cluster = Cluster::start(options).await.unwrap();
    let file = cluster.path().join("master.yaml");
    let config = std::fs::read_to_string(&file).unwrap();
    std::fs::write(&file, config.replace("http_connect:\n", &format!("http_connect:\n{lines}"))).unwrap();
    cluster.restart_master().unwrap();
    cluster.wait_connected().await;
    cluster
}

#[tokio::test]
async fn callers_beyond_max_connections_are_turned_away() {
    let port = target::start().await;
    let cluster = start_with_egress(one_node(port), "  max_connections: 4\n").await;
    let target = format!("n1:{port}");
    let mut inside = Vec::new();
    // Each door has its own places, so that nobody at the one can shut the other.
    for i in 0..8 {
        inside.push(Echo::open(&cluster.doors()[i % 2], &target).await.unwrap());
    }
    for _ in 0..50 {
        for door in cluster.doors() {
            let stream = completes("a caller too many", door.connect(&target)).await;
            assert!(stream.is_err(), "a fifth caller was let in");
        }
        for echo in &mut inside {
            echo.say().await.unwrap();
        }
    }
    inside.truncate(6);
    eventually("the free places are given to others", SOON, async || {
        let unix = Echo::open(&cluster.unix, &target).await.ok()?;
        Some((unix, Echo::open(&cluster.tls, &target).await.ok()?))
    })
    .await;
    cluster.master.says(&["max_connections reached"]).await;
    Health::of(&cluster.master).no_panic();
}
