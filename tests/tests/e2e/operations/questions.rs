//! Commands that ask a running agent, `explain` and `node list`, answer with what it knows.

use serde_json::Value;
use tests::{
    cluster::{Cluster, Kind, Options},
    kubelet_port,
    process::TempDir,
};
use tokio::io::AsyncReadExt;

use super::commands::ran;

/// Two nodes with CIDRs of their own and a service CIDR; the second is down.
async fn asked_cluster() -> Cluster {
    let nodes = vec![("n1".to_owned(), Kind::Dialled), ("n2".to_owned(), Kind::CallHome)];
    let mut cluster =
        Cluster::start(Options { nodes, nodes_down: true, ..Options::default() }).await.unwrap();
    let inventory = format!(
        "nodes:
  - {{name: n1, dial: '127.0.0.1:{}', addresses: [127.0.0.1, '::1'], cidrs: [10.244.1.0/24, 'fd00:1::/64']}}
  - {{name: n2, addresses: [127.0.0.2], cidrs: [10.244.2.0/24]}}
service_cidrs: [10.96.0.0/12]
",
        cluster.nodes[0].port
    );
    std::fs::write(cluster.path().join("inventory.yaml"), inventory).unwrap();
    cluster.master.signal("HUP");
    cluster.master.says(&["inventory read again"]).await;
    cluster.start_node(0).unwrap();
    cluster.wait_state("n1", "connected").await;
    cluster
}

/// What `explain` prints, and its exit code.
fn explain(cluster: &Cluster, args: &[&str]) -> (String, Option<i32>) {
    let output = cluster.output(&[&["explain"], args].concat()).unwrap();
    (String::from_utf8(output.stdout).unwrap(), output.status.code())
}

