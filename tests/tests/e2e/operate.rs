//! What who runs the agents relies on: health, metrics, logs, signals, the inventory, systemd.

use std::{
    collections::{BTreeMap, BTreeSet},
    fmt,
    net::SocketAddr,
    os::unix::fs::{FileTypeExt, MetadataExt, PermissionsExt},
    path::Path,
    process::Command,
    time::{Duration, Instant},
};

use serde::de::{Deserialize, Deserializer, MapAccess, Visitor};
use serde_json::Value;
use tests::{
    client::{Door, Stream},
    cluster::{Cluster, Kind, Options, SOON, addresses, binary},
    metrics::{Metrics, OPEN_METRICS, assert_golden, documented, scrape},
    pattern::{Checker, fill},
    pki::client_config,
    process::{Process, TempDir, eventually, free_port},
    relay::Relay,
    target,
};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpListener, TcpSocket, TcpStream, UnixDatagram, UnixStream},
};

/// Longer than any drain here takes on a machine that does other things as well.
const PATIENCE: Duration = Duration::from_secs(60);

fn local(port: u16) -> SocketAddr {
    SocketAddr::from(([127, 0, 0, 1], port))
}

fn nodes(nodes: &[(&str, Kind)]) -> Vec<(String, Kind)> {
    nodes.iter().map(|(name, kind)| ((*name).to_owned(), *kind)).collect()
}

struct Answer {
    status: u16,
    body: String,
}

async fn http(address: SocketAddr, request: &str) -> Option<Answer> {
    let mut socket = TcpStream::connect(address).await.ok()?;
    let request = format!("{request} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n");
    socket.write_all(request.as_bytes()).await.ok()?;
    let mut text = String::new();
    socket.read_to_string(&mut text).await.ok()?;
    let (head, body) = text.split_once("\r\n\r\n")?;
    Some(Answer { status: head.split(' ').nth(1)?.parse().ok()?, body: body.to_owned() })
}

/// Waits until `GET path` gives a status, and gives the body.
async fn until(address: SocketAddr, path: &str, status: u16) -> String {
    eventually(&format!("{address}{path} answers {status}"), SOON, async || {
        let answer = http(address, &format!("GET {path}")).await?;
        (answer.status == status).then_some(answer.body)
    })
    .await
}

async fn logged(process: &Process, text: &str) {
    eventually(&format!("{} logs {text:?}", process.name), SOON, async || {
        process.log_text().contains(text).then_some(())
    })
    .await;
}

/// Opens a stream to an echo server and proves that it works.
async fn echo(door: &Door, target: &str) -> Stream {
    let mut stream = door.stream(target).await.unwrap();
    stream.write_all(b"echo\n").await.unwrap();
    still_echoes(&mut stream).await;
    stream
}

async fn still_echoes(stream: &mut Stream) {
    let sent: [u8; 16] = rand::random();
    stream.write_all(&sent).await.unwrap();
    let mut got = [0; 16];
    tokio::time::timeout(SOON, stream.read_exact(&mut got)).await.expect("an echo").unwrap();
    assert_eq!(got, sent);
}

/// A download that has begun.
struct Download {
    stream: Stream,
    checker: Checker,
    bytes: u64,
}

impl Download {
    async fn begin(door: &Door, target: &str, bytes: u64) -> Self {
        let mut stream = door.stream(target).await.unwrap();
        stream.write_all(format!("source {bytes}\n").as_bytes()).await.unwrap();
        let mut first = [0; 1024];
        stream.read_exact(&mut first).await.unwrap();
        let mut checker = Checker::default();
        checker.check(&first);
        Self { stream, checker, bytes }
    }

    async fn finish(mut self) {
        let mut buffer = vec![0; 256 * 1024];
        loop {
            let n =
                tokio::time::timeout(PATIENCE, self.stream.read(&mut buffer)).await.expect("bytes").unwrap();
            if n == 0 {
                break;
            }
            self.checker.check(&buffer[..n]);
        }
        assert_eq!(self.checker.offset(), self.bytes, "the download is cut short");
        // A TLS caller that just left would count as cut off.
        let _ = self.stream.shutdown().await;
    }
}

/// New streams get no further than to a refusal.
async fn closed(door: &Door, target: &str) {
    eventually(&format!("the {} door takes no new streams", door.name()), SOON, async || {
        match door.connect(target).await {
            Err(_) => Some(()),
            Ok(Err(refused)) => {
                assert_eq!(refused.status, 503, "{}", refused.reason);
                Some(())
            }
            Ok(Ok(_)) => None,
        }
    })
    .await;
}

