//! SOCKS5 serves curl and hand-written bytes against a node's targets. curl blocks its thread, so the targets have
//! another.

use std::{
    io::Write,
    net::SocketAddr,
    path::PathBuf,
    process::{Command, Output, Stdio},
    time::Duration,
};

use rand::{RngExt, SeedableRng, rngs::StdRng};
use tests::{
    client::Io,
    cluster::{Cluster, Kind, Options, SOON, binary},
    kubelet_port,
    load::completes,
    pattern::fill,
    process::{TempDir, eventually, free_port},
    steady::Health,
    target,
};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpStream, UnixStream},
};

const ANONYMOUS: &[u8] = &[5, 1, 0];

/// A user's line of the users file.
fn line(name: &str, password: &str) -> String {
    let mut command = Command::new(binary("master-agent"));
    command.args(["hash-password", name]).stdin(Stdio::piped()).stdout(Stdio::piped());
    let mut child = command.spawn().unwrap();
    child.stdin.take().unwrap().write_all(password.as_bytes()).unwrap();
    String::from_utf8(child.wait_with_output().unwrap().stdout).unwrap()
}

struct Site {
    cluster: Cluster,
    port: u16,
    tcp: SocketAddr,
    _dir: TempDir,
}

impl Site {
    /// `users` are names and passwords for the TCP listener; without any it asks nobody.
    async fn start(users: &[(&str, &str)], more: &str) -> Self {
        let port = target::start().await;
        let tcp = SocketAddr::from(([127, 0, 0, 1], free_port()));
        let file: String = users.iter().map(|(name, password)| line(name, password)).collect();
        let dir = TempDir::new("socks5").unwrap();
        let path = dir.path().join("users");
        proto_config::secret_file::replace(&path, file.as_bytes()).unwrap();
        let users_file =
            if users.is_empty() { String::new() } else { format!(", users_file: {}", path.display()) };
        let cluster = Cluster::start(Options {
            nodes: vec![("n1".to_owned(), Kind::Dialled)],
            ports: vec![port],
            master_config: format!(
                "socks5:\n  unix: {{path: socks5.sock}}\n  tcp: {{listen: '{tcp}'{users_file}}}\n{more}"
            ),
            ..Options::default()
        })
        .await
        .unwrap();
        Self { cluster, port, tcp, _dir: dir }
    }

    fn socket(&self) -> PathBuf {
        self.cluster.path().join("socks5.sock")
    }

    async fn unix(&self) -> UnixStream {
        UnixStream::connect(self.socket()).await.unwrap()
    }

    /// With the proxy as curl names it.
    fn curl(&self, proxy: &str, url: &str) -> Output {
        Command::new("curl").args(["-sS", "-g", "--max-time", "60", "--proxy", proxy, url]).output().unwrap()
    }

    fn fetches(&self, proxy: &str, host: &str) {
        let output = self.curl(proxy, &format!("http://{host}:{}/", self.port));
        let error = String::from_utf8_lossy(&output.stderr);
        assert_eq!(String::from_utf8_lossy(&output.stdout), "ok", "{proxy} {host}: {error}");
    }
}

/// A request to CONNECT (or what `command` says) to a name.
fn request(command: u8, host: &str, port: u16) -> Vec<u8> {
    let mut bytes = vec![5, command, 0, 3, host.len() as u8];
    bytes.extend(host.as_bytes());
    bytes.extend(port.to_be_bytes());
    bytes
}

/// The code of the answer.
async fn ask(socket: &mut (impl Io + ?Sized), request: &[u8]) -> u8 {
    socket.write_all(ANONYMOUS).await.unwrap();
    let mut method = [0; 2];
    completes("a method", socket.read_exact(&mut method)).await.unwrap();
    assert_eq!(method, [5, 0]);
    socket.write_all(request).await.unwrap();
    let mut reply = [0; 10];
    completes("a reply", socket.read_exact(&mut reply)).await.unwrap();
    assert_eq!((reply[0], &reply[2..]), (5, &[0, 1, 0, 0, 0, 0, 0, 0][..]));
    reply[1]
}