fn explained(cluster: &Cluster, target: &str) -> (Value, Option<i32>) {
    let (text, code) = explain(cluster, &[target, "-o", "json"]);
    (serde_json::from_str(&text).unwrap(), code)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn explain_says_which_way_and_why() {
    let _reserved = kubelet_port::reserve().await;
    let cluster = asked_cluster().await;
    let policy = "policy is at fault: refused by node policy (rule ";
    let closed = "target is at fault: ";
    for (target, node, reason, state, verdict) in [
        ("n1:10250", "n1", "node name n1", "connected", closed),
        ("127.0.0.1:80", "n1", "address of node n1", "connected", policy),
        ("[::1]:80", "n1", "address of node n1", "connected", policy),
        ("10.244.1.7:8080", "n1", "CIDR 10.244.1.0/24 of node n1", "connected", policy),
        ("[fd00:1::7]:8080", "n1", "CIDR fd00:1::/64 of node n1", "connected", policy),
        ("10.96.0.1:443", "n1", "service CIDR 10.96.0.0/12, any connected node", "connected", policy),
        ("n2:10250", "n2", "node name n2", "waiting", "no tunnel to node n2"),
        (
            "10.244.2.1:80",
            "n2",
            "CIDR 10.244.2.0/24 of node n2",
            "waiting",
            "waiting for the node to call home",
        ),
    ] {
        let (json, code) = explained(&cluster, target);
        let expected_code = Some(if state == "connected" { 0 } else { 1 });
        let way = &json["candidates"][0];
        assert_eq!((json["target"].as_str(), way["node"].as_str()), (Some(target), Some(node)), "{json}");
        assert_eq!((json["reason"].as_str(), way["state"].as_str()), (Some(reason), Some(state)), "{json}");
        assert_eq!((&json["node"], &json["dial_microseconds"]), (&Value::Null, &Value::Null), "{json}");
        assert!(json["verdict"].as_str().unwrap().contains(verdict), "{json}");
        assert_eq!(code, expected_code, "{json}");

        let (table, code) = explain(&cluster, &[target]);
        assert_eq!(code, expected_code, "{table}");
        let row = |name: &str| {
            let line =
                table.lines().find(|l| l.starts_with(name)).unwrap_or_else(|| panic!("no {name}: {table}"));
            line[11..].to_owned()
        };
        assert_eq!(
            (row("target"), row("reason"), row("node"), row("dial")),
            (target.into(), reason.into(), "-".into(), "-".into())
        );
        assert!(row("candidate").starts_with(&format!("{node} for {target}, {state}")), "{table}");
        assert!(row("verdict").contains(verdict), "{table}");
        assert!(row("route").ends_with("ms"), "{table}");
    }

    // The one thing on n1's own addresses that answers and is allowed: a kubelet.
    let kubelet = tokio::net::TcpListener::bind("127.0.0.1:10250").await.unwrap();
    let (reached, code) = explained(&cluster, "127.0.0.1:10250");
    assert_eq!(code, Some(0), "{reached}");
    assert_eq!(
        (reached["node"].as_str(), &reached["candidates"][1]),
        (Some("n1"), &Value::Null),
        "{reached}"
    );
    assert_eq!(reached["verdict"], "the node allows it and the target answers");
    assert!(reached["dial_microseconds"].as_u64().unwrap() > 0, "{reached}");
    assert!(reached["candidates"][0]["round_trip_microseconds"].as_u64().unwrap() > 0, "{reached}");
    let (mut dialled, _) = kubelet.accept().await.unwrap();
    assert_eq!(dialled.read(&mut [0; 8]).await.unwrap_or(0), 0, "explain sends nothing and leaves");

    let (unknown, code) = explained(&cluster, "192.0.2.1:80");
    assert_eq!(code, Some(1), "{unknown}");
    assert_eq!((&unknown["node"], &unknown["candidates"][0]), (&Value::Null, &Value::Null));
    assert!(unknown["verdict"].as_str().unwrap().contains("no route to 192.0.2.1:80"), "{unknown}");
    let (table, code) = explain(&cluster, &["nonesuch:80"]);
    assert!(code == Some(1) && table.contains("no route to nonesuch:80"), "{code:?} {table}");

    let config = cluster.path().join("master.yaml");
    for malformed in ["n1", "n1:", "n1:0", "n1:99999", "", "a b:1", "http://n1:80/", "::1:80"] {
        ran("master-agent", Some(&config), &["explain", malformed]).failed(1, &["is no target"]);
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn explain_quotes_what_was_typed() {
    let cluster = asked_cluster().await;
    let config = cluster.path().join("master.yaml");
    for malformed in ["n1", "a b:1", "http://n1:80/", "n1/x:80"] {
        let quoted = format!("{malformed:?}");
        ran("master-agent", Some(&config), &["explain", malformed]).failed(1, &[&quoted]);
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn node_list_shows_states_and_tunnels() {
    let cluster = asked_cluster().await;
    let table = cluster.command(&["node", "list"]).unwrap();
    let rows: Vec<Vec<&str>> = table.lines().map(|l| l.split_whitespace().collect()).collect();
    assert_eq!(rows[0], ["NODE", "STATE", "ROLE", "DIRECTION", "KIND", "STREAMS", "RTT", "SINCE", "PEER"]);
    assert_eq!(rows[1][..6], ["n1", "connected", "active", "dialled", "node-agent", "0"]);
    assert_eq!(rows[1][8], format!("127.0.0.1:{}", cluster.nodes[0].port));
    assert_eq!(rows[2][..2], ["n2", "waiting"]);
    assert!(table.lines().nth(2).unwrap().contains("waiting for the node to call home"), "{table}");

    let json: Value =
        serde_json::from_str(&cluster.command(&["node", "list", "-o", "json"]).unwrap()).unwrap();
    let tunnel = &json[0]["tunnels"][0];
    assert_eq!((json[0]["name"].as_str(), json[0]["state"].as_str()), (Some("n1"), Some("connected")));
    assert_eq!(
        (tunnel["kind"].as_str(), tunnel["direction"].as_str()),
        (Some("node-agent"), Some("dialled"))
    );
    assert!(tunnel["host_key"].as_str().unwrap().starts_with("SHA256:"));
    assert!(tunnel["certificate_expires_unix_seconds"].as_u64().is_some());
    assert_eq!(json[1]["tunnels"], Value::Array(vec![]));
}

#[test]
fn without_a_running_agent_its_commands_say_so() {
    let dir = TempDir::new("nobody").unwrap();
    let config = dir.path().join("master.yaml");
    std::fs::write(&config, "state_dir: state\nadmin: {socket: admin.sock}\n").unwrap();
    for args in [&["node", "list"][..], &["node", "list", "-o", "json"], &["explain", "n1:10250"]] {
        let socket = dir.path().join("admin.sock").display().to_string();
        ran("master-agent", Some(&config), args).failed(1, &[&socket, "master-agent run"]);
    }
}
