//! Memory and descriptors stay flat over hundreds of thousands of short streams, whichever side closes them first.

use std::{
    net::SocketAddr,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    time::Instant,
};

use tests::{
    client::{Door, Stream},
    cluster::{Cluster, Kind, Options, SOON},
    load::completes,
    openssh::wait_for_port,
    person::Person,
    process::{Process, Usage, eventually, free_port},
};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpListener, TcpStream},
    task::JoinSet,
};

const CALLERS: usize = 32;
/// Bytes by which an agent may have grown at the end.
const GROWTH: u64 = 10_000_000;
/// Descriptors that are not streams' and may come later: a database's journal, a resolver's socket.
const SPARE: u64 = 4;
/// A body large enough that a caller can leave while part of it is still on the way.
const BODY: usize = 4000;

/// Streams through a node-agent: 200,000, or what TEST_STREAMS says; a tenth through what is slower.
fn streams() -> usize {
    std::env::var("TEST_STREAMS").ok().and_then(|v| v.parse().ok()).unwrap_or(200_000)
}

/// The side that closes a stream first.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Close {
    Caller,
    Target,
    /// The caller has ended its direction before the target answers and ends the other.
    Both,
    CallerResets,
    TargetResets,
}

const CLOSES: [Close; 5] =
    [Close::Caller, Close::Target, Close::Both, Close::CallerResets, Close::TargetResets];

impl Close {
    fn path(self) -> &'static str {
        match self {
            Self::Caller | Self::CallerResets => "/keep",
            Self::Target => "/close",
            Self::Both => "/await-end",
            Self::TargetResets => "/reset",
        }
    }
}

/// An HTTP server on several ports of loopback, since one pair of addresses has only so many ports. The path
/// says how it ends a connection.
async fn start_targets() -> Vec<u16> {
    let mut ports = Vec::new();
    for _ in 0..8 {
        let port = free_port();
        let listener = TcpListener::bind(SocketAddr::from(([127, 0, 0, 1], port))).await.unwrap();
        ports.push(port);
        tokio::spawn(async move {
            while let Ok((socket, _)) = listener.accept().await {
                // The caller's side judges how its connection ends.
                tokio::spawn(async move { drop(answer(socket).await) });
            }
        });
    }
    ports
}

async fn answer(mut socket: TcpStream) -> std::io::Result<()> {
    socket.set_nodelay(true)?;
    let mut head = Vec::new();
    while !head.ends_with(b"\r\n\r\n") {
        if socket.read_buf(&mut head).await? == 0 {
            return Ok(());
        }
    }
    let text = String::from_utf8_lossy(&head).into_owned();
    let path = text.split(' ').nth(1).unwrap_or_default();
    if path == "/await-end" {
        while socket.read_buf(&mut head).await? > 0 {}
    }
    let mut response = format!("HTTP/1.1 200 OK\r\nContent-Length: {BODY}\r\n\r\n").into_bytes();
    response.resize(response.len() + BODY, b'x');
    socket.write_all(&response).await?;
    match path {
        "/keep" => while socket.read_buf(&mut head).await? > 0 {},
        "/reset" => socket.set_zero_linger()?,
        _ => {}
    }
    Ok(())
}

/// One stream, from its beginning to its end.
async fn short_stream(mut stream: Stream, close: Close) {
    let request = format!("GET {} HTTP/1.1\r\nHost: target\r\n\r\n", close.path());
    stream.write_all(request.as_bytes()).await.unwrap();
    if close == Close::Both {
        stream.shutdown().await.unwrap();
    }
    let mut response = Vec::with_capacity(BODY + 100);
    match close {
        Close::CallerResets => {
            // A socket that is closed with bytes unread resets its connection.
            stream.read_u8().await.unwrap();
        }
        Close::Caller => {
            let full = |response: &[u8]| {
                let end = response.windows(4).position(|w| w == b"\r\n\r\n");
                end.is_some_and(|end| response.len() >= end + 4 + BODY)
            };
            while !full(&response) {
                assert!(stream.read_buf(&mut response).await.unwrap() > 0, "the stream ended early");
            }
        }
        Close::Target | Close::Both => {
            stream.read_to_end(&mut response).await.unwrap();
            assert!(response.len() > BODY, "{} bytes, {close:?}", response.len());
        }
        // A reset may overtake what was sent before it.
        Close::TargetResets => while stream.read_buf(&mut response).await.is_ok_and(|n| n > 0) {},
    }
}

