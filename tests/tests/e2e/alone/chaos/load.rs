//! The callers that come all the time: by every egress listener through every kind of node, and to the front end. They
//! check all bytes. Others have no right to come, and try.

use std::{
    collections::HashSet,
    net::SocketAddr,
    path::PathBuf,
    sync::{Arc, OnceLock},
    time::{Duration, Instant},
};

use anyhow::{Context, bail, ensure};
use bytes::Bytes;
use http_body_util::{BodyExt, Full};
use hyper::Request;
use proto::konnectivity::{Packet, Payload};
use rustls::{ClientConfig, pki_types::ServerName};
use serde_json::{Value, json};
use tests::{
    apiserver::Kind,
    client::{Door, Stream},
    front_end::{Caller, Credential, FrontEnd, Http},
    konnectivity::{Call, Connection},
    pattern::Checker,
    pki::client_config,
    upstream::Received,
};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpStream, UnixStream},
    task::JoinSet,
    time::{sleep, timeout},
};
use tokio_rustls::TlsConnector;
use tokio_util::sync::CancellationToken;

use super::{
    ledger::{Broken, Ledger, Steps, Way},
    site::{NODE_AGENTS, NODES, Site},
    targets::{Targets, pattern},
};

/// Bytes each way of a transfer.
pub const BYTES: u64 = 256 * 1024;
/// No step of a caller takes longer: a dial may take 9 s, and a dead tunnel is noticed after 14 s.
const DEADLINE: Duration = Duration::from_secs(60);
/// Between two steps of a caller.
const PAUSE: Duration = Duration::from_millis(300);
/// Between two events that watches see.
const EVENTS: Duration = Duration::from_millis(200);
/// How long a stream or a watch is held. While it lasts, processes that a reload has replaced do, too.
const HELD: Duration = Duration::from_secs(10);

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Listener {
    Unix,
    Tls,
    Grpc,
    Socks5,
    ProxyUrl,
}

impl Listener {
    const ALL: [Self; 5] = [Self::Unix, Self::Tls, Self::Grpc, Self::Socks5, Self::ProxyUrl];
    /// Those that carry a target's bytes as they are.
    pub const PLAIN: [Self; 4] = [Self::Unix, Self::Tls, Self::Grpc, Self::Socks5];

    fn name(self) -> &'static str {
        match self {
            Self::Unix => "CONNECT by a Unix socket",
            Self::Tls => "CONNECT by TLS",
            Self::Grpc => "gRPC",
            Self::Socks5 => "SOCKS5",
            Self::ProxyUrl => "proxy URL",
        }
    }
}

/// The ways in.
pub struct Entrances {
    unix: Door,
    tls: Door,
    /// The TLS listener for a caller without a certificate.
    anonymous: Door,
    grpc: Door,
    socks5: PathBuf,
    proxy_urls: PathBuf,
    front_end: Arc<FrontEnd>,
    /// The list that the front end has given first, which does not change.
    nodes: OnceLock<Bytes>,
    targets: Targets,
}

impl Entrances {
    pub fn new(site: &Site, targets: Targets) -> anyhow::Result<Self> {
        let cluster = &site.front_end.cluster;
        let Door::Tls(address, _) = cluster.tls else { bail!("no TLS listener") };
        Ok(Self {
            unix: cluster.unix.clone(),
            tls: cluster.tls.clone(),
            anonymous: Door::Tls(address, client_config(&cluster.path().join("ca.crt"), None)?),
            grpc: Door::Unix(cluster.path().join("konnectivity.sock")),
            socks5: cluster.path().join("socks5.sock"),
            proxy_urls: cluster.path().join("proxy_urls.sock"),
            front_end: site.front_end.clone(),
            nodes: OnceLock::new(),
            targets,
        })
    }

