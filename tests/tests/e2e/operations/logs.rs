//! Logs have one record for each stream, follow their filter, are valid JSON, and do not hold up an agent when nobody
//! reads them.

use std::{
    collections::BTreeMap,
    fmt,
    fs::File,
    path::Path,
    process::{ChildStderr, Command},
    thread::JoinHandle,
};

use serde::de::{Deserialize, Deserializer, MapAccess, Visitor};
use serde_json::Value;
use tests::{
    cluster::{Cluster, Kind, Options, SOON, binary},
    load::{download, gets},
    pattern::fill,
    process::{Process, eventually},
    target,
};
use tokio::io::{AsyncReadExt, AsyncWriteExt};

use super::{
    draining::Download,
    operate::{PATIENCE, nodes},
};

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
            if loud {
                process.says(&["DEBUG russh"]).await;
            } else {
                assert!(!process.log_text().contains("DEBUG russh"), "{} at {level}", process.name);
            }
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

/// A master and a node that log into pipes, which are full and which nobody reads.
struct Unread {
    cluster: Cluster,
    of_master: ChildStderr,
    of_node: ChildStderr,
    target: String,
}

impl Unread {
    /// Returns once both agents have lost lines.
    async fn start() -> Self {
        let port = target::start().await;
        // The SSH library logs several lines for each packet.
        let log = "log: {format: json, level: 'trace,russh=trace'}".to_owned();
        let mut cluster = Cluster::start(Options {
            nodes: nodes(&[("n1", Kind::Dialled)]),
            ports: vec![port],
            master_config: log.clone(),
            node_config: log,
            nodes_down: true,
            ..Options::default()
        })
        .await
        .unwrap();
        let start = |agent: &str, directory: &Path, config: &str| {
            let mut command = Command::new(binary(agent));
            command.arg("--config").arg(directory.join(config)).arg("run").current_dir(directory);
            Process::start_unread(agent, &mut command, &directory.join("unread.log")).unwrap()
        };
        let (node, of_node) = start("node-agent", &cluster.nodes[0].dir, "node.yaml");
        cluster.nodes[0].process = Some(node);
        cluster.master.kill();
        let (master, of_master) = start("master-agent", cluster.path(), "master.yaml");
        cluster.master = master;
        cluster.wait_connected().await;
        let target = format!("n1:{port}");
        eventually("both agents lose lines", PATIENCE, async || {
            gets(&[cluster.unix.clone()], &target, 4, 200).await;
            lost(&cluster).await.iter().all(|lost| *lost > 0).then_some(())
        })
        .await;
        Self { cluster, of_master, of_node, target }
    }
}

/// The lines that the master and the node count as lost.
async fn lost(cluster: &Cluster) -> [u64; 2] {
    let of_master = cluster.metric(cluster.admin, "master_agent_log_lines_lost_total ").await.unwrap();
    let of_node = cluster.metric(cluster.nodes[0].admin, "node_agent_log_lines_lost_total ").await.unwrap();
    [of_master as u64, of_node as u64]
}

/// The lines that are missing in a log, as the log says.
fn missing(process: &Process) -> u64 {
    let text = process.log_text();
    let notices = text.lines().filter(|line| line.contains("log lines lost"));
    let notices = notices.filter_map(|line| serde_json::from_str::<Value>(line).ok());
    notices.map(|notice| notice["lines"].as_u64().unwrap()).sum()
}

/// Reads what a process logs, into its log.
fn read(mut pipe: ChildStderr, process: &Process) -> JoinHandle<u64> {
    let mut log = File::options().append(true).open(&process.log).unwrap();
    std::thread::spawn(move || std::io::copy(&mut pipe, &mut log).unwrap())
}

/// The node and the master end as they should.
fn end(cluster: &mut Cluster) {
    let nodes = cluster.nodes.iter_mut().map(|node| node.process.as_mut().unwrap());
    for process in nodes.chain([&mut cluster.master]) {
        process.signal("TERM");
        assert_eq!(process.wait(PATIENCE).unwrap(), Some(0), "{}", process.name);
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_agent_whose_log_is_not_read_serves_and_says_later_what_is_missing() {
    let Unread { mut cluster, of_master, of_node, target } = Unread::start().await;
    download(&cluster.unix, &target, 1_000_000).await;
    let node = cluster.nodes[0].process.as_ref().unwrap();
    let readers = [read(of_master, &cluster.master), read(of_node, node)];
    eventually("the logs say how many lines are missing", PATIENCE, async || {
        ([missing(&cluster.master), missing(node)] == lost(&cluster).await).then_some(())
    })
    .await;
    end(&mut cluster);
    for reader in readers {
        reader.join().unwrap();
    }
    for process in [&cluster.master, cluster.nodes[0].process.as_ref().unwrap()] {
        let records = records(process);
        assert!(records.iter().any(|record| *record.field("message") == "stopped"), "{}", process.name);
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_agent_ends_although_its_log_is_not_read_or_its_reader_has_gone() {
    let Unread { mut cluster, of_master: _unread, of_node, target } = Unread::start().await;
    drop(of_node);
    gets(&[cluster.unix.clone()], &target, 4, 200).await;
    end(&mut cluster);
}