/// Runs `total` streams, `CALLERS` at a time. `connect` is given the number of each.
async fn run<F>(total: usize, connect: impl Fn(usize) -> F + Clone + Send + 'static)
where
    F: Future<Output = Stream> + Send,
{
    let next = Arc::new(AtomicUsize::new(0));
    let mut callers = JoinSet::new();
    for _ in 0..CALLERS {
        let (next, connect) = (next.clone(), connect.clone());
        callers.spawn(async move {
            loop {
                let i = next.fetch_add(1, Ordering::Relaxed);
                if i >= total {
                    return;
                }
                let stream = connect(i).await;
                let (close, what) = (closes()[i % closes().len()], format!("stream {i}"));
                completes(&what, short_stream(stream, close)).await;
            }
        });
    }
    callers.join_all().await;
}

/// All ways, or the one that TEST_CLOSE names: to find what it is that grows.
fn closes() -> &'static [Close] {
    static CHOSEN: std::sync::OnceLock<Vec<Close>> = std::sync::OnceLock::new();
    CHOSEN.get_or_init(|| {
        let only = std::env::var("TEST_CLOSE").ok();
        let chosen: Vec<_> =
            CLOSES.into_iter().filter(|c| only.as_ref().is_none_or(|o| *o == format!("{c:?}"))).collect();
        assert!(!chosen.is_empty(), "TEST_CLOSE is one of {CLOSES:?}");
        chosen
    })
}

/// The processes that are watched, and how to know that no stream is open.
struct Watched<'a> {
    cluster: &'a Cluster,
    agents: Vec<(&'static str, &'a Process)>,
}

impl Watched<'_> {
    async fn at_rest(&self) {
        let mut last = (0.0, 0.0);
        eventually("no stream is left", SOON, async || {
            let mut master = 0.0;
            for door in ["unix", "tls"] {
                let prefix = format!("master_agent_streams{{egress=\"connect-{door}\"}}");
                master += self.cluster.metric(self.cluster.admin, &prefix).await.unwrap_or_default();
            }
            let node = &self.cluster.nodes[0];
            let on_node = match node.kind {
                Kind::Sshd => 0.0,
                Kind::Dialled | Kind::CallHome | Kind::CallHomeHttps => {
                    self.cluster.metric(node.admin, "node_agent_streams").await.ok()?
                }
            };
            if last != (master, on_node) {
                last = (master, on_node);
                println!("  open: {last:?}");
            }
            (last == (0.0, 0.0)).then_some(())
        })
        .await;
    }

    fn usage(&self) -> Vec<Usage> {
        self.agents.iter().map(|(_, process)| process.usage()).collect()
    }

    /// A twentieth of the streams, then all the others, between which nothing may grow.
    async fn stay_flat<F>(&self, total: usize, connect: impl Fn(usize) -> F + Clone + Send + 'static)
    where
        F: Future<Output = Stream> + Send,
    {
        let before = self.usage();
        let first = total / 20;
        run(first, connect.clone()).await;
        self.at_rest().await;
        let noted = self.usage();
        let began = Instant::now();
        run(total - first, connect).await;
        let took = began.elapsed();
        self.at_rest().await;
        println!(
            "  {} streams in {took:.1?}, {:.0}/s",
            total - first,
            (total - first) as f64 / took.as_secs_f64()
        );
        let mut grown = Vec::new();
        for (i, (name, process)) in self.agents.iter().enumerate() {
            let mut now = process.usage();
            let mb = |usage: &Usage| usage.memory as f64 / 1e6;
            println!(
                "  {name}: {:.1} MB before, {:.1} MB after {first} streams, {:.1} MB at the end; {} descriptors before, {} at the end; {:.1} s of CPU",
                mb(&before[i]),
                mb(&noted[i]),
                mb(&now),
                before[i].descriptors,
                now.descriptors,
                now.cpu - before[i].cpu
            );
            if now.memory > noted[i].memory + GROWTH {
                grown.push(format!(
                    "{name} by {} bytes in {} streams",
                    now.memory - noted[i].memory,
                    total - first
                ));
            }
            eventually(&format!("{name} has as many descriptors as before"), SOON, async || {
                now = process.usage();
                (now.descriptors <= before[i].descriptors + SPARE).then_some(())
            })
            .await;
        }
        assert!(grown.is_empty(), "grown, closed first by {:?}: {grown:?}", closes());
    }
}

