//! Agents reload under every kind of load, and nobody notices: dials through every egress listener and both dial
//! directions, requests and watches through the front end, and kubectl.

use std::{path::PathBuf, sync::Arc, time::Duration};

use bytes::Bytes;
use http_body_util::{BodyExt, Full};
use hyper::{Request, body::Incoming};
use tests::{
    apiserver,
    client::{Door, Stream, echo, still_echoes},
    cluster::Kind,
    front_end::{Caller, Credential, FrontEnd, Http, Setup},
    konnectivity::Connection,
    load::{REQUEST, completes, get},
    repeated::Repeated,
    target,
};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::UnixStream,
    sync::Mutex,
    time::sleep,
};

const NODES: [(&str, Kind); 3] = [("n1", Kind::Dialled), ("n2", Kind::CallHome), ("n3", Kind::Sshd)];
/// The load without any reload, for comparison.
const QUIET: Duration = Duration::from_secs(2);
/// Between two reloads.
const PAUSE: Duration = Duration::from_millis(300);

/// How often each agent is reloaded. TEST_RELOADS asks for more.
fn times() -> usize {
    std::env::var("TEST_RELOADS").ok().and_then(|v| v.parse().ok()).unwrap_or(3)
}

/// A front end and all egress listeners, beside nodes of each kind.
struct Site {
    front_end: Arc<FrontEnd>,
    targets: Vec<String>,
}

impl Site {
    async fn start() -> Self {
        let port = target::start().await;
        let setup = Setup {
            nodes: NODES.map(|(name, kind)| (name.to_owned(), kind)).to_vec(),
            ports: vec![port],
            http2: true,
            master_config:
                "konnectivity: {unix: {path: konnectivity.sock}}\nsocks5: {unix: {path: socks5.sock}}\n\
                            proxy_urls: {unix: {path: proxy-urls.sock}}\n"
                    .to_owned(),
            ..Setup::default()
        };
        let targets = NODES.map(|(node, _)| format!("{node}:{port}")).to_vec();
        Self { front_end: Arc::new(FrontEnd::start(setup).await.unwrap()), targets }
    }

    fn socket(&self, name: &str) -> PathBuf {
        self.front_end.cluster.path().join(name)
    }

    /// Everything that callers do again and again.
    fn load(&self) -> Vec<Repeated> {
        let targets = self.targets.clone();
        let target = move |count: usize| targets[count % targets.len()].clone();
        let dials = Repeated::dials(self.front_end.cluster.doors().to_vec(), self.targets.clone());
        let konnectivity = Repeated::start("dials by gRPC", {
            let (door, target) = (Door::Unix(self.socket("konnectivity.sock")), target.clone());
            move |count| {
                let (door, target) = (door.clone(), target(count));
                async move {
                    by_konnectivity(&door, &target).await.map_err(|error| format!("{target}: {error:#}"))
                }
            }
        });
        let socks5 = Repeated::start("dials by SOCKS5", {
            let (socket, target) = (self.socket("socks5.sock"), target.clone());
            move |count| {
                let (socket, target) = (socket.clone(), target(count));
                async move { by_socks5(socket, &target).await.map_err(|error| format!("{target}: {error:#}")) }
            }
        });
        let urls = Repeated::start("requests by proxy URL", {
            let socket = self.socket("proxy-urls.sock");
            move |count| {
                let (socket, target) = (socket.clone(), target(count));
                async move { by_proxy_url(socket, &target).await.map_err(|error| format!("{target}: {error:#}")) }
            }
        });
        let fresh = Repeated::start("requests on connections of their own", {
            let front_end = self.front_end.clone();
            move |count| {
                let front_end = front_end.clone();
                let http = if count % 2 == 0 { Http::V1 } else { Http::V2 };
                async move {
                    let caller = front_end.caller(Credential::Token, http).await;
                    let mut caller = caller.map_err(|error| format!("{error:#}"))?;
                    version(&mut caller).await.map_err(|error| format!("{http:?}: {error:#}"))
                }
            }
        });
        let kept = [Http::V1, Http::V2].map(|http| {
            let (front_end, kept) = (self.front_end.clone(), Arc::<Mutex<Option<Caller>>>::default());
            Repeated::start(&format!("requests on a kept connection, {http:?}"), move |_| {
                let (front_end, kept) = (front_end.clone(), kept.clone());
                async move {
                    let mut kept = kept.lock().await;
                    // A connection that has been closed meanwhile takes no request, so another one does.
                    if let Some(caller) = kept.as_mut()
                        && version(caller).await.is_ok()
                    {
                        return Ok(());
                    }
                    let caller = front_end.caller(Credential::Token, http).await;
                    let caller = kept.insert(caller.map_err(|error| format!("{error:#}"))?);
                    version(caller).await.map_err(|error| format!("{error:#}"))
                }
            })
        });
        [dials, konnectivity, socks5, urls, fresh].into_iter().chain(kept).collect()
    }