async fn port_closes(address: SocketAddr) {
    eventually(&format!("nothing listens on {address}"), SOON, async || {
        TcpStream::connect(address).await.err()
    })
    .await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_masters_health_follows_its_tunnels() {
    let options = Options {
        nodes: nodes(&[("n1", Kind::Dialled), ("n2", Kind::CallHome)]),
        nodes_down: true,
        ..Options::default()
    };
    let mut cluster = Cluster::start(options).await.unwrap();
    let admin = cluster.admin;
    assert_eq!(until(admin, "/livez", 200).await, "ok\n");
    assert_eq!(until(admin, "/readyz", 503).await, "not ready: none of 2 nodes is connected\n");
    cluster.start_node(0).unwrap();
    assert_eq!(until(admin, "/readyz", 200).await, "ok\n");
    let node = cluster.nodes[0].admin;
    assert_eq!(
        (until(node, "/livez", 200).await, until(node, "/readyz", 200).await),
        ("ok\n".into(), "ok\n".into())
    );
    cluster.nodes[0].process.as_mut().unwrap().kill();
    until(admin, "/readyz", 503).await;
    until(admin, "/livez", 200).await;
    cluster.start_node(1).unwrap();
    until(admin, "/readyz", 200).await;
    for (address, request, status) in [
        (admin, "GET /nonesuch", 404),
        (admin, "POST /livez", 405),
        (cluster.nodes[1].admin, "GET /nonesuch", 404),
    ] {
        assert_eq!(http(address, request).await.unwrap().status, status, "{request}");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_node_that_only_calls_home_is_ready_with_a_master() {
    let mut cluster =
        Cluster::start(Options { nodes: nodes(&[("n1", Kind::CallHome)]), ..Options::default() })
            .await
            .unwrap();
    let node = cluster.nodes[0].admin;
    until(node, "/readyz", 200).await;
    cluster.master.kill();
    assert_eq!(until(node, "/readyz", 503).await, "not ready: no master is connected\n");
    until(node, "/livez", 200).await;
    cluster.restart_master().unwrap();
    until(node, "/readyz", 200).await;
}

fn labels(metrics: Metrics) -> BTreeMap<String, BTreeSet<String>> {
    metrics.into_iter().map(|(name, metric)| (name, metric.labels)).collect()
}

fn documented_of(prefix: &str) -> BTreeMap<String, BTreeSet<String>> {
    documented().into_iter().filter(|(name, _)| name.starts_with(prefix)).collect()
}

/// By somebody it knows, who also wants to be somebody else, and by strangers until they are too many.
async fn front_end_is_called(cluster: &Cluster, front_end: SocketAddr) {
    let ca = cluster.path().join("ca.crt");
    for (shown, header, status) in [
        (true, "", "HTTP/1.1 200"),
        (true, "Impersonate-User: root\r\n", "HTTP/1.1 403"),
        (false, "", "HTTP/1.1 401"),
        (false, "", "HTTP/1.1 401"),
        (false, "", "HTTP/1.1 429"),
    ] {
        let identity = shown.then_some((cluster.path(), "kube-apiserver"));
        let door = Door::Tls(front_end, client_config(&ca, identity).unwrap());
        let mut stream = door.enter().await.unwrap();
        let request = format!("GET /api HTTP/1.1\r\nHost: localhost\r\n{header}Connection: close\r\n\r\n");
        stream.write_all(request.as_bytes()).await.unwrap();
        let mut answer = String::new();
        let _ = stream.read_to_string(&mut answer).await;
        assert!(answer.starts_with(status), "{answer}");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_metrics_are_those_of_the_guide() {
    let (port, closed_port) = (target::start().await, free_port());
    let api = tests::apiserver::ApiServer::start().await.unwrap();
    let kubeconfig = api.directory().join("kubeconfig");
    api.write_kubeconfig(&kubeconfig).unwrap();
    let front_end = local(free_port());
    let mut cluster = Cluster::start(Options {
        nodes: nodes(&[("n1", Kind::Dialled), ("n2", Kind::CallHome)]),
        ports: vec![port, closed_port],
        local_endpoints: vec![local(free_port()), local(free_port())],
        // Certificates are renewed when a third of this is left.
        master_config: format!(
            "certificates: {{host_ttl: 20s}}\nkubernetes: {{kubeconfig: '{}'}}\n\
             front_end:\n  listen: '{front_end}'\n  limits: {{failures_per_second_per_address: 1}}\n  certificates: [{{cert: server.crt, key: server.key}}]\n  \
             authentication: [{{x509: {{ca: ca.crt}}}}]\n  upstream: {{servers: ['http://127.0.0.1:{port}']}}\n",
            kubeconfig.display(),
        ),
        nodes_down: true,
        ..Options::default()
    })
    .await
    .unwrap();
    cluster.wait_state("n1", "retrying").await;
    cluster.start_node(0).unwrap();
    cluster.start_node(1).unwrap();
    cluster.wait_connected().await;
    for door in cluster.doors() {
        for node in ["n1", "n2"] {
            let mut stream = door.stream(&format!("{node}:{port}")).await.unwrap();
            stream.write_all(b"source 1000\n").await.unwrap();
            let mut all = Vec::new();
            stream.read_to_end(&mut all).await.unwrap();
            assert_eq!(all.len(), 1000);
            drop(stream);
            for (target, status) in [
                (format!("{node}:{closed_port}"), 502),
                (format!("{node}:1"), 403),
                ("192.0.2.1:1".into(), 502),
            ] {
                let refused = door.connect(&target).await.unwrap().err().expect("a refusal");
                assert_eq!(refused.status, status, "{target}: {}", refused.reason);
            }
        }
        let mut caller = door.enter().await.unwrap();
        caller.write_all(b"GET / HTTP/1.1\r\n\r\n").await.unwrap();
        assert_eq!(tests::client::read_head(&mut caller).await.unwrap().0, 405);
    }
    // No TLS, so the front end answers with an alert.
    let mut caller = TcpStream::connect(cluster.local_endpoint(1)).await.unwrap();
    caller.write_all(b"GET / HTTP/1.1\r\n\r\n").await.unwrap();
    caller.shutdown().await.unwrap();
    let _ = caller.read_to_end(&mut Vec::new()).await;
    let mut stranger = TcpStream::connect(local(cluster.nodes[0].port)).await.unwrap();
    stranger.write_all(b"GET / HTTP/1.1\r\n\r\n").await.unwrap();
    stranger.shutdown().await.unwrap();
    let _ = stranger.read_to_end(&mut Vec::new()).await;
    let inventory = cluster.path().join("inventory.yaml");
    let good = std::fs::read_to_string(&inventory).unwrap();
    for (text, reason) in [("nodes: 1\n", "failed"), (&good, "ok")] {
        std::fs::write(&inventory, text).unwrap();
        cluster.master.signal("HUP");
        let name = format!("master_agent_inventory_reloads_total{{reason=\"{reason}\"}}");
        eventually(&name, SOON, async || cluster.metric(cluster.admin, &name).await.ok()).await;
    }
    let bad_line = format!("node-agent join {} --ca-pin SHA256:x --token mat1.x", cluster.call_home);
    cluster.node_command(1, &bad_line).unwrap_err();
    let token = cluster.command(&["token", "create"]).unwrap().replace("mat1.", "mat1.x");
    cluster.node_command(1, token.trim()).unwrap_err();
    let renewed = "node_agent_certificate_renewals_total{result=\"ok\"}";
    for node in &cluster.nodes {
        eventually(renewed, PATIENCE, async || cluster.metric(node.admin, renewed).await.ok()).await;
    }
    cluster.nodes[0].process.as_mut().unwrap().kill();
    cluster.start_node(0).unwrap();
    let lost = async || {
        (cluster.total(cluster.admin, "master_agent_tunnels_lost_total").await.ok()? >= 1.0).then_some(())
    };
    eventually("the tunnel was lost", SOON, lost).await;
    cluster.wait_connected().await;

    front_end_is_called(&cluster, front_end).await;
    let scraped = scrape(cluster.admin, OPEN_METRICS).await.unwrap();
    assert_golden(&scraped.metrics(), "master-agent");
    assert_eq!(labels(scraped.metrics()), documented_of("master_agent_"));
    for (sample, value) in [
        ("master_agent_stream_bytes_total{egress=\"connect-unix\",direction=\"up\"}", 24.0),
        ("master_agent_stream_bytes_total{egress=\"connect-tls\",direction=\"down\"}", 2000.0),
        ("master_agent_dials_total{egress=\"connect-unix\",result=\"ok\",fault=\"none\"}", 2.0),
        ("master_agent_dials_total{egress=\"connect-tls\",result=\"policy\",fault=\"policy\"}", 2.0),
        ("master_agent_dials_total{egress=\"connect-unix\",result=\"refused\",fault=\"target\"}", 2.0),
        ("master_agent_dials_total{egress=\"connect-unix\",result=\"no_route\",fault=\"route\"}", 2.0),
        ("master_agent_dial_duration_seconds_count", 4.0),
        ("master_agent_bad_requests_total{egress=\"connect-unix\"}", 1.0),
        ("master_agent_streams{egress=\"connect-unix\"}", 0.0),
        ("master_agent_joins_total{reason=\"ok\"}", 2.0),
        ("master_agent_joins_total{reason=\"refused\"}", 1.0),
        ("master_agent_nodes", 2.0),
        ("master_agent_nodes_connected", 2.0),
        ("master_agent_tunnels_lost_total{reason=\"link\"}", 1.0),
        ("master_agent_node_absence_seconds_count", 1.0),
        ("master_agent_node_reconnects_total{node=\"n1\"}", 1.0),
        ("master_agent_node_reconnects_total{node=\"n2\"}", 0.0),
        ("master_agent_stream_size_bytes_sum{egress=\"connect-tls\",direction=\"down\"}", 2000.0),
        ("master_agent_stream_duration_seconds_count{egress=\"connect-unix\"}", 2.0),
        ("master_agent_policy_refusals_total{rule=\"loopback\"}", 4.0),
        ("master_agent_node_dials_failed_total{node=\"n1\",fault=\"policy\"}", 2.0),
        ("master_agent_front_end_requests_total{code=\"2xx\",outcome=\"served\"}", 1.0),
        ("master_agent_front_end_requests_total{code=\"4xx\",outcome=\"forbidden\"}", 1.0),
        ("master_agent_front_end_requests_total{code=\"4xx\",outcome=\"unauthenticated\"}", 2.0),
        ("master_agent_front_end_requests_total{code=\"4xx\",outcome=\"limited\"}", 1.0),
        ("master_agent_front_end_authentications_total{authenticator=\"x509\",result=\"ok\"}", 2.0),
        ("master_agent_front_end_limited_total{limit=\"failures_per_address\"}", 1.0),
    ] {
        assert_eq!(cluster.metric(cluster.admin, &format!("{sample} ")).await.unwrap(), value, "{sample}");
    }
    let certificates: BTreeSet<&str> = scraped
        .text
        .lines()
        .filter_map(|line| {
            line.strip_prefix("master_agent_certificate_expiry_timestamp_seconds{certificate=\"")
        })
        .filter_map(|rest| rest.split('"').next())
        .collect();
    let wanted =
        ["ssh_user", "node_hosts", "connect", "connect_client_ca", "front_end", "front_end_client_ca"];
    assert_eq!(certificates, BTreeSet::from(wanted));
    // The node that was not restarted; its counters, and the other's which strangers came to.
    let called_home = scrape(cluster.nodes[1].admin, OPEN_METRICS).await.unwrap();
    assert_golden(&called_home.metrics(), "node-agent");
    assert_eq!(labels(called_home.metrics()), documented_of("node_agent_"));
    for (sample, value) in [
        ("node_agent_stream_bytes_total{direction=\"up\"}", 24.0),
        ("node_agent_stream_bytes_total{direction=\"down\"}", 2000.0),
        ("node_agent_dials_total{result=\"ok\"}", 2.0),
        ("node_agent_policy_refusals_total{rule=\"", 2.0),
        ("node_agent_streams ", 0.0),
        ("node_agent_sessions ", 1.0),
        ("node_agent_handshakes_total{result=\"ok\"}", 1.0),
        ("node_agent_front_end_callers_total{result=\"ok\"}", 1.0),
        ("node_agent_front_end_stream_bytes_total{direction=\"up\"}", 18.0),
        ("node_agent_front_end_streams ", 0.0),
    ] {
        assert_eq!(cluster.metric(cluster.nodes[1].admin, sample).await.unwrap(), value, "{sample}");
    }
}

/// The members of a JSON object, with those of its objects; fails where a name stands twice.
#[derive(Debug)]
struct Record(BTreeMap<String, Value>, Vec<String>);

impl<'de> Deserialize<'de> for Record {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Members;
        impl<'de> Visitor<'de> for Members {
            type Value = Record;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("an object")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Record, A::Error> {
                let mut record = Record(BTreeMap::new(), Vec::new());
                while let Some((name, value)) = map.next_entry::<String, Value>()? {
                    if record.0.insert(name.clone(), value).is_some() {
                        record.1.push(name);
                    }
                }
                Ok(record)
            }
        }
        deserializer.deserialize_map(Members)
    }
}

impl Record {
    /// A field of the event, or of the span that it is in.
    fn field(&self, name: &str) -> &Value {
        let in_span = self.0.get("span").and_then(|s| s.get(name));
        in_span.or_else(|| self.0.get(name)).unwrap_or(&Value::Null)
    }
}

fn records(process: &Process) -> Vec<Record> {
    let text = process.log_text();
    text.lines()
        .map(|line| serde_json::from_str(line).unwrap_or_else(|e| panic!("{}: {e}: {line}", process.name)))
        .collect()
}

/// Streams through two nodes and both doors, and the processes that carried them, which have ended.
async fn recorded() -> (u16, Cluster) {
    let port = target::start().await;
    let json = "log: {format: json}\nshutdown_grace: 1s".to_owned();
    let mut cluster = Cluster::start(Options {
        nodes: nodes(&[("n1", Kind::Dialled), ("n2", Kind::CallHome)]),
        ports: vec![port],
        master_config: json.clone(),
        node_config: json,
        ..Options::default()
    })
    .await
    .unwrap();
    for (door, node) in [(&cluster.unix, "n1"), (&cluster.tls, "n2")] {
        let target = format!("{node}:{port}");
        Download::begin(door, &target, 100_000).await.finish().await;
        let mut upload = door.stream(&target).await.unwrap();
        let mut bytes = vec![0; 50_000];
        fill(&mut bytes, 0);
        upload.write_all(b"sink\n").await.unwrap();
        upload.write_all(&bytes).await.unwrap();
        upload.shutdown().await.unwrap();
        let mut answer = String::new();
        upload.read_to_string(&mut answer).await.unwrap();
        assert_eq!(answer, "50000\n");
        door.connect(&format!("{node}:1")).await.unwrap().err().expect("a refusal");
    }
    for (process, streams) in [
        (&cluster.master, 4),
        (cluster.nodes[0].process.as_ref().unwrap(), 2),
        (cluster.nodes[1].process.as_ref().unwrap(), 2),
    ] {
        eventually("every stream has its record", SOON, async || {
            (process.log_text().matches("stream ended").count() >= streams).then_some(())
        })
        .await;
    }
    for process in cluster.nodes.iter_mut().map(|n| n.process.as_mut().unwrap()).chain([&mut cluster.master])
    {
        process.signal("TERM");
        assert_eq!(process.wait(PATIENCE).unwrap(), Some(0));
    }
    (port, cluster)
}

fn stream_records(process: &Process) -> Vec<Record> {
    records(process).into_iter().filter(|r| r.0.get("message").is_some_and(|m| m == "stream ended")).collect()
}

const DOWNLOAD: (u64, u64) = (b"source 100000\n".len() as u64, 100_000);
const UPLOAD: (u64, u64) = (b"sink\n".len() as u64 + 50_000, b"50000\n".len() as u64);

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn json_logs_have_one_record_for_each_stream() {
    let (port, cluster) = recorded().await;
    let master = stream_records(&cluster.master);
    assert_eq!(master.len(), 4, "{master:?}");
    for (i, record) in master.iter().enumerate() {
        let node = if i < 2 { "n1" } else { "n2" };
        assert_eq!(*record.field("node"), node);
        assert_eq!(*record.field("route"), format!("node name {node}"));
        assert!(record.field("origin").as_str().unwrap().starts_with(if i < 2 {
            "unix uid=0"
        } else {
            "tls kube-apiserver"
        }));
    }
    for (node, of_master) in cluster.nodes.iter().zip([&master[..2], &master[2..]]) {
        let of_node = stream_records(node.process.as_ref().unwrap());
        assert_eq!(of_node.len(), 2, "{of_node:?}");
        for records in [of_master, &of_node] {
            for (record, (up, down)) in records.iter().zip([DOWNLOAD, UPLOAD]) {
                assert_eq!(
                    (record.field("up").as_u64(), record.field("down").as_u64()),
                    (Some(up), Some(down)),
                    "{record:?}"
                );
                assert_eq!(*record.field("outcome"), "closed", "{record:?}");
                assert!(record.field("seconds").as_f64().unwrap() < 60.0);
                assert!(record.field("origin").as_str().is_some_and(|o| !o.is_empty()), "{record:?}");
                assert!(record.field("timestamp").is_string() && record.field("level") == "INFO");
            }
        }
        for record in of_node.iter().chain(of_master) {
            assert_eq!(*record.field("target"), format!("{}:{port}", node.name));
        }
    }
}

/// The libraries are quiet unless the filter names them.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_log_filter_that_names_a_library_is_followed() {
    for (level, loud) in [("debug", false), ("info,russh=debug", true)] {
        let log = format!("log: {{level: '{level}'}}");
        let cluster = Cluster::start(Options {
            nodes: nodes(&[("n1", Kind::Dialled)]),
            master_config: log.clone(),
            node_config: log,
            ..Options::default()
        })
        .await
        .unwrap();
        for process in [&cluster.master, cluster.nodes[0].process.as_ref().unwrap()] {
            assert_eq!(process.log_text().contains("DEBUG russh"), loud, "{} at {level}", process.name);
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_record_of_a_stream_on_its_node_names_the_rule() {
    let (_, cluster) = recorded().await;
    for node in &cluster.nodes {
        for record in stream_records(node.process.as_ref().unwrap()) {
            let rule = record.field("rule").as_str().unwrap_or_default();
            assert!(rule.starts_with("local-"), "{record:?}");
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn no_json_record_names_a_field_twice() {
    let (_, cluster) = recorded().await;
    for process in cluster.nodes.iter().map(|n| n.process.as_ref().unwrap()).chain([&cluster.master]) {
        for record in records(process) {
            assert!(record.1.is_empty(), "{}: {:?} twice in {record:?}", process.name, record.1);
        }
    }
}

async fn the_master_drains(terms: usize) {
    let port = target::start().await;
    let kinds = [("n1", Kind::Dialled), ("n2", Kind::CallHome), ("n3", Kind::Sshd)];
    let mut cluster =
        Cluster::start(Options { nodes: nodes(&kinds), ports: vec![port], ..Options::default() })
            .await
            .unwrap();
    let mut downloads = Vec::new();
    for node in ["n1", "n2"] {
        for door in cluster.doors() {
            downloads.push(Download::begin(&door, &format!("{node}:{port}"), 20_000_000).await);
        }
    }
    let mut idle = echo(&cluster.unix, &format!("n1:{port}")).await;
    // A plain sshd has no flow control for each stream: a download that waits is one that it resets.
    let mut of_sshd = echo(&cluster.tls, &format!("n3:{port}")).await;
    cluster.master.signal("TERM");
    assert_eq!(until(cluster.admin, "/readyz", 503).await, "not ready: stopping\n");
    until(cluster.admin, "/livez", 200).await;
    for door in cluster.doors() {
        closed(&door, &format!("n1:{port}")).await;
    }
    port_closes(cluster.call_home).await;
    for node in &cluster.nodes[..2] {
        logged(node.process.as_ref().unwrap(), "the master takes no new streams").await;
    }
    for _ in 1..terms {
        cluster.master.signal("TERM");
    }
    still_echoes(&mut idle).await;
    still_echoes(&mut of_sshd).await;
    for download in downloads {
        download.finish().await;
    }
    assert!(cluster.master.is_running(), "{}", cluster.master.log_text());
    of_sshd.shutdown().await.unwrap();
    of_sshd.read_to_end(&mut Vec::new()).await.unwrap();
    drop(of_sshd);
    idle.shutdown().await.unwrap();
    idle.read_to_end(&mut Vec::new()).await.unwrap();
    drop(idle);
    assert_eq!(
        cluster.master.wait(Duration::from_secs(25)).unwrap(),
        Some(0),
        "{}",
        cluster.master.log_text()
    );
    logged(&cluster.master, "stopped cut=0").await;
    for node in &mut cluster.nodes {
        assert!(node.process.as_mut().unwrap().is_running());
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn sigterm_drains_the_master() {
    the_master_drains(1).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_second_sigterm_does_not_hurry_the_masters_drain() {
    the_master_drains(2).await;
}

async fn a_node_drains(terms: usize, kind: Kind) {
    let port = target::start().await;
    let kinds = [("n1", kind), ("n2", Kind::CallHome)];
    let mut cluster =
        Cluster::start(Options { nodes: nodes(&kinds), ports: vec![port], ..Options::default() })
            .await
            .unwrap();
    let target = format!("n1:{port}");
    let mut downloads = Vec::new();
    for door in cluster.doors() {
        downloads.push(Download::begin(&door, &target, 20_000_000).await);
    }
    let mut idle = echo(&cluster.unix, &target).await;
    let mut elsewhere = echo(&cluster.unix, &format!("n2:{port}")).await;
    cluster.nodes[0].process.as_ref().unwrap().signal("TERM");
    assert_eq!(until(cluster.nodes[0].admin, "/readyz", 503).await, "not ready: stopping\n");
    until(cluster.nodes[0].admin, "/livez", 200).await;
    logged(&cluster.master, "the node takes no new streams").await;
    for door in cluster.doors() {
        closed(&door, &target).await;
    }
    if kind == Kind::Dialled {
        port_closes(local(cluster.nodes[0].port)).await;
    }
    for _ in 1..terms {
        cluster.nodes[0].process.as_ref().unwrap().signal("TERM");
    }
    still_echoes(&mut idle).await;
    for download in downloads {
        download.finish().await;
    }
    let node = cluster.nodes[0].process.as_mut().unwrap();
    assert!(node.is_running(), "{}", node.log_text());
    idle.shutdown().await.unwrap();
    idle.read_to_end(&mut Vec::new()).await.unwrap();
    drop(idle);
    assert_eq!(node.wait(Duration::from_secs(25)).unwrap(), Some(0), "{}", node.log_text());
    logged(node, "stopped cut=0").await;
    still_echoes(&mut elsewhere).await;
    assert!(cluster.master.is_running());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn sigterm_drains_a_dialled_node() {
    a_node_drains(1, Kind::Dialled).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn sigterm_drains_a_node_that_calls_home() {
    a_node_drains(1, Kind::CallHome).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_second_sigterm_does_not_hurry_a_nodes_drain() {
    a_node_drains(2, Kind::Dialled).await;
}

/// Passes on what comes from `to` at 1 MB/s and takes no more than that off the network, so that what was sent
/// waits in the sender's socket, as on a slow path; the other direction is fast.
async fn narrow(to: SocketAddr) -> SocketAddr {
    let listener = TcpListener::bind(local(0)).await.unwrap();
    let address = listener.local_addr().unwrap();
    tokio::spawn(async move {
        while let Ok((near, _)) = listener.accept().await {
            let far = TcpSocket::new_v4().unwrap();
            far.set_recv_buffer_size(32 * 1024).unwrap();
            let Ok(far) = far.connect(to).await else { continue };
            let _ = (near.set_nodelay(true), far.set_nodelay(true));
            let ((mut near_read, mut near_write), (mut far_read, mut far_write)) =
                (near.into_split(), far.into_split());
            tokio::spawn(async move { tokio::io::copy(&mut near_read, &mut far_write).await });
            tokio::spawn(async move {
                let mut buffer = vec![0; 8 * 1024];
                while let Ok(n @ 1..) = far_read.read(&mut buffer).await {
                    if near_write.write_all(&buffer[..n]).await.is_err() {
                        return;
                    }
                    tokio::time::sleep(Duration::from_secs_f64(n as f64 / 1e6)).await;
                }
            });
        }
    });
    address
}

/// Of what the target has sent, much is on the way when the node's own part in the stream is over.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_is_on_the_way_when_a_node_drains_arrives() {
    let (port, node_port) = (target::start().await, free_port());
    let mut cluster = Cluster::start(Options {
        nodes: nodes(&[("n1", Kind::Dialled)]),
        ports: vec![port],
        node_ports: vec![node_port],
        dial: vec![("n1".to_owned(), narrow(local(node_port)).await)],
        ..Options::default()
    })
    .await
    .unwrap();
    for _ in 0..3 {
        let mut download = Download::begin(&cluster.unix, &format!("n1:{port}"), 2_000_000).await;
        // The other direction is over, so that the stream ends on the node with what the target sends.
        download.stream.shutdown().await.unwrap();
        let node = cluster.nodes[0].process.as_mut().unwrap();
        node.signal("TERM");
        download.finish().await;
        assert_eq!(node.wait(PATIENCE).unwrap(), Some(0), "{}", node.log_text());
        cluster.start_node(0).unwrap();
        cluster.wait_state("n1", "connected").await;
    }
}

/// What a caller has sent arrives, also when it is the last thing that it does.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_is_on_the_way_when_the_master_drains_arrives() {
    let (port, node_port) = (target::start().await, free_port());
    let slow = Relay::start(local(0), local(node_port), Duration::from_millis(20), Some(5e6)).await.unwrap();
    let mut cluster = Cluster::start(Options {
        nodes: nodes(&[("n1", Kind::Dialled)]),
        ports: vec![port],
        node_ports: vec![node_port],
        dial: vec![("n1".to_owned(), slow.address)],
        ..Options::default()
    })
    .await
    .unwrap();
    let mut upload = cluster.unix.stream(&format!("n1:{port}")).await.unwrap();
    upload.write_all(b"sink\n").await.unwrap();
    cluster.master.signal("TERM");
    until(cluster.admin, "/readyz", 503).await;
    let mut bytes = vec![0; 10_000_000];
    fill(&mut bytes, 0);
    tokio::time::timeout(PATIENCE, upload.write_all(&bytes)).await.unwrap().unwrap();
    upload.shutdown().await.unwrap();
    let mut answer = String::new();
    tokio::time::timeout(PATIENCE, upload.read_to_string(&mut answer)).await.unwrap().unwrap();
    assert_eq!(answer, "10000000\n");
    assert_eq!(cluster.master.wait(PATIENCE).unwrap(), Some(0), "{}", cluster.master.log_text());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_stream_that_never_ends_is_cut_after_the_grace() {
    let port = target::start().await;
    let kinds = [("n1", Kind::Dialled), ("n2", Kind::CallHome)];
    let grace = "shutdown_grace: 1s".to_owned();
    let mut cluster = Cluster::start(Options {
        nodes: nodes(&kinds),
        ports: vec![port],
        master_config: grace.clone(),
        node_config: grace,
        ..Options::default()
    })
    .await
    .unwrap();
    for victim in ["n1", "n2", "master"] {
        let through = if victim == "n1" { "n1" } else { "n2" };
        if victim == "master" {
            cluster.start_node(1).unwrap();
            cluster.wait_state("n2", "connected").await;
        }
        let mut idle = echo(&cluster.unix, &format!("{through}:{port}")).await;
        let mut busy = cluster.tls.stream(&format!("{through}:{port}")).await.unwrap();
        busy.write_all(b"firehose\n").await.unwrap();
        busy.read_u8().await.unwrap();
        let process = match victim {
            "n1" => cluster.nodes[0].process.as_mut().unwrap(),
            "n2" => cluster.nodes[1].process.as_mut().unwrap(),
            _ => &mut cluster.master,
        };
        let began = Instant::now();
        process.signal("TERM");
        let drained = tokio::spawn(async move {
            // A failure or an end: either way nothing follows.
            let mut buffer = vec![0; 256 * 1024];
            while busy.read(&mut buffer).await.is_ok_and(|n| n > 0) {}
        });
        assert_eq!(process.wait(Duration::from_secs(20)).unwrap(), Some(0), "{}", process.log_text());
        assert!(began.elapsed() >= Duration::from_secs(1), "{victim} gave no grace");
        logged(process, "stopped cut=2").await;
        tokio::time::timeout(SOON, drained).await.expect("the busy stream ends").unwrap();
        let rest = tokio::time::timeout(SOON, idle.read_to_end(&mut Vec::new()))
            .await
            .expect("the idle stream ends");
        assert!(rest.is_err() || rest.is_ok_and(|n| n == 0));
    }
}

/// An inventory of the nodes at these places, which says of them what the cluster's first one does.
fn inventory(cluster: &Cluster, nodes: &[usize], more: &str) -> String {
    let mut text = "nodes:\n".to_owned();
    for i in nodes {
        let node = &cluster.nodes[*i];
        let own: Vec<String> = addresses(*i).iter().map(|a| format!("'{a}'")).collect();
        let dial = match node.kind {
            Kind::CallHome | Kind::CallHomeHttps => String::new(),
            Kind::Dialled | Kind::Sshd => format!(", dial: '{}'", local(node.port)),
        };
        text += &format!("  - {{name: {}, addresses: [{}]{dial}}}\n", node.name, own.join(", "));
    }
    text + more
}

async fn reloads(cluster: &Cluster, result: &str) -> f64 {
    let name = format!("master_agent_inventory_reloads_total{{reason=\"{result}\"}}");
    cluster.metric(cluster.admin, &name).await.unwrap_or(0.0)
}

/// Puts an inventory in place of the present one as an editor does, and waits until the master has seen it.
async fn change(cluster: &Cluster, text: &str, hang_up: bool, result: &str) {
    let before = reloads(cluster, result).await;
    let temporary = cluster.path().join("inventory.new");
    std::fs::write(&temporary, text).unwrap();
    std::fs::rename(&temporary, cluster.path().join("inventory.yaml")).unwrap();
    if hang_up {
        cluster.master.signal("HUP");
    }
    eventually("the inventory is read again", SOON, async || {
        (reloads(cluster, result).await > before).then_some(())
    })
    .await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_changed_inventory_adds_and_takes_out_nodes_and_disturbs_no_other() {
    let port = target::start().await;
    let kinds =
        [("n1", Kind::Dialled), ("n2", Kind::CallHome), ("n3", Kind::Dialled), ("n4", Kind::CallHome)];
    let cluster = Cluster::start(Options { nodes: nodes(&kinds), ports: vec![port], ..Options::default() })
        .await
        .unwrap();
    let mut kept =
        [echo(&cluster.unix, &format!("n1:{port}")).await, echo(&cluster.tls, &format!("n2:{port}")).await];
    let since = |node: &str| cluster.node_status(node).unwrap()["tunnels"][0]["since_unix_seconds"].clone();
    let before = [since("n1"), since("n2")];

    for hang_up in [true, false] {
        let mut lost = [
            echo(&cluster.unix, &format!("n3:{port}")).await,
            echo(&cluster.unix, &format!("n4:{port}")).await,
        ];
        change(&cluster, &inventory(&cluster, &[0, 1], ""), hang_up, "ok").await;
        for (name, address) in [("n3", "127.0.0.3"), ("n4", "127.0.0.4")] {
            assert!(cluster.node_status(name).is_err(), "{name} is still known");
            for host in [name, address] {
                let refused =
                    cluster.unix.connect(&format!("{host}:{port}")).await.unwrap().err().expect("no route");
                assert_eq!(refused.status, 502, "{}", refused.reason);
            }
        }
        for stream in &mut lost {
            let end = tokio::time::timeout(SOON, stream.read(&mut [0; 1]))
                .await
                .expect("the stream of a lost tunnel ends");
            assert!(end.is_err() || end.is_ok_and(|n| n == 0));
        }
        for node in &cluster.nodes[2..] {
            eventually("the node has no session", SOON, async || {
                (cluster.metric(node.admin, "node_agent_sessions ").await.ok()? == 0.0).then_some(())
            })
            .await;
        }
        for stream in &mut kept {
            still_echoes(stream).await;
        }
        change(&cluster, &inventory(&cluster, &[0, 1, 2, 3], ""), hang_up, "ok").await;
        cluster.wait_connected().await;
        for target in [format!("n3:{port}"), format!("127.0.0.4:{port}")] {
            echo(&cluster.unix, &target).await;
        }
    }
    for stream in &mut kept {
        still_echoes(stream).await;
    }
    assert_eq!(before, [since("n1"), since("n2")]);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_broken_inventory_leaves_the_old_one() {
    let port = target::start().await;
    let kinds = [("n1", Kind::Dialled), ("n2", Kind::CallHome)];
    let cluster = Cluster::start(Options { nodes: nodes(&kinds), ports: vec![port], ..Options::default() })
        .await
        .unwrap();
    let mut streams =
        [echo(&cluster.unix, &format!("n1:{port}")).await, echo(&cluster.unix, &format!("n2:{port}")).await];
    let good = reloads(&cluster, "ok").await;
    let broken =
        inventory(&cluster, &[0], "  - {name: n5, dail: 'n5:22'}\n  - {name: n6, addresses: [10.0.0]}\n");
    change(&cluster, &broken, true, "failed").await;
    let file = cluster.path().join("inventory.yaml");
    for mistake in ["3:16: nodes[1].dail", "4:28: nodes[2].addresses[0]"] {
        logged(&cluster.master, &format!("{}:{mistake}", file.display())).await;
    }
    assert!(cluster.master.log_text().lines().any(|l| l.contains("ERROR") && l.contains("inventory")));
    change(&cluster, &broken.replace("dail", "dialled"), false, "failed").await;
    assert_eq!(reloads(&cluster, "ok").await, good);
    std::fs::remove_file(&file).unwrap();
    cluster.master.signal("HUP");
    eventually("a lost file is a failure", SOON, async || {
        (reloads(&cluster, "failed").await >= 3.0).then_some(())
    })
    .await;
    for name in ["master_agent_nodes ", "master_agent_nodes_connected "] {
        assert_eq!(cluster.metric(cluster.admin, name).await.unwrap(), 2.0, "{name}");
    }
    for (i, node) in ["n1", "n2"].into_iter().enumerate() {
        still_echoes(&mut streams[i]).await;
        echo(&cluster.tls, &format!("{node}:{port}")).await;
    }
    change(&cluster, &inventory(&cluster, &[0], ""), false, "ok").await;
    assert!(cluster.node_status("n2").is_err());
    still_echoes(&mut streams[0]).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_running_agent_can_be_asked_while_the_inventory_is_broken() {
    let kinds = [("n1", Kind::Dialled)];
    let cluster = Cluster::start(Options { nodes: nodes(&kinds), ..Options::default() }).await.unwrap();
    change(&cluster, "nodes: 1\n", true, "failed").await;
    let commands = [&["node", "list"][..], &["explain", "n1:1"], &["token", "create"], &["token", "list"]];
    let failed: Vec<String> =
        commands.iter().filter_map(|args| Some(cluster.command(args).err()?.to_string())).collect();
    assert!(failed.is_empty(), "{failed:#?}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_new_cidr_of_a_node_does_not_cut_its_streams() {
    let port = target::start().await;
    let kinds = [("n1", Kind::Dialled)];
    let cluster = Cluster::start(Options { nodes: nodes(&kinds), ports: vec![port], ..Options::default() })
        .await
        .unwrap();
    let mut stream = echo(&cluster.unix, &format!("n1:{port}")).await;
    let wider = inventory(&cluster, &[0], "").replace("addresses:", "cidrs: [10.244.1.0/24], addresses:");
    change(&cluster, &wider, true, "ok").await;
    let way: Value =
        serde_json::from_str(&cluster.command(&["explain", "10.244.1.1:80", "-o", "json"]).unwrap()).unwrap();
    assert_eq!(way["candidates"][0]["node"], "n1");
    still_echoes(&mut stream).await;
}

/// Receives one message as systemd would.
async fn told(socket: &UnixDatagram) -> String {
    let mut buffer = [0; 1024];
    let n =
        tokio::time::timeout(SOON, socket.recv(&mut buffer)).await.expect("a message to systemd").unwrap();
    String::from_utf8(buffer[..n].to_vec()).unwrap()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn systemd_is_told_when_the_sockets_are_bound_and_at_the_end() {
    let options = Options { nodes: nodes(&[("n1", Kind::Dialled)]), nodes_down: true, ..Options::default() };
    let mut cluster = Cluster::start(options).await.unwrap();
    cluster.master.signal("TERM");
    cluster.master.wait(PATIENCE).unwrap();
    let path = cluster.path().join("notify.sock");
    let socket = UnixDatagram::bind(&path).unwrap();
    let start = |agent: &str, config: &Path| {
        let mut command = Command::new(binary(agent));
        command.env("NOTIFY_SOCKET", &path).arg("--config").arg(config).arg("run");
        Process::start(agent, &mut command, &cluster.path().join(format!("{agent}.notify.log"))).unwrap()
    };

    let mut master = start("master-agent", &cluster.path().join("master.yaml"));
    assert_eq!(told(&socket).await.trim(), "READY=1");
    let Door::Tls(tls, _) = &cluster.tls else { unreachable!() };
    for address in [cluster.admin, cluster.call_home, *tls] {
        TcpStream::connect(address).await.unwrap();
    }
    for name in ["connect.sock", "admin.sock"] {
        UnixStream::connect(cluster.path().join(name)).await.unwrap();
    }
    master.signal("TERM");
    assert_eq!(told(&socket).await.trim(), "STOPPING=1");
    assert_eq!(master.wait(PATIENCE).unwrap(), Some(0));

    let mut node = start("node-agent", &cluster.nodes[0].dir.join("node.yaml"));
    assert_eq!(told(&socket).await.trim(), "READY=1");
    for address in [cluster.nodes[0].admin, local(cluster.nodes[0].port)] {
        TcpStream::connect(address).await.unwrap();
    }
    node.signal("TERM");
    assert_eq!(told(&socket).await.trim(), "STOPPING=1");
    assert_eq!(node.wait(PATIENCE).unwrap(), Some(0));
}

#[test]
fn the_systemd_units_verify() {
    let dir = TempDir::new("units").unwrap();
    let units = concat!(env!("CARGO_MANIFEST_DIR"), "/../deploy/systemd");
    for agent in ["master-agent", "node-agent"] {
        let name = format!("{agent}.service");
        let text = std::fs::read_to_string(Path::new(units).join(&name)).unwrap();
        let here = text.replace(&format!("/usr/bin/{agent}"), &binary(agent).display().to_string());
        assert_ne!(text, here);
        let file = dir.path().join(&name);
        std::fs::write(&file, here).unwrap();
        let output =
            Command::new("systemd-analyze").args(["verify", "--man=no"]).arg(&file).output().unwrap();
        let said = String::from_utf8_lossy(&output.stderr);
        let ours: Vec<&str> = said.lines().filter(|l| l.contains(agent)).collect();
        assert!(ours.is_empty() && output.status.success(), "{said}");
    }
}

/// Runs something as the systemd units do: without root, and without any capability.
fn unprivileged(program: &Path) -> Command {
    let mut command = Command::new("setpriv");
    command.args([
        "--reuid=nobody",
        "--regid=nogroup",
        "--clear-groups",
        "--no-new-privs",
        "--inh-caps=-all",
        "--bounding-set=-all",
    ]);
    command.arg(program);
    command
}

fn mode(path: &Path) -> u32 {
    std::fs::symlink_metadata(path).unwrap().permissions().mode() & 0o7777
}

/// Every file below `directory` has the rights of its kind and belongs to the agent's user. Gives their number.
fn check_rights(directory: &Path) -> usize {
    let mut files = 0;
    assert_eq!(mode(directory), 0o700, "{}", directory.display());
    for entry in std::fs::read_dir(directory).unwrap() {
        let path = entry.unwrap().path();
        let metadata = std::fs::symlink_metadata(&path).unwrap();
        assert_eq!(metadata.uid(), 65534, "{}", path.display());
        if metadata.is_dir() {
            files += check_rights(&path);
            continue;
        }
        files += 1;
        let public = path.extension().is_some_and(|e| e == "pub");
        let allowed = if public { 0o644 } else { 0o600 };
        assert_eq!(mode(&path) & !allowed, 0, "{} has mode {:o}", path.display(), mode(&path));
    }
    files
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_agents_run_without_root() {
    let port = target::start().await;
    let dir = TempDir::new("unprivileged").unwrap();
    let path = dir.path();
    let home = path.join("home");
    std::fs::create_dir(&home).unwrap();
    std::os::unix::fs::chown(&home, Some(65534), Some(65534)).unwrap();
    let programs = ["master-agent", "node-agent"].map(|agent| {
        // Where the binaries were built, another user may not be let in.
        let copy = path.join(agent);
        std::fs::copy(binary(agent), &copy).unwrap();
        copy
    });
    let (admin, node_admin, call_home, node_port) = (free_port(), free_port(), free_port(), free_port());
    let configs = [path.join("master.yaml"), path.join("node.yaml")];
    std::fs::write(
        &configs[0],
        format!(
            "state_dir: home/lib/master-agent\nadmin: {{listen: '127.0.0.1:{admin}', socket: home/run/admin.sock}}\n\
             http_connect: {{unix: {{path: home/run/connect.sock}}}}\ncall_home: {{listen: '127.0.0.1:{call_home}'}}\ninventory: inventory.yaml\n"
        ),
    )
    .unwrap();
    std::fs::write(
        path.join("inventory.yaml"),
        format!("nodes: [{{name: n1, addresses: [127.0.0.1], dial: '127.0.0.1:{node_port}'}}]\n"),
    )
    .unwrap();
    std::fs::write(
        &configs[1],
        format!(
            "state_dir: home/lib/node-agent\nadmin: {{listen: '127.0.0.1:{node_admin}'}}\nlisten: '127.0.0.1:{node_port}'\n\
             policy: {{allow: [{{name: target, to: 127.0.0.1, ports: {port}}}]}}\n"
        ),
    )
    .unwrap();
    let run = |i: usize, args: &[&str]| {
        let output = unprivileged(&programs[i]).arg("--config").arg(&configs[i]).args(args).output().unwrap();
        assert!(output.status.success(), "{args:?}: {}", String::from_utf8_lossy(&output.stderr));
        String::from_utf8(output.stdout).unwrap()
    };
    let start = |i: usize, name: &str| {
        let mut command = unprivileged(&programs[i]);
        Process::start(
            name,
            command.arg("--config").arg(&configs[i]).arg("run"),
            &path.join(format!("{name}.log")),
        )
        .unwrap()
    };

    let mut master = start(0, "master");
    eventually("the master runs", SOON, async || {
        assert!(master.is_running(), "{}", master.log_text());
        TcpStream::connect(local(admin)).await.ok()
    })
    .await;
    let line = run(0, &["token", "create", "--node", "n1"]);
    let words: Vec<&str> = line.split_whitespace().skip(1).collect();
    run(1, &words);
    let node = start(1, "node");
    until(local(admin), "/readyz", 200).await;
    for process in [&master, &node] {
        let status = std::fs::read_to_string(format!("/proc/{}/status", process.pid())).unwrap();
        assert!(status.lines().any(|l| l == "Uid:\t65534\t65534\t65534\t65534"), "{status}");
        assert!(status.lines().any(|l| l == "CapEff:\t0000000000000000"), "{status}");
    }
    let door = Door::Unix(home.join("run/connect.sock"));
    Download::begin(&door, &format!("n1:{port}"), 1_000_000).await.finish().await;
    run(0, &["node", "list"]);

    // host_ca, user_ca, their public halves and state.sqlite; host_key, its certificate and two CAs.
    assert!(check_rights(&home.join("lib")) >= 9);
    for (socket, rights) in [("connect.sock", 0o660), ("admin.sock", 0o600)] {
        let socket = home.join("run").join(socket);
        assert!(std::fs::metadata(&socket).unwrap().file_type().is_socket());
        assert_eq!(mode(&socket), rights, "{}", socket.display());
    }
    for mut process in [node, master] {
        process.signal("TERM");
        assert_eq!(process.wait(PATIENCE).unwrap(), Some(0));
    }
}