async fn one_node(kind: Kind, ports: &[u16]) -> Cluster {
    let nodes = vec![("n1".to_owned(), kind)];
    // A record of every stream on disk is not what is measured here.
    let quiet = "log: {level: warn}".to_owned();
    Cluster::start(Options {
        nodes,
        ports: ports.to_vec(),
        master_config: quiet.clone(),
        node_config: quiet,
        ..Options::default()
    })
    .await
    .unwrap()
}

/// Enters by the Unix socket, and with every 16th stream by TLS.
fn by_the_doors(
    cluster: &Cluster,
    ports: &[u16],
) -> impl Fn(usize) -> ConnectFuture + Clone + Send + 'static + use<> {
    let (unix, tls, ports) = (cluster.unix.clone(), cluster.tls.clone(), ports.to_vec());
    move |i| {
        let door: Door = if i % 16 == 15 { tls.clone() } else { unix.clone() };
        // Neither the door nor the way to close goes with one port only.
        let target = format!("n1:{}", ports[i / 7 % ports.len()]);
        Box::pin(async move { completes("a stream opens", door.stream(&target)).await.unwrap() })
    }
}

type ConnectFuture = std::pin::Pin<Box<dyn Future<Output = Stream> + Send>>;

async fn streams_leave_nothing_behind(kind: Kind) {
    println!("{kind:?}");
    let ports = start_targets().await;
    let cluster = one_node(kind, &ports).await;
    let mut agents = vec![("master-agent", &cluster.master)];
    let total = match kind {
        Kind::Sshd => streams() / 10,
        Kind::Dialled | Kind::CallHome | Kind::CallHomeHttps => {
            agents.push(("node-agent", cluster.nodes[0].process.as_ref().unwrap()));
            streams()
        }
    };
    let watched = Watched { cluster: &cluster, agents };
    watched.stay_flat(total, by_the_doors(&cluster, &ports)).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn streams_through_a_node_agent_leave_nothing_behind() {
    streams_leave_nothing_behind(Kind::Dialled).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn streams_through_an_sshd_leave_nothing_behind() {
    streams_leave_nothing_behind(Kind::Sshd).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn channels_of_a_stock_ssh_client_leave_nothing_behind() {
    let ports = start_targets().await;
    let cluster = one_node(Kind::Dialled, &ports).await;
    let person = Person::certified(&cluster, "alice", "").unwrap();
    let local: Vec<u16> = ports.iter().map(|_| free_port()).collect();
    let mut args = vec!["-N".to_owned(), "-oExitOnForwardFailure=yes".to_owned()];
    for (from, to) in local.iter().zip(&ports) {
        args.extend(["-L".to_owned(), format!("127.0.0.1:{from}:127.0.0.1:{to}")]);
    }
    args.push("node".to_owned());
    let client = person.start("ssh", &args.iter().map(String::as_str).collect::<Vec<_>>()).unwrap();
    for port in &local {
        wait_for_port(*port).unwrap_or_else(|e| panic!("{e}: {}", client.log_text()));
    }
    let node = cluster.nodes[0].process.as_ref().unwrap();
    let watched = Watched { cluster: &cluster, agents: vec![("node-agent", node)] };
    // The connections that looked whether ssh listens are streams too.
    watched.at_rest().await;
    let connect = move |i: usize| -> ConnectFuture {
        let address = SocketAddr::from(([127, 0, 0, 1], local[i / 7 % local.len()]));
        Box::pin(async move {
            let socket = completes("ssh accepts", TcpStream::connect(address)).await.unwrap();
            socket.set_nodelay(true).unwrap();
            Box::new(socket) as Stream
        })
    };
    watched.stay_flat(streams() / 10, connect).await;
    let handshakes =
        cluster.metric(cluster.nodes[0].admin, "node_agent_handshakes_total{result=\"ok\"}").await.unwrap();
    assert_eq!(handshakes, 2.0, "the client or the master came again: {}", client.log_text());
}