/// Nothing but the end comes.
async fn closed(socket: &mut (impl Io + ?Sized)) {
    let mut rest = Vec::new();
    // A reset is an end, too.
    let _ = completes("the end", socket.read_to_end(&mut rest)).await;
    assert_eq!(rest, b"");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn curl_fetches_by_name_and_by_address_of_both_families() {
    let site = Site::start(&[], "").await;
    let tcp = format!("socks5h://{}", site.tcp);
    let unix = format!("socks5h://localhost{}", site.socket().display());
    for proxy in [&tcp, &unix] {
        for host in ["n1", "127.0.0.1", "[::1]"] {
            site.fetches(proxy, host);
        }
    }
    // Here curl resolves the name.
    site.fetches(&format!("socks5://{}", site.tcp), "localhost");
    let url = format!("http://n1:{}/", site.port);
    let output = Command::new("curl")
        .args(["-sS", "--socks5-hostname", &site.tcp.to_string(), &url])
        .output()
        .unwrap();
    assert_eq!(output.stdout, b"ok");
    // The name went to the router as it was.
    site.cluster.master.says(&[&format!("target=n1:{}", site.port), "node name n1"]).await;
    for door in ["socks5-unix", "socks5-tcp"] {
        let prefix = format!("master_agent_dials_total{{egress=\"{door}\",result=\"ok\"");
        assert!(site.cluster.metric(site.cluster.admin, &prefix).await.unwrap() >= 3.0, "{door}");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn with_a_users_file_only_its_users_get_in() {
    let site = Site::start(&[("alice", "wonder:land"), ("bob", "b")], "").await;
    site.fetches(&format!("socks5h://alice:wonder%3Aland@{}", site.tcp), "n1");
    site.fetches(&format!("socks5h://bob:b@{}", site.tcp), "n1");
    // The mode of the Unix socket says who may call there.
    site.fetches(&format!("socks5h://localhost{}", site.socket().display()), "n1");
    let url = format!("http://n1:{}/", site.port);
    for user in ["alice:b@", "alice:wonder:lan@", "ALICE:wonder:land@", "eve:b@", ""] {
        let output = site.curl(&format!("socks5h://{user}{}", site.tcp), &url);
        assert_eq!((output.status.code(), output.stdout.len()), (Some(97), 0), "{user}");
    }
    let mut socket = TcpStream::connect(site.tcp).await.unwrap();
    socket.write_all(&[5, 3, 0, 1, 0x80]).await.unwrap();
    let mut answer = [0; 2];
    completes("an answer", socket.read_exact(&mut answer)).await.unwrap();
    assert_eq!(answer, [5, 0xff]);
    site.cluster.master.says(&["user=alice"]).await;
    let log = site.cluster.master.says(&["wrong user name or password"]).await;
    assert!(!log.contains("wonder") && !log.contains("user=eve"), "{log}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn passwords_are_not_logged_at_any_level() {
    let site = Site::start(&[("alice", "wonderland")], "log: {level: trace}").await;
    site.fetches(&format!("socks5h://alice:wonderland@{}", site.tcp), "n1");
    // The record of the stream is written once it has ended, and is the last to be said of it.
    let log = eventually("a record", SOON, async || {
        let log = site.cluster.master.log_text();
        log.lines().any(|l| l.contains("stream ended") && l.contains("user=alice")).then_some(log)
    })
    .await;
    assert!(log.contains("Handshake headers"), "what the SOCKS library says is in the log");
    let bytes = format!("{:?}", b"wonderland");
    let said = log.lines().find(|l| l.contains("wonderland") || l.contains(&bytes[1..bytes.len() - 1]));
    assert_eq!(said, None);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn what_fails_has_its_code() {
    let site = Site::start(&[], "").await;
    let closed_port = free_port();
    for (bytes, code) in [
        (request(1, "n1", closed_port), 2),
        (request(1, "169.254.169.254", 80), 3),
        (request(1, "nowhere.example", 80), 3),
        (request(1, "n1", 0), 1),
        (request(1, "", 80), 1),
        (request(1, "a b", 80), 1),
        (request(2, "n1", site.port), 7),
        (request(3, "n1", site.port), 7),
        (request(9, "n1", site.port), 7),
        (vec![5, 1, 0, 7, 1, 2, 3], 8),
    ] {
        let mut socket = site.unix().await;
        assert_eq!(ask(&mut socket, &bytes).await, code, "{bytes:?}");
        closed(&mut socket).await;
    }
    // The node's policy allows the kubelet's port, where nobody listens.
    let _reserved = kubelet_port::reserve().await;
    let mut socket = TcpStream::connect(site.tcp).await.unwrap();
    assert_eq!(ask(&mut socket, &request(1, "n1", 10250)).await, 5);
    site.cluster.master.says(&["refused by node policy"]).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn halves_close_alone_and_early_bytes_arrive() {
    let site = Site::start(&[], "").await;
    let mut socket = site.unix().await;
    let bytes = 3_000_000;
    let mut pattern = vec![0; bytes];
    fill(&mut pattern, 0);
    // Everything is sent at once, before any answer.
    let mut all = [ANONYMOUS, &request(1, "n1", site.port), b"sink\n"].concat();
    all.extend(&pattern[..1000]);
    socket.write_all(&all).await.unwrap();
    socket.write_all(&pattern[1000..]).await.unwrap();
    socket.shutdown().await.unwrap();
    let mut answer = Vec::new();
    completes("the answer", socket.read_to_end(&mut answer)).await.unwrap();
    assert_eq!(&answer[..4], [5, 0, 5, 0]);
    assert_eq!(&answer[12..], format!("{bytes}\n").as_bytes());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn slow_and_half_open_handshakes_end_and_leave_nothing() {
    let users = [("alice", "a")];
    let site = Site::start(&users, "  head_timeout: 700ms").await;
    site.fetches(&format!("socks5h://alice:a@{}", site.tcp), "n1");
    let health = Health::of(&site.cluster.master);
    let login: &[u8] = &[5, 1, 2, 1, 5, b'a', b'l', b'i', b'c', b'e', 1];
    let connect = request(1, "n1", site.port);
    for (i, said) in [&b""[..], &[5], &[5, 200, 0], &[5, 1, 2], login].iter().enumerate() {
        let mut socket = TcpStream::connect(site.tcp).await.unwrap();
        socket.write_all(said).await.unwrap();
        let mut end = Vec::new();
        let _ = completes("the end", socket.read_to_end(&mut end)).await;
        assert!(end.len() <= 2, "{i}: {end:?}");
    }
    for n in 0..connect.len() {
        let mut socket = site.unix().await;
        socket.write_all(&[ANONYMOUS, &connect[..n]].concat()).await.unwrap();
        let mut end = Vec::new();
        let _ = completes("the end", socket.read_to_end(&mut end)).await;
        assert_eq!(end, [5, 0], "{n}");
    }
    // One byte is sent at a time, for ever.
    let mut socket = site.unix().await;
    socket.write_all(&[5, 255]).await.unwrap();
    eventually("the slow one is cut off", SOON, async || {
        tokio::time::sleep(Duration::from_millis(50)).await;
        socket.write_all(&[9]).await.is_err().then_some(())
    })
    .await;
    health.check(20_000_000).await;
    site.cluster.master.says(&["the handshake did not end in time"]).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn no_bytes_harm_it() {
    let site = Site::start(&[("alice", "a")], "  head_timeout: 5s").await;
    let health = Health::of(&site.cluster.master);
    let mut rng = StdRng::seed_from_u64(11);
    let valid = [ANONYMOUS, &request(1, "n1", site.port), b"hold\n"].concat();
    for i in 0..400 {
        let mut bytes = valid.clone();
        for _ in 0..rng.random_range(1..6) {
            let at = rng.random_range(0..bytes.len());
            match rng.random_range(0..3) {
                0 => bytes[at] = rng.random(),
                1 => bytes.insert(at, rng.random()),
                _ => bytes.truncate(at.max(1)),
            }
        }
        let mut socket: Box<dyn Io> = match i % 2 {
            0 => Box::new(site.unix().await),
            _ => Box::new(TcpStream::connect(site.tcp).await.unwrap()),
        };
        // It may be refused in the middle.
        let _ = socket.write_all(&bytes).await;
        let _ = socket.shutdown().await;
        let mut answer = Vec::new();
        let _ = completes("the end", socket.read_to_end(&mut answer)).await;
        assert!(answer.len() <= 13, "{bytes:?}: {answer:?}");
    }
    health.check(20_000_000).await;
    site.fetches(&format!("socks5h://alice:a@{}", site.tcp), "n1");
}