    /// Fetches the beginning of the pattern.
    pub async fn download(&self, listener: Listener, node: &str) -> anyhow::Result<()> {
        let (target, mut checker) = (format!("{node}:{}", self.targets.source), Checker::default());
        let request = format!("source {BYTES}\n");
        match listener {
            Listener::Unix | Listener::Tls | Listener::Socks5 => {
                let mut stream = self.stream(listener, &target).await?;
                stream.write_all(request.as_bytes()).await?;
                let mut buffer = vec![0; 64 * 1024];
                loop {
                    let n = stream.read(&mut buffer).await?;
                    if n == 0 {
                        break;
                    }
                    take(&mut checker, &buffer[..n])?;
                }
            }
            Listener::Grpc => {
                let (mut call, id) = self.dial(&target).await?;
                call.packets.send(Packet::data(id, request.into())).await?;
                loop {
                    match call.next().await? {
                        Some(Payload::Data(data)) if data.connect_id == id => take(&mut checker, &data.data)?,
                        Some(Payload::CloseResponse(end)) if end.error.is_empty() => break,
                        other => bail!("{other:?}"),
                    }
                }
            }
            Listener::ProxyUrl => {
                let path = format!("{}/bytes/{BYTES}", self.proxy_url(node));
                let mut caller = self.proxied().await?;
                let response = caller.send(Request::get(path).body(Full::default())?).await?;
                ensure!(response.status() == 200, "{}", response.status());
                let mut body = response.into_body();
                while let Some(frame) = body.frame().await {
                    take(&mut checker, &frame?.into_data().unwrap_or_default())?;
                }
            }
        }
        whole(checker.offset())
    }

    /// Sends it; gRPC, where no caller can end one direction alone, gets it back.
    async fn upload(&self, listener: Listener, node: &str) -> anyhow::Result<()> {
        match listener {
            Listener::Unix | Listener::Tls | Listener::Socks5 => {
                let mut stream = self.stream(listener, &format!("{node}:{}", self.targets.sink)).await?;
                stream.write_all(&pattern(BYTES)).await?;
                stream.shutdown().await?;
                let mut answer = String::new();
                stream.read_to_string(&mut answer).await?;
                whole(answer.trim().parse().context("no answer")?)
            }
            Listener::Grpc => {
                let (mut call, id) = self.dial(&format!("{node}:{}", self.targets.source)).await?;
                call.packets.send(Packet::data(id, Bytes::from_static(b"echo\n"))).await?;
                let (bytes, mut checker) = (pattern(BYTES), Checker::default());
                for start in (0..bytes.len()).step_by(32 * 1024) {
                    let piece = bytes.slice(start..bytes.len().min(start + 32 * 1024));
                    let end = checker.offset() + piece.len() as u64;
                    call.packets.send(Packet::data(id, piece)).await?;
                    while checker.offset() < end {
                        take(&mut checker, &call.read(id).await?)?;
                    }
                }
                whole(checker.offset())
            }
            Listener::ProxyUrl => {
                let request = Request::post(format!("{}/sink", self.proxy_url(node)));
                let request = request.body(Full::new(pattern(BYTES)))?;
                let answer = self.proxied().await?.ask(request).await?;
                ensure!(answer.status == 200, "{}: {:?}", answer.status, answer.body);
                whole(std::str::from_utf8(&answer.body)?.parse()?)
            }
        }
    }

    /// A stream by a listener that serves such.
    async fn stream(&self, listener: Listener, target: &str) -> anyhow::Result<Stream> {
        match listener {
            Listener::Unix => self.unix.stream(target).await,
            Listener::Tls => self.tls.stream(target).await,
            Listener::Socks5 => {
                let mut stream = UnixStream::connect(&self.socks5).await?;
                let (host, port) = target.split_once(':').context("no port")?;
                let mut request = vec![5, 1, 0, 5, 1, 0, 3, u8::try_from(host.len())?];
                request.extend(host.as_bytes());
                request.extend(port.parse::<u16>()?.to_be_bytes());
                stream.write_all(&request).await?;
                let mut answer = [0; 12];
                stream.read_exact(&mut answer).await?;
                ensure!(answer[..4] == [5, 0, 5, 0], "{answer:?}");
                Ok(Box::new(stream))
            }
            Listener::Grpc | Listener::ProxyUrl => bail!("{listener:?} gives no stream"),
        }
    }

    async fn dial(&self, target: &str) -> anyhow::Result<(Call, i64)> {
        let mut call = Connection::open(&self.grpc).await?.call().await?;
        call.packets.send(Packet::dial_request(rand::random(), target)).await?;
        match call.next().await? {
            Some(Payload::DialResponse(answer)) if answer.error.is_empty() => Ok((call, answer.connect_id)),
            other => bail!("{other:?}"),
        }
    }

    fn proxy_url(&self, node: &str) -> String {
        format!("/api/v1/nodes/http:{node}:{}/proxy", self.targets.http)
    }

    async fn proxied(&self) -> anyhow::Result<Caller> {
        let socket = Box::new(UnixStream::connect(&self.proxy_urls).await?);
        self.front_end.caller_on(socket, None, Http::V1).await
    }

