//! Calls from nodes without a route pass through the node's local endpoint and its tunnel to the master's front end.

use std::{
    collections::HashMap,
    convert::Infallible,
    net::SocketAddr,
    path::PathBuf,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    time::Duration,
};

use bytes::Bytes;
use http_body_util::{BodyExt, Full};
use hyper::{Request, Response, StatusCode, body::Incoming, header, service::service_fn};
use hyper_util::rt::TokioIo;
use proto::{
    DialError,
    mux::{
        FRONT_END,
        frame::{Decoder, Frame},
        window,
    },
};
use rustls::{ClientConfig, pki_types::ServerName};
use tests::{
    client::Stream,
    cluster::{Cluster, Kind, Options, SOON},
    load::completes,
    pattern::{Checker, fill},
    pki::client_config,
    process::{TempDir, eventually, free_port},
    rogue::{Identity, NodeMux, RogueNode},
    rogue_frames::{self, decoder, encode},
    steady::Health,
};
use tokio::{
    io::AsyncWriteExt,
    net::{TcpListener, TcpStream, UnixStream},
};

pub(super) const MB: u64 = 1 << 20;

/// Bytes each way: 64 MB, or what TEST_BYTES says.
fn volume() -> u64 {
    std::env::var("TEST_BYTES").ok().and_then(|v| v.parse().ok()).unwrap_or(64 * MB)
}

/// Stands in for kube-apiserver. `/whoami` says who the front end says it is; `/bytes/N` gives the pattern, to
/// `/upload` it is sent; `/stall` takes nothing of a body, and `/hold` never answers.
async fn upstream() -> SocketAddr {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    tokio::spawn(async move {
        while let Ok((socket, _)) = listener.accept().await {
            let service = service_fn(|request| async { Ok::<_, Infallible>(answer(request).await) });
            let connection =
                hyper::server::conn::http1::Builder::new().serve_connection(TokioIo::new(socket), service);
            tokio::spawn(connection);
        }
    });
    address
}

pub(super) async fn answer(request: Request<Incoming>) -> Response<Full<Bytes>> {
    let path = request.uri().path().to_owned();
    let body = match path.as_str() {
        "/whoami" => {
            request.headers().get("x-remote-user").map(|user| Bytes::copy_from_slice(user.as_bytes()))
        }
        "/upload" => {
            let (mut checker, mut body) = (Checker::default(), request.into_body());
            while let Some(Ok(frame)) = body.frame().await {
                checker.check(frame.data_ref().unwrap());
            }
            Some(checker.offset().to_string().into())
        }
        "/stall" | "/hold" => std::future::pending().await,
        path => path.strip_prefix("/bytes/").map(|n| pattern(n.parse().unwrap())),
    };
    Response::new(Full::new(body.unwrap_or_default()))
}

fn pattern(bytes: u64) -> Bytes {
    let mut all = vec![0; bytes as usize];
    fill(&mut all, 0);
    all.into()
}

/// A local endpoint.
#[derive(Clone, Debug)]
pub(super) enum Endpoint {
    Tcp(SocketAddr),
    Unix(PathBuf),
}

impl Endpoint {
    pub(super) async fn connect(&self) -> std::io::Result<Stream> {
        Ok(match self {
            Self::Tcp(address) => Box::new(TcpStream::connect(address).await?),
            Self::Unix(path) => Box::new(UnixStream::connect(path).await?),
        })
    }
}

pub(super) struct World {
    pub(super) cluster: Cluster,
    pub(super) tls: Arc<ClientConfig>,
    pub(super) _tokens: TempDir,
}

