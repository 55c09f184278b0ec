//! Client certificates with chains that cost far more to verify than any honest one do not slow down the listeners that
//! ask for certificates.

use std::{
    net::SocketAddr,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

use bytes::Bytes;
use futures_util::future::join_all;
use http_body_util::Full;
use hyper::{Request, StatusCode};
use hyper_util::rt::{TokioExecutor, TokioIo};
use rustls::{ClientConfig, pki_types::ServerName};
use tests::{
    client::http_get,
    cluster::{Kind, optimized},
    figures,
    front_end::{Credential, FrontEnd, Http, Setup},
    pki::Strange,
    process::free_port,
    steady::Steady,
    target,
};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpStream,
    task::JoinSet,
};

const THIN: Strange = Strange::ManyPaths { extensions: 0 };
const FAT: Strange = Strange::ManyPaths { extensions: 210 };

/// Connections of strangers at once, and the requests of each.
const CONNECTIONS: usize = 4;
const REQUESTS: usize = 10;
/// How many connections a measurement of CPU time takes in all.
const ATTEMPTS: usize = 80;
/// How long a flood lasts beside honest callers.
const FLOOD: Duration = Duration::from_secs(3);
/// Seconds of CPU time by which a hostile chain may cost more than a self-signed certificate.
const MORE: f64 = 0.002;

/// Where strangers come.
#[derive(Clone, Debug)]
struct Way {
    name: &'static str,
    address: SocketAddr,
    speaks: Speaks,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Speaks {
    Http1,
    Http2,
    Connect,
}

struct World {
    front_end: Arc<FrontEnd>,
    ways: Vec<Way>,
    target: u16,
}

async fn world() -> World {
    let target = target::start().await;
    let konnectivity = SocketAddr::from(([127, 0, 0, 1], free_port()));
    let setup = Setup {
        nodes: vec![("n1".to_owned(), Kind::Dialled)],
        ports: vec![target],
        // A keep-alive that is late by a second ends the tunnel.
        master_config: format!(
            "tunnels: {{keepalive_interval: 1s, keepalive_max: 1}}\nkonnectivity: {{tls: {{listen: '{konnectivity}', \
             cert: server.crt, key: server.key, client_ca: ca.crt}}}}\n"
        ),
        ..Setup::default()
    };
    let front_end = Arc::new(FrontEnd::start(setup).await.unwrap());
    let connect = match &front_end.cluster.tls {
        tests::client::Door::Tls(address, _) => *address,
        tests::client::Door::Unix(_) => unreachable!(),
    };
    let ways = vec![
        Way { name: "HTTP/1.1", address: front_end.address, speaks: Speaks::Http1 },
        Way { name: "HTTP/2", address: front_end.address, speaks: Speaks::Http2 },
        Way { name: "local endpoint", address: front_end.cluster.local_endpoint(0), speaks: Speaks::Http2 },
        Way { name: "http_connect.tls", address: connect, speaks: Speaks::Connect },
        Way { name: "konnectivity.tls", address: konnectivity, speaks: Speaks::Http2 },
    ];
    World { front_end, ways, target }
}

impl World {
    fn config(&self, way: &Way, shown: Strange) -> Arc<ClientConfig> {
        // The test's CA issues the certificate of the front end, and the cluster's those of the other ports.
        let front_end = ["HTTP/1.1", "HTTP/2", "local endpoint"].contains(&way.name);
        let directory = if front_end { self.front_end.path() } else { self.front_end.cluster.path() };
        let mut config = shown.client_config(&directory.join("ca.crt")).unwrap();
        config.alpn_protocols = match way.speaks {
            Speaks::Http2 => vec![b"h2".to_vec()],
            Speaks::Http1 | Speaks::Connect => vec![b"http/1.1".to_vec()],
        };
        Arc::new(config)
    }

    /// Seconds of CPU time that the master has taken.
    fn cpu(&self) -> f64 {
        self.front_end.cluster.master.usage().cpu
    }

    /// The master's CPU time for a request, in seconds.
    async fn cost(&self, way: &Way, shown: Strange) -> f64 {
        let config = self.config(way, shown);
        let (before, requests) = (self.cpu(), AtomicU64::new(0));
        for _ in 0..ATTEMPTS / CONNECTIONS {
            let attempts = (0..CONNECTIONS).map(|_| async {
                requests.fetch_add(attempt(way, config.clone()).await.max(1), Ordering::Relaxed);
            });
            join_all(attempts).await;
        }
        (self.cpu() - before) / requests.into_inner() as f64
    }

