//! Metrics, rules and the dashboard in `deploy/monitoring` fit together, and work in the real Prometheus.

use std::{
    collections::BTreeSet,
    net::SocketAddr,
    path::{Path, PathBuf},
    process::{Command, Stdio},
    time::Instant,
};

use bytes::Bytes;
use http_body_util::{BodyExt, Empty, Full};
use hyper::Request;
use percent_encoding::{NON_ALPHANUMERIC, utf8_percent_encode};
use serde_json::Value;
use tests::{
    client::{Door, http_get},
    cluster::{Cluster, Kind, Options, SOON},
    front_end::{Credential, FrontEnd, Http, Setup},
    http::Base,
    konnectivity::Connection,
    metrics::{ANYTHING, Metrics, OPEN_METRICS, Scraped, assert_golden, documented, golden, root, scrape},
    openssh,
    process::{Process, TempDir, eventually, free_port},
    target,
};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpStream,
};

fn monitoring(file: &str) -> PathBuf {
    root().join("deploy/monitoring").join(file)
}

fn text(file: &str) -> String {
    std::fs::read_to_string(monitoring(file)).unwrap()
}

fn yaml(file: &str) -> Value {
    serde_saphyr::from_str(&text(file)).unwrap()
}

fn promtool(args: &[&str]) {
    openssh::run(Command::new("promtool").args(args).current_dir(monitoring(""))).unwrap();
}

fn one(kind: Kind) -> Vec<(String, Kind)> {
    vec![("n1".to_owned(), kind)]
}

async fn metrics(cluster: &Cluster) -> Scraped {
    scrape(cluster.admin, OPEN_METRICS).await.unwrap()
}

#[tokio::test]
async fn other_names_are_served_where_they_are_asked_for() {
    let port = target::start().await;
    let api = tests::apiserver::ApiServer::start().await.unwrap();
    let kubeconfig = api.directory().join("kubeconfig");
    api.write_kubeconfig(&kubeconfig).unwrap();
    let kubernetes = format!("kubernetes: {{kubeconfig: '{}', legacy_names: true}}", kubeconfig.display());
    let cluster = Cluster::start(Options {
        nodes: one(Kind::Dialled),
        ports: vec![port],
        master_config: format!(
            "{kubernetes}\nkonnectivity: {{unix: {{path: konnectivity.sock}}}}\n\
             metrics: {{per_node: false, konnectivity_names: true}}\n"
        ),
        ..Options::default()
    })
    .await
    .unwrap();
    let mut stream = cluster.unix.stream(&format!("n1:{port}")).await.unwrap();
    stream.write_all(b"source 1000\n").await.unwrap();
    for target in ["192.0.2.1:1", "n1:1"] {
        cluster.unix.connect(target).await.unwrap().err().expect("a refusal");
    }
    let grpc = Connection::open(&Door::Unix(cluster.path().join("konnectivity.sock"))).await.unwrap();
    drop(grpc.dial(&format!("n1:{port}")).await.unwrap());
    let open = eventually("the gRPC call has ended", SOON, async || {
        let open = metrics(&cluster).await;
        let streams = open.total("konnectivity_network_proxy_server_established_connections");
        (open.text.contains("code=\"Canceled\"") && streams == 1.0).then_some(open)
    })
    .await;
    let konnectivity = |name: &str| open.total(&format!("konnectivity_network_proxy_server_{name}"));
    for (name, value) in [
        ("ready_backend_connections", 1.0),
        ("ready_backends", 1.0),
        // The node.
        ("grpc_connections", 1.0),
        ("stream_packets_total", 2.0),
        ("stream_errors_total", 1.0),
        ("frontend_write_duration_seconds_count", 1.0),
        ("established_connections", 1.0),
        ("http_connections", 1.0),
        ("pending_backend_dials", 0.0),
        ("dial_duration_seconds_count", 2.0),
        ("dial_failure_count", 2.0),
        ("full_receive_channels", 0.0),
    ] {
        assert_eq!(konnectivity(name), value, "{name}");
    }
    for line in ["{reason=\"no_agent\"} 1\n", "{reason=\"error_response\"} 1\n"] {
        assert!(open.text.contains(&format!("dial_failure_count{line}")), "{}", open.text);
    }
    let plain = scrape(cluster.admin, ANYTHING).await.unwrap().text;
    assert!(
        plain.contains("# TYPE konnectivity_network_proxy_server_dial_failure_count counter\n"),
        "{plain}"
    );
    let (own, others): (Metrics, Metrics) =
        open.metrics().into_iter().partition(|(name, _)| name.starts_with("master_agent_"));
    assert_golden(&others, "compatibility");
    let mut documented = documented();
    documented.retain(|name, _| !name.contains("_agent_"));
    assert_eq!(
        others.into_iter().map(|(name, metric)| (name, metric.labels)).collect::<Vec<_>>(),
        Vec::from_iter(documented)
    );
    assert!(own.values().all(|metric| !metric.labels.contains("node")), "per_node is false");
}