    async fn echoes(&self) -> Vec<Stream> {
        let mut streams = Vec::new();
        for door in self.front_end.cluster.doors() {
            for target in &self.targets {
                streams.push(echo(&door, target).await);
            }
        }
        streams
    }

    async fn watch(&self, http: Http) -> Watch {
        let mut caller = self.front_end.caller(Credential::Token, http).await.unwrap();
        let request = Request::get("/api/v1/pods?watch=1").body(Full::default()).unwrap();
        let response = completes("a watch", caller.send(request)).await.unwrap();
        assert_eq!(response.status(), 200);
        Watch { body: response.into_body(), _caller: caller }
    }

    /// Something happens in the cluster, and all who watch it hear of that.
    async fn is_seen_by(&self, watches: &mut [Watch]) {
        let name = format!("pod-{}", rand::random::<u32>());
        let api = self.front_end.upstream.api();
        let pod = serde_json::json!({
            "apiVersion": "v1", "kind": "Pod", "metadata": {"namespace": "default", "name": name, "uid": name},
        });
        api.send(apiserver::Kind::Pods, "ADDED", pod);
        for watch in watches {
            watch.sees(&name).await;
        }
    }
}

/// A watch that goes on.
struct Watch {
    body: Incoming,
    _caller: Caller,
}

impl Watch {
    async fn sees(&mut self, name: &str) {
        let mut heard = Vec::new();
        while !String::from_utf8_lossy(&heard).contains(name) {
            let frame = completes("an event", self.body.frame()).await.expect("the watch ended").unwrap();
            heard.extend_from_slice(&frame.into_data().unwrap_or_default());
        }
    }
}

async fn version(caller: &mut Caller) -> anyhow::Result<()> {
    let answer = caller.get("/version").await?;
    anyhow::ensure!(answer.status == 200, "{}: {:?}", answer.status, answer.body);
    Ok(())
}

async fn by_konnectivity(door: &Door, target: &str) -> anyhow::Result<()> {
    let (mut call, id) = Connection::open(door).await?.dial(target).await?;
    call.data(id, REQUEST).await;
    let answer: Bytes = call.read(id).await?;
    anyhow::ensure!(answer.starts_with(b"HTTP/1.1 200"), "{answer:?}");
    Ok(())
}

async fn by_socks5(socket: PathBuf, target: &str) -> anyhow::Result<()> {
    let mut stream = UnixStream::connect(socket).await?;
    let (host, port) = target.split_once(':').unwrap();
    let mut request = vec![5, 1, 0, 5, 1, 0, 3, host.len() as u8];
    request.extend(host.as_bytes());
    request.extend(port.parse::<u16>()?.to_be_bytes());
    stream.write_all(&request).await?;
    let mut answer = [0; 12];
    stream.read_exact(&mut answer).await?;
    anyhow::ensure!(answer[..4] == [5, 0, 5, 0], "{answer:?}");
    let mut stream: Stream = Box::new(stream);
    Ok(get(&mut stream).await?)
}

async fn by_proxy_url(socket: PathBuf, target: &str) -> anyhow::Result<()> {
    let mut stream = UnixStream::connect(socket).await?;
    let (node, port) = target.split_once(':').unwrap();
    let request = format!(
        "GET /api/v1/nodes/http:{node}:{port}/proxy/ HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n"
    );
    stream.write_all(request.as_bytes()).await?;
    let mut answer = String::new();
    stream.read_to_string(&mut answer).await?;
    anyhow::ensure!(answer.starts_with("HTTP/1.1 200 "), "{answer:?}");
    Ok(())
}

async fn finish(load: Vec<Repeated>, least: usize) {
    for repeated in load {
        repeated.finish(least).await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn neither_dials_nor_requests_nor_watches_nor_streams_notice_reloads() {
    let site = Site::start().await;
    let cluster = &site.front_end.cluster;
    println!("without a reload:");
    let load = site.load();
    sleep(QUIET).await;
    finish(load, 50).await;

    let (mut held, mut watches) = (Vec::new(), Vec::new());
    let load = site.load();
    let mut processes = Vec::new();
    for _ in 0..times() {
        held.extend(site.echoes().await);
        for http in [Http::V1, Http::V2] {
            watches.push(site.watch(http).await);
        }
        processes.push(cluster.next_master().unwrap());
        for stream in &mut held {
            still_echoes(stream).await;
        }
        site.is_seen_by(&mut watches).await;
        sleep(PAUSE).await;
    }
    println!("while the master reloads {} times:", times());
    finish(load, 50).await;

    let load = site.load();
    for _ in 0..times() {
        held.extend(site.echoes().await);
        for index in 0..2 {
            processes.push(cluster.next_node(index).unwrap());
        }
        for stream in &mut held {
            still_echoes(stream).await;
        }
        site.is_seen_by(&mut watches).await;
        sleep(PAUSE).await;
    }
    println!("while each node-agent reloads {} times:", times());
    finish(load, 50).await;
}