/// The kinds of node, each with its own loopback address; `front_end` are further lines of that section.
pub(super) async fn world(kinds: &[Kind], front_end: &str, change: impl FnOnce(&mut Options)) -> World {
    let tokens = TempDir::new("tokens").unwrap();
    let file = tokens.path().join("tokens.csv");
    proto_config::secret_file::replace(&file, b"kubelet-token,someone,1\n").unwrap();
    let (listen, upstream) = (free_port(), upstream().await);
    let mut options = Options {
        nodes: kinds.iter().enumerate().map(|(i, kind)| (format!("n{}", i + 1), *kind)).collect(),
        local_endpoints: (0..kinds.len())
            .map(|i| SocketAddr::from(([127, 0, 0, i as u8 + 1], free_port())))
            .collect(),
        master_config: format!(
            "front_end:\n  listen: '127.0.0.1:{listen}'\n  certificates: [{{cert: server.crt, key: server.key}}]\n  \
             authentication: [{{token_file: {}}}]\n  upstream: {{servers: ['http://{upstream}']}}\n  {front_end}\n",
            file.display()
        ),
        ..Options::default()
    };
    if !front_end.contains("limits:") {
        options.master_config.push_str("  limits: {max_body: 1000000000, body_timeout: 5m}\n");
    }
    change(&mut options);
    let cluster = completes("the cluster starts", Cluster::start(options)).await.unwrap();
    let tls = client_config(&cluster.path().join("ca.crt"), None).unwrap();
    World { cluster, tls, _tokens: tokens }
}

pub(super) const ALL: [Kind; 3] = [Kind::Dialled, Kind::CallHome, Kind::Sshd];

impl World {
    pub(super) fn tcp(&self, node: usize) -> Endpoint {
        Endpoint::Tcp(self.cluster.local_endpoint(node))
    }

    /// Those of one node.
    pub(super) fn endpoints(&self, node: usize) -> Vec<Endpoint> {
        let mut all = vec![self.tcp(node)];
        if self.cluster.nodes[node].kind != Kind::Sshd {
            all.push(Endpoint::Unix(self.cluster.nodes[node].dir.join("front-end.sock")));
        }
        all
    }

    pub(super) async fn enter(&self, endpoint: &Endpoint) -> anyhow::Result<Stream> {
        let socket = endpoint.connect().await?;
        let name = ServerName::try_from("localhost")?;
        Ok(Box::new(tokio_rustls::TlsConnector::from(self.tls.clone()).connect(name, socket).await?))
    }

    pub(super) async fn request(
        &self,
        endpoint: &Endpoint,
        path: &str,
        token: &str,
        body: Bytes,
    ) -> anyhow::Result<(StatusCode, Bytes)> {
        let socket = TokioIo::new(self.enter(endpoint).await?);
        let (mut sender, connection) = hyper::client::conn::http1::handshake(socket).await?;
        let connection = tokio::spawn(connection);
        let method = if body.is_empty() { "GET" } else { "POST" };
        let request = Request::builder()
            .method(method)
            .uri(path)
            .header(header::HOST, "localhost")
            .header(header::AUTHORIZATION, format!("Bearer {token}"))
            .body(Full::new(body))?;
        let response = sender.send_request(request).await?;
        let status = response.status();
        let body = response.into_body().collect().await?.to_bytes();
        drop(sender);
        let _ = connection.await;
        Ok((status, body))
    }

    pub(super) async fn get(&self, endpoint: &Endpoint, path: &str) -> anyhow::Result<Bytes> {
        let (status, body) = self.request(endpoint, path, "kubelet-token", Bytes::new()).await?;
        anyhow::ensure!(status == StatusCode::OK, "{status}: {body:?}");
        Ok(body)
    }

    /// Waits until an endpoint serves.
    pub(super) async fn served(&self, endpoint: &Endpoint) {
        let what = format!("{endpoint:?} serves, see {}", self.cluster.master.log.display());
        eventually(&what, SOON, async || {
            let body = self.get(endpoint, "/whoami").await.ok()?;
            assert_eq!(body, "someone");
            Some(())
        })
        .await;
    }