    /// A caller of the front end, at its own address or at a node's local endpoint.
    async fn caller(
        &self,
        address: SocketAddr,
        tls: Arc<ClientConfig>,
        bearer: Option<String>,
        http: Http,
    ) -> anyhow::Result<Caller> {
        let socket = TcpStream::connect(address).await?;
        let stream = TlsConnector::from(tls).connect(ServerName::try_from("localhost")?, socket).await?;
        self.front_end.caller_on(Box::new(stream), bearer, http).await
    }

    /// Succeeds if a caller without a good credential is served.
    async fn strange_request(&self, bearer: Option<String>) -> anyhow::Result<()> {
        let tls = self.front_end.tls(Credential::None, Http::V1)?;
        let mut caller = self.caller(self.front_end.address, tls, bearer, Http::V1).await?;
        let answer = caller.get(STRANGE).await?;
        ensure!(answer.status.is_success(), "{}", answer.status);
        Ok(())
    }

    /// A list, and something to create that must arrive once.
    async fn requests(
        &self,
        address: SocketAddr,
        tls: Arc<ClientConfig>,
        bearer: Option<String>,
        http: Http,
    ) -> anyhow::Result<u64> {
        let connect = || self.caller(address, tls.clone(), bearer.clone(), http);
        let mut caller = connect().await?;
        let list = caller.get(Kind::Nodes.path()).await?;
        ensure!(list.status == 200, "{}: {:?}", list.status, list.body);
        if *self.nodes.get_or_init(|| list.body.clone()) != list.body {
            return Err(Broken(format!("another list than before: {:?}", list.body)).into());
        }
        let id = format!("{:016x}", rand::random::<u64>());
        let request = || Request::post(format!("{POSTED}{id}")).body(Full::new(posted(&id)));
        let answer = match caller.ask(request()?).await {
            // An agent that reloads has said with its first answer that it takes no second request.
            Err(error) if was_not_sent(&error) => connect().await?.ask(request()?).await?,
            answer => answer?,
        };
        ensure!(
            answer.status == 200 && answer.json()["received"].is_u64(),
            "{}: {:?}",
            answer.status,
            answer.body
        );
        Ok(list.body.len() as u64)
    }
}

/// Whether a connection was closed before a request was sent on it.
fn was_not_sent(error: &anyhow::Error) -> bool {
    let error = error.downcast_ref::<hyper::Error>();
    error.is_some_and(|error| error.is_closed() || error.is_canceled())
}

/// What is created at the front end.
const POSTED: &str = "/chaos/";
/// What nobody without a credential may ask for.
const STRANGE: &str = "/stranger";

fn posted(id: &str) -> Bytes {
    id.repeat(256).into()
}

fn take(checker: &mut Checker, bytes: &[u8]) -> Result<(), Broken> {
    if checker.matches(bytes) {
        return Ok(());
    }
    Err(Broken(format!("a caller got wrong bytes at offset {}", checker.offset())))
}

fn whole(bytes: u64) -> anyhow::Result<()> {
    if bytes > BYTES {
        return Err(Broken(format!("{bytes} bytes came of {BYTES}")).into());
    }
    ensure!(bytes == BYTES, "the end after {bytes} of {BYTES} bytes");
    Ok(())
}

async fn in_time<T, E: Into<anyhow::Error>>(work: impl Future<Output = Result<T, E>>) -> anyhow::Result<T> {
    match timeout(DEADLINE, work).await {
        Ok(result) => result.map_err(Into::into),
        Err(_) => Err(Broken(format!("nothing ended it within {DEADLINE:?}")).into()),
    }
}

/// The callers. They leave when this is dropped.
pub struct Load {
    callers: JoinSet<()>,
    ledger: Arc<Ledger>,
    stop: CancellationToken,
}

