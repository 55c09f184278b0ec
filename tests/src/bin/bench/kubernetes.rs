//! Measures routing at the size of a large cluster, which has 5,000 nodes, 100,000 pods and 10,000 services of ten
//! endpoints each, and serves the API of clusters of other sizes.

use std::{
    convert::Infallible,
    net::{Ipv4Addr, SocketAddr},
    path::Path as File,
    process::Command,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

use bytes::Bytes;
use futures_util::stream;
use http_body_util::{BodyExt, Full, StreamBody, combinators::BoxBody};
use hyper::{Request, Response, body::Frame, body::Incoming, service::service_fn};
use hyper_util::rt::TokioIo;
use master_agent::routing::{
    Routes,
    cluster::{Endpoint, EndpointSlice, Kind, Node, Object, Pod, Service, ServicePort},
};
use proto_config::secret_file;
use rand::{RngExt, SeedableRng, rngs::StdRng};
use serde_json::{Value, json};
use tests::{
    client::Door,
    cluster::{Cluster, Kind as NodeKind, Options},
    openssh,
    process::{Process, TempDir, Usage, eventually, free_port},
    target,
};

use super::{
    report::{Figure, by, median, percentile},
    work::get,
};

/// How many nodes a cluster has; it has 20 pods and two services for each.
#[derive(Clone, Copy)]
pub struct Size {
    pub nodes: u32,
}

const LARGE: Size = Size { nodes: 5_000 };
const ENDPOINTS: u32 = 10;

impl Size {
    fn pods(self) -> u32 {
        self.nodes * 20
    }

    pub fn services(self) -> u32 {
        self.nodes * 2
    }

    /// Of any pod; pod `i` below the number of nodes is on node `i`.
    pub fn pod_address(self, pod: u32) -> Ipv4Addr {
        let (node, index) = (pod % self.nodes, pod / self.nodes);
        Ipv4Addr::from(0x0a00_0000 + (node << 8) + index + 2)
    }

    /// Waits until a master has listed all of it.
    pub async fn until_listed(self, admin: SocketAddr) {
        eventually("the cluster is listed", Duration::from_secs(120), async || {
            let metrics = tests::client::http_get(admin, "/metrics").await.ok()?;
            let pods = format!("kubernetes_objects{{kind=\"pods\"}} {}", self.pods());
            let slices = format!("kubernetes_objects{{kind=\"endpointslices\"}} {}", self.services());
            (metrics.contains(&pods) && metrics.contains(&slices)).then_some(())
        })
        .await;
    }
}

pub fn service_address(service: u32) -> Ipv4Addr {
    Ipv4Addr::from(0xac10_0000 + service + 1)
}

fn node(i: u32) -> Object {
    Object::Node(Node {
        name: format!("node-{i}").parse().expect("a node name"),
        created: i64::from(i),
        addresses: vec![Ipv4Addr::from(0xc0a8_0000 + i + 1).into()],
        cidrs: vec![format!("{}/24", Ipv4Addr::from(0x0a00_0000 + (i << 8))).parse().expect("a network")],
        kubelet_port: 10250,
    })
}

fn pod(size: Size, i: u32) -> Object {
    Object::Pod(Pod {
        key: format!("default/app-{i}-7d9f8b6c5-x2x4z").into(),
        created: i64::from(i),
        node: format!("node-{}", i % size.nodes).parse().ok(),
        addresses: vec![size.pod_address(i).into()],
        host_network: false,
        ended: false,
        first_port: Some(8080),
    })
}

fn service(i: u32) -> Object {
    Object::Service(Service {
        key: format!("default/service-{i}").into(),
        created: i64::from(i),
        addresses: vec![service_address(i).into()],
        ports: vec![ServicePort { name: "http".to_owned(), port: 80 }],
        external_name: None,
    })
}

fn slice(size: Size, i: u32) -> Object {
    let endpoint = |n: u32| {
        let pod = (i * ENDPOINTS + n) % size.pods();
        let node = format!("node-{}", pod % size.nodes).parse().ok();
        Endpoint { address: size.pod_address(pod).into(), node, hostname: None, ready: true }
    };
    Object::EndpointSlice(EndpointSlice {
        key: format!("default/service-{i}-abcde").into(),
        service: format!("default/service-{i}").into(),
        ports: vec![("http".to_owned(), Some(8080))],
        endpoints: (0..ENDPOINTS).map(endpoint).collect(),
    })
}

/// Time of look-ups and of updates in microseconds at the 99th percentile, and the table's memory.
pub fn table() -> [(&'static str, Figure); 3] {
    let before = Usage::of(std::process::id()).memory;
    let mut routes = Routes { cluster_domain: "cluster.local".to_owned(), ..Routes::default() };
    let (nodes, pods, services) = (LARGE.nodes, LARGE.pods(), LARGE.services());
    let (pod, slice) = (|i| pod(LARGE, i), |i| slice(LARGE, i));
    let all = (0..nodes).map(node).chain((0..pods).map(pod));
    for object in all.chain((0..services).map(service)).chain((0..services).map(slice)) {
        routes.cluster.apply(object);
    }
    let memory = Usage::of(std::process::id()).memory.saturating_sub(before) as f64 / 1e6;

    let mut rng = StdRng::seed_from_u64(1);
    let mut lookups = Vec::new();
    for i in 0..200_000u32 {
        let text = match i % 5 {
            0 => format!("node-{}:10250", rng.random_range(0..nodes)),
            1 => format!("{}:8080", LARGE.pod_address(rng.random_range(0..pods))),
            2 => format!("{}:80", service_address(rng.random_range(0..services))),
            3 => format!("service-{}.default.svc.cluster.local:80", rng.random_range(0..services)),
            _ => format!("10.{}.{}.200:1", rng.random_range(0..19), rng.random_range(0..256)),
        };
        let target = text.parse().expect("a target");
        let began = Instant::now();
        let found = routes.find(&target);
        lookups.push(began.elapsed().as_secs_f64() * 1e6);
        assert!(found.is_ok(), "{text}: {found:?}");
    }
    let mut updates = Vec::new();
    for i in 0..50_000u32 {
        let object = match i % 3 {
            0 => pod(rng.random_range(0..pods)),
            1 => slice(rng.random_range(0..services)),
            _ => node(rng.random_range(0..nodes)),
        };
        let began = Instant::now();
        if i % 7 == 0 {
            routes.cluster.remove(object.kind(), &object.key());
        }
        routes.cluster.apply(object);
        updates.push(began.elapsed().as_secs_f64() * 1e6);
    }
    assert_eq!(routes.cluster.count(Kind::Pods), pods as usize);
    [
        ("route_lookup_p99", Figure::alone("us", percentile(lookups, 0.99))),
        ("route_update_p99", Figure::alone("us", percentile(updates, 0.99))),
        ("route_memory", Figure::alone("MB", Some(memory))),
    ]
}

/// The 99th percentile of new connections while the watched cluster is at rest (`direct`) and while a hundred pods
/// change every second (`ours`), and the memory of a master-agent that follows it.
pub async fn dials(rounds: usize, count: usize) -> anyhow::Result<[(&'static str, Figure); 2]> {
    let dir = TempDir::new("bench-kubernetes")?;
    let (api, target_port) = (free_port(), free_port());
    let _api = start_api(api, LARGE, dir.path())?;
    target::serve(SocketAddr::from(([127, 0, 0, 1], target_port))).await?;
    let kubeconfig = dir.path().join("kubeconfig");
    secret_file::replace(&kubeconfig, kubeconfig_for(api).as_bytes())?;
    let cluster = Cluster::start(Options {
        nodes: vec![("n1".to_owned(), NodeKind::Dialled)],
        ports: vec![target_port],
        master_config: format!("log: {{level: warn}}\nkubernetes: {{kubeconfig: {}}}", kubeconfig.display()),
        node_config: "log: {level: warn}".to_owned(),
        ..Options::default()
    })
    .await?;
    LARGE.until_listed(cluster.admin).await;
    let memory = cluster.master.usage().memory as f64 / 1e6;
    let target = SocketAddr::from(([127, 0, 0, 1], target_port)).to_string();
    let (mut rest, mut busy) = (Vec::new(), Vec::new());
    for round in 0..rounds * 2 {
        let rate = if round % 2 == 0 { 0 } else { 100 };
        let api = SocketAddr::from(([127, 0, 0, 1], api));
        tests::client::http_get(api, &format!("/rate/{rate}")).await?;
        tokio::time::sleep(Duration::from_millis(200)).await;
        let values = if rate == 0 { &mut rest } else { &mut busy };
        values.extend(percentile(latencies(&cluster.unix, &target, count).await?, 0.99));
    }
    let (rest, busy) = (median(rest), median(busy));
    let dials = Figure { direct: rest, ratio: by(busy, rest), ..Figure::alone("us", busy) };
    Ok([("dial_p99_100_updates", dials), ("watch_memory", Figure::alone("MB", Some(memory)))])
}

/// At a steady pace, so that both runs last equally long and see equally many updates.
async fn latencies(door: &Door, target: &str, count: usize) -> anyhow::Result<Vec<f64>> {
    let mut times = Vec::with_capacity(count);
    let mut pace = tokio::time::interval(Duration::from_millis(1));
    for _ in 0..count {
        pace.tick().await;
        let began = Instant::now();
        let mut stream = door.stream(target).await?;
        get(&mut stream).await?;
        times.push(began.elapsed().as_secs_f64() * 1e6);
    }
    Ok(times)
}

/// A process that serves the API of a cluster of that size.
pub fn start_api(port: u16, size: Size, directory: &File) -> anyhow::Result<Process> {
    let mut serve = Command::new(std::env::current_exe()?);
    serve.args(["--apiserver", &port.to_string(), &size.nodes.to_string()]);
    let process = Process::start("apiserver", &mut serve, &directory.join("apiserver.log"))?;
    openssh::wait_for_port(port)?;
    Ok(process)
}

pub fn kubeconfig_for(port: u16) -> String {
    format!(
        "apiVersion: v1\nkind: Config\ncurrent-context: c\n\
         clusters: [{{name: c, cluster: {{server: 'http://127.0.0.1:{port}'}}}}]\n\
         contexts: [{{name: c, context: {{cluster: c, user: u}}}}]\nusers: [{{name: u, user: {{}}}}]\n"
    )
}

/// An API server of that cluster, whose pods change as often as `/rate/N` says.
pub async fn serve(port: u16, size: Size) -> anyhow::Result<()> {
    let listener = tokio::net::TcpListener::bind(("127.0.0.1", port)).await?;
    let rate = Arc::new(AtomicU64::new(0));
    loop {
        let (socket, _) = listener.accept().await?;
        let rate = rate.clone();
        tokio::spawn(async move {
            let service = service_fn(move |request: Request<Incoming>| {
                let rate = rate.clone();
                async move { Ok::<_, Infallible>(answer(size, &request, &rate)) }
            });
            let http = hyper::server::conn::http1::Builder::new();
            let _ = http.serve_connection(TokioIo::new(socket), service).await;
        });
    }
}

fn answer(
    size: Size,
    request: &Request<Incoming>,
    rate: &Arc<AtomicU64>,
) -> Response<BoxBody<Bytes, Infallible>> {
    let (path, query) = (request.uri().path(), request.uri().query().unwrap_or_default());
    if let Some(wanted) = path.strip_prefix("/rate/") {
        rate.store(wanted.parse().unwrap_or(0), Ordering::Relaxed);
        return Response::new(Full::new(Bytes::from("ok\n")).boxed());
    }
    let resource = path.rsplit('/').next().unwrap_or_default();
    if query.contains("watch=") {
        let changes = resource == "pods";
        let events = stream::unfold((rate.clone(), 0u32), move |(rate, sent)| async move {
            tokio::time::sleep(Duration::from_millis(10)).await;
            let mut lines = String::new();
            let count = if changes { rate.load(Ordering::Relaxed) / 100 } else { 0 };
            for i in 0..count as u32 {
                let mut object = pod_json(size, (sent + i).wrapping_mul(7919) % size.pods());
                object["metadata"]["resourceVersion"] = json!((sent + i + 2).to_string());
                lines += &format!("{}\n", json!({"type": "MODIFIED", "object": object}));
            }
            let frame = Frame::data(Bytes::from(lines));
            Some((Ok::<_, Infallible>(frame), (rate, sent + count as u32)))
        });
        return Response::new(BodyExt::boxed(StreamBody::new(Box::pin(events))));
    }
    let page = |all: u32, make: &dyn Fn(u32) -> Value| -> (Vec<Value>, String) {
        let parameter = |name: &str| {
            query.split('&').find_map(|p| p.strip_prefix(name)?.strip_prefix('=')?.parse::<u32>().ok())
        };
        let from = parameter("continue").unwrap_or(0);
        let to = (from + parameter("limit").unwrap_or(all)).min(all);
        ((from..to).map(make).collect(), if to < all { to.to_string() } else { String::new() })
    };
    let (items, more) = match resource {
        "nodes" => page(size.nodes, &node_json),
        "pods" => page(size.pods(), &|i| pod_json(size, i)),
        "services" => page(size.services(), &service_json),
        _ => page(size.services(), &|i| slice_json(size, i)),
    };
    let list = json!({
        "kind": "List", "apiVersion": "v1", "metadata": {"resourceVersion": "1", "continue": more}, "items": items,
    });
    Response::new(Full::new(Bytes::from(list.to_string())).boxed())
}

fn node_json(i: u32) -> Value {
    json!({
        "metadata": {"name": format!("node-{i}"), "creationTimestamp": "2026-01-01T00:00:00Z"},
        "spec": {"podCIDRs": [format!("{}/24", Ipv4Addr::from(0x0a00_0000 + (i << 8)))]},
        "status": {"addresses": [{"type": "InternalIP", "address": Ipv4Addr::from(0xc0a8_0000 + i + 1)}]},
    })
}

fn pod_json(size: Size, i: u32) -> Value {
    json!({
        "metadata": {
            "name": format!("app-{i}-7d9f8b6c5-x2x4z"), "namespace": "default",
            "labels": {"app": format!("app-{i}"), "pod-template-hash": "7d9f8b6c5"},
            "creationTimestamp": "2026-01-01T00:00:00Z",
        },
        "spec": {
            "nodeName": format!("node-{}", i % size.nodes),
            "containers": [{"name": "app", "image": "example/app:1", "ports": [{"containerPort": 8080}]}],
        },
        "status": {"phase": "Running", "podIP": size.pod_address(i), "podIPs": [{"ip": size.pod_address(i)}]},
    })
}

fn service_json(i: u32) -> Value {
    json!({
        "metadata": {"name": format!("service-{i}"), "namespace": "default"},
        "spec": {
            "clusterIP": service_address(i), "clusterIPs": [service_address(i)],
            "ports": [{"name": "http", "port": 80, "targetPort": 8080}],
        },
    })
}

fn slice_json(size: Size, i: u32) -> Value {
    let endpoints: Vec<Value> = (0..ENDPOINTS)
        .map(|n| {
            let pod = (i * ENDPOINTS + n) % size.pods();
            json!({
                "addresses": [size.pod_address(pod)], "conditions": {"ready": true},
                "nodeName": format!("node-{}", pod % size.nodes),
            })
        })
        .collect();
    json!({
        "metadata": {
            "name": format!("service-{i}-abcde"), "namespace": "default",
            "labels": {"kubernetes.io/service-name": format!("service-{i}")},
        },
        "addressType": "IPv4", "endpoints": endpoints, "ports": [{"name": "http", "port": 8080}],
    })
}