    /// A request whose answer will not come, or is not read.
    pub(super) async fn begin(&self, endpoint: &Endpoint, head: &str) -> Stream {
        let mut stream = self.enter(endpoint).await.unwrap();
        let request = format!("{head}\r\nHost: localhost\r\nAuthorization: Bearer kubelet-token\r\n\r\n");
        stream.write_all(request.as_bytes()).await.unwrap();
        stream.flush().await.unwrap();
        stream
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn every_kind_of_node_brings_its_callers_to_the_front_end() {
    let world = world(&ALL, "", |_| {}).await;
    for node in 0..ALL.len() {
        for endpoint in world.endpoints(node) {
            world.served(&endpoint).await;
            let (status, _) = world.request(&endpoint, "/whoami", "wrong", Bytes::new()).await.unwrap();
            assert_eq!(status, StatusCode::UNAUTHORIZED, "{endpoint:?}");

            let bytes = volume();
            let body =
                completes("a download", world.get(&endpoint, &format!("/bytes/{bytes}"))).await.unwrap();
            let mut checker = Checker::default();
            checker.check(&body);
            assert_eq!(checker.offset(), bytes);
            let sent = world.request(&endpoint, "/upload", "kubelet-token", pattern(bytes));
            let (status, body) = completes("an upload", sent).await.unwrap();
            assert_eq!((status, body), (StatusCode::OK, bytes.to_string().into()), "{endpoint:?}");
        }
        // Each leaves a record, and the counts return.
        let name = &world.cluster.nodes[node].name;
        eventually("records", SOON, async || {
            let log = world.cluster.master.log_text();
            let ours = |line: &&str| line.contains("stream ended") && line.contains("front-end-tunnel");
            let ours = log.lines().filter(ours).filter(|line| line.contains(&format!("node=\"{name}\"")));
            (ours.count() >= 4 * world.endpoints(node).len()).then_some(())
        })
        .await;
    }
    let open = "master_agent_streams{egress=\"front-end-tunnel\"}";
    eventually("no stream is left", SOON, async || {
        (world.cluster.metric(world.cluster.admin, open).await.unwrap() == 0.0).then_some(())
    })
    .await;
    for node in 0..2 {
        let admin = world.cluster.nodes[node].admin;
        let callers = "node_agent_front_end_callers_total{result=\"ok\"}";
        assert!(world.cluster.metric(admin, callers).await.unwrap() >= 8.0);
        assert_eq!(world.cluster.metric(admin, "node_agent_front_end_streams").await.unwrap(), 0.0);
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_stalled_caller_does_not_stall_the_others() {
    let world = world(&ALL, "", |_| {}).await;
    for node in 0..ALL.len() {
        let endpoint = world.tcp(node);
        world.served(&endpoint).await;
        let mut stalled = Vec::new();
        for _ in 0..4 {
            // Nobody reads what comes, and nobody takes what is sent.
            stalled.push(tokio::spawn(std::future::ready(
                world.begin(&endpoint, &format!("GET /bytes/{} HTTP/1.1", 32 * MB)).await,
            )));
            let mut upload =
                world.begin(&endpoint, "POST /stall HTTP/1.1\r\nContent-Length: 100000000").await;
            stalled.push(tokio::spawn(async move {
                let block = vec![0; 64 * 1024];
                while tokio::time::timeout(Duration::from_secs(1), upload.write_all(&block))
                    .await
                    .is_ok_and(|w| w.is_ok())
                {}
                upload
            }));
        }
        for round in 0..20 {
            let body = completes("a small one", world.get(&endpoint, "/whoami")).await;
            assert_eq!(body.unwrap(), "someone", "node {node}, round {round}");
        }
        let bytes = volume() / 4;
        let body = completes("a download", world.get(&endpoint, &format!("/bytes/{bytes}"))).await.unwrap();
        assert_eq!(body.len() as u64, bytes);
        let sent = world.request(&endpoint, "/upload", "kubelet-token", pattern(bytes));
        assert_eq!(completes("an upload", sent).await.unwrap().1, bytes.to_string());
        drop(stalled);
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn callers_beyond_the_limits_are_closed_and_the_rest_served() {
    let world = world(&[Kind::Dialled, Kind::Sshd], "limits: {max_connections_per_node: 4}", |_| {}).await;
    for node in 0..2 {
        let endpoint = world.tcp(node);
        world.served(&endpoint).await;
        let mut held = Vec::new();
        eventually("four are served", SOON, async || {
            held.push(world.enter(&endpoint).await.ok()?);
            (held.len() == 4).then_some(())
        })
        .await;
        assert!(completes("the fifth", world.enter(&endpoint)).await.is_err());
        held.clear();
        world.served(&endpoint).await;
    }
}

/// One multiplexer of a rogue node, as the master uses it.
struct Rogue {
    mux: NodeMux,
    decoder: Decoder,
}

impl Rogue {
    async fn send(&self, frame: Frame<'_>) -> bool {
        self.mux.handle.data(self.mux.channel, encode(&frame)).await.is_ok()
    }

    async fn open(&self, stream: u64, target: &str) -> bool {
        let (target, origin) = (target.to_owned(), "tcp 127.0.0.1:1\u{7f}".to_owned());
        let limit = window::INITIAL.into();
        self.send(Frame::Open { stream, timeout_ms: 1000, limit, target, origin }).await
    }

    /// The answers to so many streams: what they were refused with, `None` where they were opened.
    async fn answers(&mut self, count: usize) -> HashMap<u64, Option<DialError>> {
        let mut answers = HashMap::new();
        while answers.len() < count {
            let bytes = completes("an answer", self.mux.received.recv()).await.expect("the tunnel ended");
            let mut bytes = &bytes[..];
            while let Some(frame) = self.decoder.decode(&mut bytes).unwrap() {
                match frame {
                    Frame::Opened { stream, .. } => answers.insert(stream, None),
                    Frame::Refused { stream, error } => answers.insert(stream, Some(error)),
                    _ => None,
                };
            }
        }
        answers
    }

    async fn closed(mut self) {
        completes("the master closes", async { while self.mux.received.recv().await.is_some() {} }).await;
    }
}

/// The two multiplexers of the next tunnel.
async fn next(node: &mut RogueNode) -> (Rogue, Rogue) {
    let mut one = async || {
        let mux = completes("a multiplexer", node.tunnels.recv()).await.unwrap();
        Rogue { mux, decoder: decoder() }
    };
    let (first, second) = (one().await, one().await);
    assert_eq!((first.mux.front_end, second.mux.front_end), (false, true));
    (first, second)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_node_that_turns_gets_the_front_end_and_nothing_else() {
    let limits = "limits: {max_connections_per_node: 100}";
    let mut world = world(&[Kind::Dialled, Kind::Dialled], limits, |options| {
        options.nodes_down = true;
        options.master_config.push_str("tunnels: {backoff_min: 10ms, backoff_max: 50ms}");
    })
    .await;
    world.cluster.start_node(1).unwrap();
    world.cluster.wait_state("n2", "connected").await;
    let honest = world.tcp(1);
    world.served(&honest).await;
    let secret = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let forbidden = secret.local_addr().unwrap();
    let reached = Arc::new(AtomicUsize::new(0));
    let count = reached.clone();
    tokio::spawn(async move {
        while secret.accept().await.is_ok() {
            count.fetch_add(1, Ordering::Relaxed);
        }
    });
    let identity = Identity::read(&world.cluster.nodes[0].dir.join("state/host_key")).unwrap();
    let mut rogue = RogueNode::listen(world.cluster.nodes[0].port, identity, true).await.unwrap();

    // The rogue asks for other targets than the front end.
    let (main, mut streams) = next(&mut rogue).await;
    let local = forbidden.to_string();
    let admin = world.cluster.admin.to_string();
    let others = [local.as_str(), &admin, "front-end:6443", "n2:10250", "", "front-end", "front-end:443\0"];
    for (i, target) in others.iter().enumerate() {
        assert!(streams.open(i as u64 + 1, target).await);
    }
    assert!(streams.open(100, FRONT_END).await);
    let mut answers = streams.answers(others.len() + 1).await;
    assert_eq!(answers.remove(&100), Some(None));
    for (stream, answer) in answers {
        let refused = matches!(answer, Some(DialError::Policy { .. } | DialError::BadTarget(_)));
        assert!(refused, "{:?}: {answer:?}", others[stream as usize - 1]);
    }
    drop(streams);

    // On the master's own multiplexer, streams of the node end the tunnel as ever.
    main.open(1, FRONT_END).await;
    main.closed().await;

    // More streams than it may.
    let health = Health::of(&world.cluster.master);
    let (main, mut streams) = next(&mut rogue).await;
    for stream in 1..=150 {
        streams.open(stream, FRONT_END).await;
    }
    let answers = streams.answers(150).await;
    let refused: Vec<_> = answers.values().flatten().collect();
    assert_eq!(refused.len(), 50);
    assert!(refused.iter().all(|error| matches!(error, DialError::TooManyStreams(_))), "{refused:?}");

    // And each with a full window of nonsense, before it is answered.
    let data = vec![0x16; 32 * 1024];
    for stream in 1001..=3000 {
        streams.open(stream, FRONT_END).await;
        for _ in 0..window::INITIAL as usize / data.len() {
            streams.send(rogue_frames::data(stream, &data)).await;
        }
    }
    let answers = streams.answers(2000).await;
    let mut refused = answers.values().flatten();
    assert!(refused.all(|error| matches!(error, DialError::TooManyStreams(_))), "{answers:?}");
    world.served(&honest).await;
    assert!(health.growth() < 128 * MB, "{} MB", health.growth() / MB);
    drop(streams);
    main.open(1, FRONT_END).await;
    main.closed().await;

    // It goes on asking for what it can't have.
    let (main, streams) = next(&mut rogue).await;
    for stream in 1..=200_000 {
        if !streams.open(stream, &local).await {
            break;
        }
    }
    drop((main, streams, rogue));
    world.served(&honest).await;
    assert_eq!(reached.load(Ordering::Relaxed), 0, "a forbidden target was reached");
    assert!(health.growth() < 128 * MB, "{} MB", health.growth() / MB);
    health.no_panic();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_sshd_that_turns_gets_what_the_master_asked_for_and_nothing_else() {
    let limits = "limits: {max_connections_per_node: 20}";
    let mut world = world(&[Kind::Sshd, Kind::Dialled], limits, |options| {
        options.nodes_down = true;
        options.inventory = "host_keys: {first_use: true}".to_owned();
        options.master_config.push_str("tunnels: {backoff_min: 10ms, backoff_max: 50ms}");
    })
    .await;
    let directory = world.cluster.nodes[0].dir.clone();
    let identity = Identity::read(&directory.join("host_key")).unwrap();
    let rogue = RogueNode::listen(world.cluster.nodes[0].port, identity, false).await.unwrap();
    let asked = async |number: usize| {
        eventually("the master asks", SOON, async || rogue.seen.forwards.lock().unwrap().get(number).cloned())
            .await
    };
    let (address, port, handle) = asked(0).await;
    assert_eq!(format!("{address}:{port}"), world.cluster.local_endpoint(0).to_string());
    let health = Health::of(&world.cluster.master);

    // The forwarding that it was asked for works, up to the limit.
    let mut held = Vec::new();
    for i in 0..60 {
        match handle.channel_open_forwarded_tcpip(address.clone(), port, "10.0.0.1", i).await {
            Ok(channel) => held.push(channel),
            Err(error) => assert!(matches!(error, russh::Error::ChannelOpenFailure(_)), "{error}"),
        }
    }
    assert!((1..=20).contains(&held.len()), "{}", held.len());
    drop(held);

    // Any other channel that the node asks for ends the tunnel.
    for number in 0..4 {
        let (address, port, handle) = asked(number).await;
        let opened = match number {
            0 => handle.channel_open_forwarded_tcpip("127.0.0.9", port, "10.0.0.1", 1).await,
            1 => handle.channel_open_forwarded_tcpip(address.clone(), port + 1, "10.0.0.1", 1).await,
            2 => handle.channel_open_direct_tcpip(address.clone(), port, "10.0.0.1", 1).await,
            _ => handle.channel_open_session().await,
        };
        assert!(opened.is_err(), "{number}");
    }
    eventually("the log", SOON, async || {
        world.cluster.master.log_text().contains("the node tried to open a channel").then_some(())
    })
    .await;
    // The rogue opens a flood of channels.
    let (address, port, handle) = asked(4).await;
    for i in 0..30_000u32 {
        let (handle, address) = (handle.clone(), address.clone());
        let opened = tokio::time::timeout(
            Duration::from_secs(5),
            handle.channel_open_forwarded_tcpip(address, port, "10.0.0.1", i % 60_000),
        )
        .await;
        if matches!(opened, Ok(Err(russh::Error::SendError)) | Err(_)) {
            break;
        }
    }
    drop(rogue);
    world.cluster.start_node(1).unwrap();
    world.cluster.wait_state("n2", "connected").await;
    world.served(&world.tcp(1)).await;
    assert!(health.growth() < 64 * MB, "{} MB", health.growth() / MB);
    health.no_panic();
}