impl Load {
    pub fn start(site: &Site, targets: Targets, ledger: &Arc<Ledger>) -> anyhow::Result<Self> {
        let entrances = Arc::new(Entrances::new(site, targets)?);
        let (callers, stop) = (JoinSet::new(), CancellationToken::new());
        let mut load = Self { callers, ledger: ledger.clone(), stop };
        for (node, (name, _)) in NODES.into_iter().enumerate() {
            for listener in Listener::ALL {
                let entrances = entrances.clone();
                load.transfers(Way { what: listener.name(), node: Some(node) }, move || {
                    let entrances = entrances.clone();
                    async move {
                        entrances.download(listener, name).await?;
                        entrances.upload(listener, name).await?;
                        anyhow::Ok(2 * BYTES)
                    }
                });
            }
            for (what, door) in [("held by a Unix socket", &entrances.unix), ("held by TLS", &entrances.tls)]
            {
                let (door, target) = (door.clone(), format!("{name}:{}", targets.source));
                load.repeat(Way { what, node: Some(node) }, move |steps| {
                    let (door, target) = (door.clone(), target.clone());
                    async move { held(&door, &target, &steps).await }
                });
            }
            load.strangers(&entrances, name, format!("{name}:{}", targets.forbidden));
        }
        let front_end = &site.front_end;
        for (what, http) in [("requests over HTTP/1.1", Http::V1), ("requests over HTTP/2", Http::V2)] {
            load.requests(&entrances, Way { what, node: None }, front_end.address, http)?;
            // A plain sshd has no endpoint for some seconds after a reload: it listens for one session at a time.
            for node in 0..NODE_AGENTS {
                let endpoint = front_end.cluster.local_endpoint(node);
                load.requests(&entrances, Way { what, node: Some(node) }, endpoint, http)?;
            }
        }
        for (what, http) in [("a watch over HTTP/1.1", Http::V1), ("a watch over HTTP/2", Http::V2)] {
            let front_end = front_end.clone();
            load.repeat(Way { what, node: None }, move |steps| {
                let front_end = front_end.clone();
                async move { watch(&front_end, http, &steps).await }
            });
        }
        load.kube_apiserver(front_end.clone());
        Ok(load)
    }

    /// Has the callers leave, and waits until they have.
    pub async fn stop(mut self) {
        self.stop.cancel();
        while let Some(ended) = self.callers.join_next().await {
            ended.expect("no caller panics");
        }
    }