#[tokio::test]
async fn a_node_that_is_gone_has_no_series() {
    let cluster = Cluster::start(Options { nodes: one(Kind::CallHome), ..Options::default() }).await.unwrap();
    let text = metrics(&cluster).await.text;
    let series = text.lines().filter(|line| line.contains("node=\"n1\"")).count();
    assert_eq!(series, 13, "{text}");
    let inventory = std::fs::read_to_string(cluster.path().join("inventory.yaml")).unwrap();
    let other =
        inventory.replace("name: n1", "name: n2").replace("127.0.0.1", "127.0.0.2").replace("'::1'", "");
    std::fs::write(cluster.path().join("inventory.yaml"), other).unwrap();
    cluster.master.signal("HUP");
    eventually("its series are gone", SOON, async || {
        (!metrics(&cluster).await.text.contains("node=\"n1\"")).then_some(())
    })
    .await;
    assert!(metrics(&cluster).await.text.contains("master_agent_node_connected{node=\"n2\"} 0.0\n"));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn streams_that_wait_for_the_peer_are_counted_on_the_side_that_sends() {
    let port = target::start().await;
    let cluster = Cluster::start(Options {
        nodes: vec![("n1".to_owned(), Kind::Dialled), ("n2".to_owned(), Kind::Sshd)],
        ports: vec![port],
        ..Options::default()
    })
    .await
    .unwrap();
    let (master, node) = (cluster.admin, cluster.nodes[0].admin);
    let stalled = async |admin: SocketAddr, metric: &str| {
        eventually(&format!("{metric} at {admin}"), SOON, async || {
            (cluster.metric(admin, metric).await.ok()? == 1.0).then_some(())
        })
        .await;
    };
    // Nobody reads what comes down: the node waits for the master.
    let mut firehose = cluster.unix.stream(&format!("n1:{port}")).await.unwrap();
    firehose.write_all(b"firehose\n").await.unwrap();
    stalled(node, "node_agent_streams_stalled{direction=\"down\"}").await;
    assert_eq!(scrape(master, OPEN_METRICS).await.unwrap().total("master_agent_stream_stalls_total"), 0.0);
    drop(firehose);
    eventually("the wait is over", SOON, async || {
        let scraped = scrape(node, OPEN_METRICS).await.ok()?;
        let over = scraped.total("node_agent_streams_stalled") == 0.0
            && scraped.total("node_agent_stream_stall_seconds_total") > 0.0
            && scraped.total("node_agent_stream_stalls_total") >= 1.0;
        over.then_some(())
    })
    .await;

    // Nobody takes what goes up: the master waits for the node, whatever that runs.
    for name in ["n1", "n2"] {
        let mut stream = cluster.unix.stream(&format!("{name}:{port}")).await.unwrap();
        stream.write_all(b"firehose\n").await.unwrap();
        let (mut down, mut up) = tokio::io::split(stream);
        let carried = tokio::spawn(async move {
            let bytes = vec![0; 256 * 1024];
            let mut taken = vec![0; 256 * 1024];
            tokio::join!(async { while down.read(&mut taken).await.is_ok_and(|n| n > 0) {} }, async {
                while up.write_all(&bytes).await.is_ok() {}
            });
        });
        stalled(master, "master_agent_streams_stalled{direction=\"up\"}").await;
        carried.abort();
        eventually("the wait is over", SOON, async || {
            (metrics(&cluster).await.total("master_agent_streams_stalled") == 0.0).then_some(())
        })
        .await;
    }
}

#[tokio::test]
async fn readiness_has_a_note_while_no_api_server_works() {
    let front_end = FrontEnd::start(Setup::default()).await.unwrap();
    let admin = front_end.cluster.admin;
    let ready = async |wanted: &str| {
        eventually(&format!("/readyz says {wanted:?}"), SOON, async || {
            (http_get(admin, "/readyz").await.ok()? == wanted).then_some(())
        })
        .await;
    };
    ready("ok\n").await;
    front_end.upstream.refuse().await;
    ready("ok\nfront end: none of 1 API servers works\n").await;
    let metrics = metrics(&front_end.cluster).await;
    assert_eq!(metrics.total("master_agent_front_end_upstream_healthy"), 0.0);
    assert!(metrics.total("master_agent_front_end_upstream_failures_total") >= 2.0);
    front_end.upstream.accept().await.unwrap();
    ready("ok\n").await;
}

#[test]
fn promtool_accepts_the_rules_and_the_configuration() {
    promtool(&["check", "rules", "alerts.yaml"]);
    promtool(&["check", "config", "prometheus.yaml"]);
    promtool(&["test", "rules", "alerts_test.yaml"]);
}

/// Names of alerts, and their expressions.
fn alerts() -> Vec<(String, String)> {
    let file = yaml("alerts.yaml");
    let rules =
        file["groups"].as_array().unwrap().iter().flat_map(|group| group["rules"].as_array().unwrap());
    let text = |value: &Value| value.as_str().unwrap().to_owned();
    rules.map(|rule| (text(&rule["alert"]), text(&rule["expr"]))).collect()
}

/// All that the dashboard asks for.
fn asked() -> Vec<String> {
    fn walk(value: &Value, found: &mut Vec<String>) {
        match value {
            Value::Object(members) => {
                for (name, value) in members {
                    match value {
                        Value::String(text) if ["expr", "definition"].contains(&&**name) => {
                            found.push(text.clone());
                        }
                        other => walk(other, found),
                    }
                }
            }
            Value::Array(items) => items.iter().for_each(|item| walk(item, found)),
            _ => {}
        }
    }
    let mut found = Vec::new();
    walk(&serde_json::from_str(&text("grafana-dashboard.json")).unwrap(), &mut found);
    found
}

#[test]
fn rules_and_dashboard_name_metrics_that_exist_and_every_alert_is_explained_and_tested() {
    let known: Metrics =
        ["master-agent", "node-agent", "compatibility"].into_iter().flat_map(golden).collect();
    let alerts = alerts();
    let mut used = 0;
    for text in alerts.iter().map(|(_, expr)| expr.clone()).chain(asked()) {
        let words = text.split(|c: char| !c.is_ascii_alphanumeric() && c != '_' && c != ':');
        for name in words.filter(|word| word.contains("_agent_") || word.contains("konnectivity")) {
            let base = ["_bucket", "_sum", "_count"].iter().find_map(|ending| name.strip_suffix(ending));
            let histogram = base.and_then(|base| known.get(base)).is_some_and(|m| m.kind == "histogram");
            let plain = known.get(name).is_some_and(|metric| metric.kind != "histogram");
            assert!(plain || histogram, "{name} in {text}");
            used += 1;
        }
    }
    assert!(used > 60, "{used}");

    let file = yaml("alerts.yaml");
    for rule in file["groups"].as_array().unwrap().iter().flat_map(|group| group["rules"].as_array().unwrap())
    {
        assert!(["critical", "warning"].contains(&rule["labels"]["severity"].as_str().unwrap()), "{rule}");
        for annotation in ["summary", "description", "action"] {
            assert!(rule["annotations"][annotation].as_str().unwrap().len() > 15, "{rule}");
        }
    }
    let named = |value: &Value| value["alertname"].as_str().unwrap().to_owned();
    let tested = yaml("alerts_test.yaml");
    let tested =
        tested["tests"].as_array().unwrap().iter().flat_map(|t| t["alert_rule_test"].as_array().unwrap());
    let fire = |test: &&Value| test["exp_alerts"].as_array().is_some_and(|alerts| !alerts.is_empty());
    let (firing, quiet): (Vec<&Value>, Vec<&Value>) = tested.partition(fire);
    let names: BTreeSet<String> = alerts.into_iter().map(|(name, _)| name).collect();
    assert_eq!(firing.into_iter().map(named).collect::<BTreeSet<_>>(), names, "each is seen to fire");
    assert_eq!(quiet.into_iter().map(named).collect::<BTreeSet<_>>(), names, "and not to");
}

/// A running Prometheus.
struct Prometheus {
    address: SocketAddr,
    _process: Process,
    _dir: TempDir,
}

impl Prometheus {
    /// With the configuration of `deploy/monitoring`, but for where the agents are and how often they are asked.
    fn start(master: SocketAddr, nodes: &[SocketAddr]) -> Self {
        let dir = TempDir::new("prometheus").unwrap();
        let address = SocketAddr::from(([127, 0, 0, 1], free_port()));
        let quoted = |address: &SocketAddr| format!("\"{address}\"");
        let nodes: Vec<String> = nodes.iter().map(quoted).collect();
        let config = text("prometheus.yaml")
            .replace("15s", "500ms")
            .replace("\"127.0.0.1:9070\"", &quoted(&master))
            .replace("\"127.0.0.1:9071\"", &nodes.join(", "));
        let path = dir.path().join("prometheus.yaml");
        std::fs::write(&path, config).unwrap();
        std::fs::copy(monitoring("alerts.yaml"), dir.path().join("alerts.yaml")).unwrap();
        let option = |name: &str, value: &Path| format!("--{name}={}", value.display());
        let mut command = Command::new("prometheus");
        command
            .arg(option("config.file", &path))
            .arg(option("storage.tsdb.path", &dir.path().join("data")))
            .arg(format!("--web.listen-address={address}"));
        let process = Process::start("prometheus", &mut command, &dir.path().join("log")).unwrap();
        Self { address, _process: process, _dir: dir }
    }

    /// The present value of an expression.
    async fn query(&self, expression: &str) -> anyhow::Result<Vec<Value>> {
        let query = utf8_percent_encode(expression, NON_ALPHANUMERIC);
        let answer = self.get(&format!("/api/v1/query?query={query}")).await?;
        Ok(answer["data"]["result"].as_array().cloned().unwrap_or_default())
    }

    async fn get(&self, path: &str) -> anyhow::Result<Value> {
        let base = Base::new(&format!("http://{}", self.address), None)?;
        let answer = base.send(Request::get(path).body(Empty::<Bytes>::new())?).await?;
        let answer: Value = serde_json::from_slice(&answer.into_body().collect().await?.to_bytes())?;
        anyhow::ensure!(answer["status"] == "success", "{path}: {answer}");
        Ok(answer)
    }
}

/// An expression as Grafana sends it.
fn filled_in(expression: &str) -> String {
    let label_values = expression.strip_prefix("label_values(").and_then(|rest| rest.rsplit_once(','));
    let expression = label_values.map_or(expression, |(series, _)| series);
    expression.replace("$__rate_interval", "30s").replace("$instance", ".*").replace("$node", ".*")
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn prometheus_scrapes_the_agents_and_evaluates_all_that_is_asked() {
    let api = tests::apiserver::ApiServer::start().await.unwrap();
    let kubeconfig = api.directory().join("kubeconfig");
    api.write_kubeconfig(&kubeconfig).unwrap();
    let front_end = FrontEnd::start(Setup {
        nodes: vec![("n1".to_owned(), Kind::Dialled), ("n2".to_owned(), Kind::CallHome)],
        master_config: format!("kubernetes: {{kubeconfig: '{}'}}\n", kubeconfig.display()),
        limits: Some("{failures_per_second_per_address: 1}".to_owned()),
        ..Setup::default()
    })
    .await
    .unwrap();
    let cluster = &front_end.cluster;
    let nodes: Vec<SocketAddr> = cluster.nodes.iter().map(|node| node.admin).collect();
    for admin in [cluster.admin, nodes[0]] {
        let plain = scrape(admin, ANYTHING).await.unwrap();
        assert_eq!(plain.content_type, "text/plain; version=0.0.4; charset=utf-8");
        let mut check = Command::new("promtool");
        let mut check = check
            .args(["check", "metrics"])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        std::io::Write::write_all(&mut check.stdin.take().unwrap(), plain.text.as_bytes()).unwrap();
        let said = check.wait_with_output().unwrap();
        assert!(
            said.status.success(),
            "{}{}",
            String::from_utf8_lossy(&said.stdout),
            String::from_utf8_lossy(&said.stderr)
        );
    }

    let prometheus = Prometheus::start(cluster.admin, &nodes);
    eventually("the agents are up", SOON, async || {
        let up = prometheus.query("up == 1").await.ok()?;
        (up.len() == 3).then_some(())
    })
    .await;
    // Something of everything, more than once, so that it has a rate.
    let traffic = async || {
        if let Ok(mut caller) = TcpStream::connect(cluster.local_endpoint(0)).await {
            let _ = caller.write_all(b"no TLS\r\n").await;
            let _ = caller.read_to_end(&mut Vec::new()).await;
        }
        let _ = cluster.unix.connect("n1:1").await;
        for credential in [Credential::Token, Credential::None] {
            if let Ok(mut caller) = front_end.caller(credential, Http::V1).await {
                let echo = Request::get("/echo").header("impersonate-user", "root").body(Full::default());
                let _ = caller.ask(echo.unwrap()).await;
                let _ = caller.get("/echo").await;
            }
        }
    };
    let mut left = asked();
    assert!(left.len() > 50, "{left:?}");
    let deadline = Instant::now() + SOON * 3;
    while !left.is_empty() {
        assert!(Instant::now() < deadline, "nothing comes of {left:#?}");
        traffic().await;
        let mut without = Vec::new();
        for expression in left {
            let given = prometheus.query(&filled_in(&expression)).await;
            if given.unwrap_or_else(|error| panic!("{expression}: {error}")).is_empty() {
                without.push(expression);
            }
        }
        left = without;
    }
    for (name, expression) in alerts() {
        prometheus.query(&expression).await.unwrap_or_else(|error| panic!("{name}: {error}"));
    }
    eventually("every rule has been evaluated", SOON, async || {
        let rules = prometheus.get("/api/v1/rules").await.ok()?;
        let groups = rules["data"]["groups"].as_array()?.clone();
        let rules: Vec<Value> =
            groups.iter().flat_map(|group| group["rules"].as_array().cloned().unwrap()).collect();
        assert!(rules.iter().all(|rule| rule["health"] != "err"), "{rules:?}");
        (rules.len() == alerts().len() && rules.iter().all(|rule| rule["health"] == "ok")).then_some(())
    })
    .await;
}