    /// Honest callers, health checks and a tunnel beside strangers: the 99th percentile of the callers, and the slowest
    /// answer of `/livez`.
    async fn beside(&self, way: &Way, shown: Strange) -> (Duration, Duration) {
        let mut steady = Steady::start(&self.front_end.cluster, "n1", self.target).await.unwrap();
        let stop = Arc::new(AtomicBool::new(false));
        let mut honest: JoinSet<Vec<Duration>> = JoinSet::new();
        for credential in [Credential::Certificate, Credential::Token] {
            let (front_end, stop) = (self.front_end.clone(), stop.clone());
            honest.spawn(async move {
                let mut took = Vec::new();
                while !stop.load(Ordering::Relaxed) {
                    let began = Instant::now();
                    let mut caller = front_end.caller(credential, Http::V2).await.unwrap();
                    assert_eq!(caller.get("/echo").await.unwrap().status, StatusCode::OK);
                    took.push(began.elapsed());
                    tokio::time::sleep(Duration::from_millis(25)).await;
                }
                took
            });
        }
        let (admin, stopped) = (self.front_end.cluster.admin, stop.clone());
        let health = tokio::spawn(async move {
            let mut slowest = Duration::ZERO;
            while !stopped.load(Ordering::Relaxed) {
                let began = Instant::now();
                http_get(admin, "/livez").await.unwrap();
                slowest = slowest.max(began.elapsed());
                tokio::time::sleep(Duration::from_millis(25)).await;
            }
            slowest
        });
        let config = self.config(way, shown);
        let end = Instant::now() + FLOOD;
        let strangers = (0..CONNECTIONS).map(|_| async {
            while Instant::now() < end {
                attempt(way, config.clone()).await;
                steady_pace().await;
            }
        });
        join_all(strangers).await;
        stop.store(true, Ordering::Relaxed);
        steady.check(&self.front_end.cluster).await;
        let mut took = honest.join_all().await.concat();
        took.sort();
        (took[(took.len() - 1) * 99 / 100], health.await.unwrap())
    }
}

/// Strangers who come as fast as they can would measure the handshake, which both kinds of certificate have.
async fn steady_pace() {
    tokio::time::sleep(Duration::from_millis(10)).await;
}

/// One connection with as many requests as it allows; gives how many were answered.
async fn attempt(way: &Way, config: Arc<ClientConfig>) -> u64 {
    let once = async {
        let socket = TcpStream::connect(way.address).await?;
        let name = ServerName::try_from("localhost")?;
        let mut tls = tokio_rustls::TlsConnector::from(config).connect(name, socket).await?;
        match way.speaks {
            Speaks::Connect => {
                tls.write_all(b"CONNECT n1:1 HTTP/1.1\r\nHost: n1\r\n\r\n").await?;
                let mut answer = Vec::new();
                tls.read_to_end(&mut answer).await?;
                assert_eq!(String::from_utf8_lossy(&answer), "", "a stranger is answered");
                Ok(1)
            }
            Speaks::Http1 => {
                let (mut sender, connection) =
                    hyper::client::conn::http1::handshake(TokioIo::new(tls)).await?;
                let _connection = tokio::spawn(connection);
                for answered in 0..REQUESTS {
                    sender.ready().await?;
                    let request = Request::get("/echo").header("host", "localhost");
                    match sender.send_request(request.body(Full::<Bytes>::default())?).await {
                        Ok(response) => assert_eq!(response.status(), StatusCode::UNAUTHORIZED),
                        Err(_) => return Ok(answered as u64),
                    }
                }
                Ok(REQUESTS as u64)
            }
            Speaks::Http2 => {
                let (sender, connection) =
                    hyper::client::conn::http2::handshake(TokioExecutor::new(), TokioIo::new(tls)).await?;
                let requests = (0..REQUESTS).map(|_| {
                    let mut sender = sender.clone();
                    async move {
                        let request = Request::get("https://localhost/echo").body(Full::<Bytes>::default());
                        let response = sender.send_request(request.unwrap()).await;
                        response.is_ok_and(|response| {
                            assert_eq!(response.status(), StatusCode::UNAUTHORIZED);
                            true
                        })
                    }
                });
                // A request that the connection's end overtakes would wait for ever.
                tokio::select! {
                    answered = join_all(requests) => Ok(answered.into_iter().filter(|answered| *answered).count() as u64),
                    ended = connection => anyhow::Ok(ended.map(|()| 0)?),
                }
            }
        }
    };
    once.await.unwrap_or(0)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_strangers_chain_costs_little_more_than_a_certificate() {
    let world = world().await;
    for way in &world.ways {
        let base = world.cost(way, Strange::SelfSigned).await;
        for (name, chain) in [("thin", THIN), ("fat", FAT)] {
            let cost = world.cost(way, chain).await;
            figures::note(&format!(
                "a {name} chain over {}: {:.2} ms of CPU time a request, of a self-signed certificate {:.2}",
                way.name,
                cost * 1000.0,
                base * 1000.0
            ));
            // Without optimisation everything takes longer, and what this is about took seconds.
            let more = if optimized() { MORE } else { 20.0 * MORE };
            assert!(cost - base < more, "{} {name}: {cost} s, and {base} s", way.name);
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn honest_callers_and_tunnels_go_on_beside_strangers_chains() {
    let world = world().await;
    for way in &world.ways {
        let (usual, health) = world.beside(way, Strange::SelfSigned).await;
        let (p99, slowest) = world.beside(way, FAT).await;
        figures::note(&format!(
            "fat chains over {}: honest p99 {p99:?}, {:.2} x that beside self-signed certificates; slowest /livez {slowest:?}, \
             and {health:?}",
            way.name,
            p99.as_secs_f64() / usual.as_secs_f64()
        ));
        if optimized() {
            assert!(p99 < 3 * usual && slowest < Duration::from_millis(100), "{}", way.name);
        }
    }
}