    /// Sessions one after the other, each of which reports its steps.
    fn repeat<C>(&mut self, way: Way, session: impl Fn(Arc<Steps>) -> C + Send + 'static)
    where
        C: Future<Output = anyhow::Result<()>> + Send + 'static,
    {
        let steps = Arc::new(Steps::new(self.ledger.clone(), way, self.stop.clone()));
        self.callers.spawn(async move {
            while !steps.stop.is_cancelled() {
                steps.begin();
                if let Err(error) = session(steps.clone()).await {
                    steps.failed(&error);
                }
                sleep(PAUSE).await;
            }
        });
    }

    /// Sessions of one step.
    fn transfers<C>(&mut self, way: Way, transfer: impl Fn() -> C + Send + 'static)
    where
        C: Future<Output = anyhow::Result<u64>> + Send + 'static,
    {
        self.repeat(way, move |steps| {
            let transfer = transfer();
            async move {
                steps.succeeded(in_time(transfer).await?);
                anyhow::Ok(())
            }
        });
    }

    fn requests(
        &mut self,
        entrances: &Arc<Entrances>,
        way: Way,
        address: SocketAddr,
        http: Http,
    ) -> anyhow::Result<()> {
        let (entrances, credential) = (entrances.clone(), Credential::Token);
        let tls = entrances.front_end.tls(credential, http)?;
        self.transfers(way, move || {
            let (entrances, tls) = (entrances.clone(), tls.clone());
            async move {
                let bearer = entrances.front_end.bearer(credential);
                entrances.requests(address, tls, bearer, http).await
            }
        });
        Ok(())
    }

    /// Tries again and again what must fail.
    fn strangers(&mut self, entrances: &Arc<Entrances>, node: &'static str, forbidden: String) {
        let (entrances, ledger, stop) = (entrances.clone(), self.ledger.clone(), self.stop.clone());
        self.callers.spawn(async move {
            while !stop.is_cancelled() {
                if let Err(broken) = intrude(&entrances, node, &forbidden).await {
                    ledger.broken(&format!("to {node}: {broken}"));
                }
                sleep(PAUSE).await;
            }
        });
    }

    /// Has events happen, and looks at what has arrived.
    fn kube_apiserver(&mut self, front_end: Arc<FrontEnd>) {
        let (ledger, stop) = (self.ledger.clone(), self.stop.clone());
        self.callers.spawn(async move {
            let (upstream, mut seen) = (&front_end.upstream, HashSet::new());
            while !stop.is_cancelled() {
                let number = ledger.number().to_string();
                let pod = json!({"metadata": {"namespace": "default", "name": "chaos", "annotations": {"number": number}}});
                upstream.api().send(Kind::Pods, "MODIFIED", pod);
                for received in upstream.take() {
                    if let Err(why) = arrives_once(&received, &mut seen) {
                        ledger.broken(&format!("at kube-apiserver, {} {}: {why}", received.method, received.target));
                    }
                }
                drop(upstream.api().take_asked());
                upstream.forget_raw();
                sleep(EVENTS).await;
            }
        });
    }
}

/// Whether a request may have arrived.
fn arrives_once(received: &Received, seen: &mut HashSet<String>) -> Result<(), &'static str> {
    if !received.identity().is_ok_and(|identity| identity.user == "sam") {
        return Err("nobody has authenticated as this user");
    }
    if received.target.starts_with(STRANGE) {
        return Err("a request without a credential");
    }
    let Some(id) = received.target.strip_prefix(POSTED) else { return Ok(()) };
    if !seen.insert(id.to_owned()) {
        return Err("it has come twice");
    }
    let body = posted(id);
    let right = if received.whole { received.body == body } else { body.starts_with(&received.body) };
    if right { Ok(()) } else { Err("the body is wrong") }
}

/// Does what must fail.
async fn intrude(entrances: &Entrances, node: &str, forbidden: &str) -> Result<(), Broken> {
    for listener in [Listener::Unix, Listener::Tls, Listener::Socks5] {
        must_fail(listener.name(), entrances.stream(listener, forbidden)).await?;
    }
    must_fail(Listener::Grpc.name(), entrances.dial(forbidden)).await?;
    let allowed = format!("{node}:{}", entrances.targets.source);
    must_fail("TLS without a certificate", entrances.anonymous.stream(&allowed)).await?;
    for bearer in [None, Some("wrong".to_owned())] {
        must_fail("a request without a credential", entrances.strange_request(bearer)).await?;
    }
    Ok(())
}

/// Waits until something fails, in whatever way.
async fn must_fail<T>(what: &str, attempt: impl Future<Output = anyhow::Result<T>>) -> Result<(), Broken> {
    match timeout(DEADLINE, attempt).await {
        Ok(Ok(_)) => Err(Broken(format!("{what}: a stranger has come in"))),
        Ok(Err(_)) => Ok(()),
        Err(_) => Err(Broken(format!("{what}: a stranger had no answer within {DEADLINE:?}"))),
    }
}

/// A stream that is open for a while.
async fn held(door: &Door, target: &str, steps: &Steps) -> anyhow::Result<()> {
    let opened = Instant::now();
    let mut stream = in_time(door.stream(target)).await?;
    in_time(stream.write_all(b"echo\n")).await?;
    let mut said = 0_u64;
    while opened.elapsed() < HELD && !steps.stop.is_cancelled() {
        steps.begin();
        said += 1;
        let (words, mut heard) = (format!("{said:032}"), [0; 32]);
        in_time(stream.write_all(words.as_bytes())).await?;
        in_time(stream.read_exact(&mut heard)).await?;
        if heard.as_slice() != words.as_bytes() {
            let heard = String::from_utf8_lossy(&heard);
            return Err(Broken(format!("said {words:?}, heard {heard:?}")).into());
        }
        steps.succeeded(words.len() as u64);
        sleep(PAUSE).await;
    }
    Ok(())
}

/// A watch for a while, which sees every event once and in order.
async fn watch(front_end: &FrontEnd, http: Http, steps: &Steps) -> anyhow::Result<()> {
    let opened = Instant::now();
    let mut caller = in_time(front_end.caller(Credential::Token, http)).await?;
    let path = format!("{}?watch=1", Kind::Pods.path());
    let response = in_time(caller.send(Request::get(path).body(Full::default())?)).await?;
    ensure!(response.status() == 200, "{}", response.status());
    let (mut body, mut text, mut last) = (response.into_body(), Vec::<u8>::new(), None::<u64>);
    while opened.elapsed() < HELD {
        steps.begin();
        let frame = in_time(async { body.frame().await.context("the watch ended") });
        let Some(frame) = steps.stop.run_until_cancelled(frame).await else { break };
        text.extend_from_slice(&frame??.into_data().unwrap_or_default());
        while let Some(end) = text.iter().position(|byte| *byte == b'\n') {
            let line: Vec<u8> = text.drain(..=end).collect();
            let event: Value = serde_json::from_slice(&line)
                .map_err(|error| Broken(format!("{error} in {:?}", String::from_utf8_lossy(&line))))?;
            let number = event["object"]["metadata"]["annotations"]["number"].as_str();
            let Some(number) = number.and_then(|number| number.parse::<u64>().ok()) else { continue };
            if let Some(last) = last.filter(|last| number != last + 1) {
                return Err(Broken(format!("after event {last} came {number}")).into());
            }
            last = Some(number);
            steps.succeeded(line.len() as u64);
        }
    }
    Ok(())
}
