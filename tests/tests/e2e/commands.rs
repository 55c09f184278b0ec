//! What a person at a terminal sees: help, completions, mistakes in configurations, and the commands that ask a
//! running agent.

use std::{
    collections::BTreeSet,
    net::{SocketAddr, TcpListener},
    os::unix::fs::{MetadataExt, PermissionsExt},
    path::Path,
    process::{Command, Stdio},
    time::Duration,
};

use serde_json::Value;
use tests::{
    client::Door,
    cluster::{Cluster, Kind, Options, SOON, binary},
    openssh,
    process::{Process, TempDir, eventually, free_port},
    target,
};
use tokio::io::{AsyncReadExt, AsyncWriteExt};

const AGENTS: [&str; 2] = ["master-agent", "node-agent"];
/// sysexits.h: the configuration has errors.
const EX_CONFIG: i32 = 78;
const WAYS_OUT: [&str; 3] = ["call_home:", "dial:", "master-agent sshd-config"];

struct Ran {
    code: Option<i32>,
    out: String,
    err: String,
}

/// Runs an agent's command to its end.
fn ran(agent: &str, config: Option<&Path>, args: &[&str]) -> Ran {
    let mut command = Command::new(binary(agent));
    command.env("COLUMNS", "100").stdin(Stdio::null());
    if let Some(config) = config {
        command.arg("--config").arg(config);
    }
    let output = command.args(args).output().unwrap();
    let text = |bytes| String::from_utf8(bytes).unwrap();
    Ran { code: output.status.code(), out: text(output.stdout), err: text(output.stderr) }
}

impl Ran {
    fn succeeded(self) -> String {
        assert_eq!(self.code, Some(0), "{}", self.err);
        self.out
    }

    /// The error, of which each of `parts` has to be a part.
    fn failed(self, code: i32, parts: &[&str]) -> String {
        assert_eq!(self.code, Some(code), "{}{}", self.out, self.err);
        for part in parts {
            assert!(self.err.contains(part), "no {part:?} in {:?}", self.err);
        }
        self.err
    }
}

/// The commands that a help text lists, with their descriptions.
fn listed(help: &str) -> Vec<(String, String)> {
    let mut commands: Vec<(String, String)> = Vec::new();
    for line in help.lines().skip_while(|l| *l != "Commands:").skip(1).take_while(|l| !l.is_empty()) {
        let text = line.strip_prefix("  ").unwrap();
        match text.strip_prefix(' ') {
            Some(more) => commands.last_mut().unwrap().1.push_str(more.trim()),
            None => {
                let (name, description) = text.split_once(' ').unwrap_or((text, ""));
                commands.push((name.to_owned(), description.trim().to_owned()));
            }
        }
    }
    commands
}

/// Every command of an agent as words, itself (no words) included.
fn commands(agent: &str) -> Vec<Vec<String>> {
    let mut found = vec![Vec::new()];
    let mut next = 0;
    while let Some(command) = found.get(next).cloned() {
        let mut args: Vec<&str> = command.iter().map(String::as_str).collect();
        args.push("--help");
        for (name, _) in listed(&ran(agent, None, &args).succeeded()) {
            if name != "help" {
                found.push([command.clone(), vec![name]].concat());
            }
        }
        next += 1;
    }
    found
}

#[test]
fn every_command_explains_itself_within_the_width() {
    for (agent, count) in [("master-agent", 19), ("node-agent", 5)] {
        let commands = commands(agent);
        assert_eq!(commands.len(), count, "{commands:?}");
        for command in commands {
            let words: Vec<&str> = command.iter().map(String::as_str).collect();
            for flag in ["--help", "-h"] {
                let help = ran(agent, None, &[words.as_slice(), &[flag]].concat()).succeeded();
                let first = help.lines().next().unwrap();
                assert!(first.len() > 10 && !first.starts_with("Usage"), "{agent} {words:?}: {help}");
                assert!(help.contains(&format!("Usage: {agent}")), "{help}");
                for (name, description) in listed(&help) {
                    assert!(description.len() > 10, "{agent} {words:?}: {name} is not described");
                }
                for line in help.lines() {
                    assert!(line.chars().count() <= 100, "{agent} {words:?}: {line}");
                }
            }
            let version = ran(agent, None, &[words.as_slice(), &["--version"]].concat()).succeeded();
            assert!(version.contains(env!("CARGO_PKG_VERSION")), "{agent} {words:?}: {version:?}");
        }
    }
}

#[test]
fn every_argument_and_option_is_described() {
    let mut bare = Vec::new();
    for agent in AGENTS {
        for command in commands(agent) {
            let words: Vec<&str> = command.iter().map(String::as_str).collect();
            let help = ran(agent, None, &[words.as_slice(), &["-h"]].concat()).succeeded();
            let lines: Vec<&str> = help.lines().collect();
            for (i, line) in lines.iter().enumerate() {
                let text = line.trim_start();
                if !(line.starts_with("  ") && (text.starts_with('-') || text.starts_with('<'))) {
                    continue;
                }
                // A description stands two spaces behind, or below and further in.
                let beside = text
                    .split_once("  ")
                    .is_some_and(|(_, d)| !d.trim().is_empty() && !d.trim().starts_with('['));
                let below = lines
                    .get(i + 1)
                    .is_some_and(|l| l.starts_with("        ") && !l.trim().starts_with(['-', '<', '[']));
                if !beside && !below {
                    bare.push(format!("{agent} {}: {text}", command.join(" ")));
                }
            }
        }
    }
    assert!(bare.is_empty(), "without a description:\n{}", bare.join("\n"));
}

#[test]
fn the_guide_lists_exactly_the_commands_there_are() {
    let page = concat!(env!("CARGO_MANIFEST_DIR"), "/../deploy/guide/commands.md");
    let page = std::fs::read_to_string(page).unwrap();
    for agent in AGENTS {
        let table = page.lines().skip_while(|l| *l != format!("| `{agent}` | what it does |")).skip(2);
        let mut documented = BTreeSet::new();
        for row in table.take_while(|l| l.starts_with('|')) {
            let cell = row.split('|').nth(1).unwrap();
            for code in cell.split('`').skip(1).step_by(2) {
                let is_name =
                    |w: &&str| w.bytes().all(|b| b.is_ascii_lowercase() || b == b'-') && !w.starts_with('-');
                documented.insert(code.split_whitespace().take_while(is_name).collect::<Vec<_>>().join(" "));
            }
        }
        let groups = ["", "token", "node"];
        let there: BTreeSet<String> =
            commands(agent).iter().map(|c| c.join(" ")).filter(|c| !groups.contains(&c.as_str())).collect();
        assert_eq!(documented, there, "{agent}");
    }
}

/// Names and quoted defaults of the tables of fields; tables follow the heading that names their file.
#[test]
fn the_defaults_in_the_guide_are_those_of_the_sample_files() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("..");
    let page = std::fs::read_to_string(root.join("deploy/guide/configuration.md")).unwrap();
    let quoted = |cell: &str| cell.split('`').skip(1).step_by(2).map(str::to_owned).collect::<Vec<_>>();
    let (mut sample, mut wrong, mut compared) = (None, Vec::new(), 0);
    for line in page.lines().take_while(|l| *l != "## Ports") {
        sample = match line {
            "## master-agent.yaml" => Some("master-agent.yaml"),
            "## inventory.yaml" => Some("inventory.yaml"),
            "## node-agent.yaml" => Some("node-agent.yaml"),
            _ => sample,
        };
        let cells: Vec<&str> = line.split('|').collect();
        let (Some(sample), [_, names, defaults, ..]) = (sample, &cells[..]) else { continue };
        let text = std::fs::read_to_string(root.join("deploy/config").join(sample)).unwrap();
        let (names, defaults) = (quoted(names), quoted(defaults));
        if names.len() != defaults.len() {
            continue;
        }
        for (name, default) in names.iter().zip(&defaults) {
            let field = name.rsplit('.').next().unwrap();
            let values: Vec<&str> = text
                .lines()
                .filter_map(|l| l.trim_start_matches([' ', '-', '#']).strip_prefix(field)?.strip_prefix(": "))
                .map(|v| v.split(" #").next().unwrap().trim())
                .collect();
            // Where the default is empty, a sample shows an example.
            if default != "[]" && default != "none" {
                compared += 1;
                if !values.contains(&default.as_str()) {
                    wrong.push(format!("{sample}: {name}: {default} in the guide, {values:?} in the sample"));
                }
            }
        }
    }
    assert!(compared > 30, "{compared}");
    assert!(wrong.is_empty(), "{wrong:#?}");
}

#[test]
fn completions_are_made_for_the_common_shells() {
    for agent in AGENTS {
        for shell in ["bash", "zsh", "fish"] {
            let script = ran(agent, None, &["completions", shell]).succeeded();
            assert!(script.contains(agent) && script.contains("check-config"), "{agent} {shell}");
            if shell == "bash" {
                let dir = TempDir::new("completions").unwrap();
                let file = dir.path().join("completion");
                std::fs::write(&file, script).unwrap();
                openssh::run(Command::new("bash").arg("-n").arg(&file)).unwrap();
            }
        }
        ran(agent, None, &["completions", "nonesuch"]).failed(2, &["bash", "zsh", "fish"]);
    }
}

/// Every mistake that these files are made to have, as LINE:COLUMN: FIELD:, in their order.
fn expect_mistakes(agent: &str, dir: &Path, expected: &[(&str, &str)]) {
    let config = dir.join("config.yaml");
    for command in ["check-config", "run"] {
        let error = ran(agent, Some(&config), &[command]).failed(EX_CONFIG, &[]);
        let lines: Vec<&str> = error.lines().collect();
        assert_eq!(lines.len(), expected.len(), "{command}: {error}");
        for (line, (file, place)) in lines.iter().zip(expected) {
            let start = format!("{}:{place}: ", dir.join(file).display());
            let message =
                line.strip_prefix(&start).unwrap_or_else(|| panic!("{start:?} is not how {line:?} starts"));
            assert!(message.len() > 5, "{line}");
        }
        let mut left: Vec<_> = std::fs::read_dir(dir).unwrap().map(|e| e.unwrap().file_name()).collect();
        left.retain(|name| name != "config.yaml" && name != "inventory.yaml");
        assert!(left.is_empty(), "{command} made {left:?}");
    }
}

#[test]
fn every_mistake_of_a_master_is_shown_at_once_and_nothing_is_opened() {
    let dir = TempDir::new("mistakes").unwrap();
    let taken = TcpListener::bind("127.0.0.1:0").unwrap();
    let (taken, free) = (taken.local_addr().unwrap(), free_port());
    let config = format!(
        "state_dir: state
log: {{format: yaml}}
admin:
  listen: '{taken}'
  socket: admin.sock
http_connect:
  unix: {{path: connect.sock, mode: '999'}}
  tls: {{listen: '127.0.0.1:{free}', cert: nonesuch.crt}}
  head_timeot: 5s
tunnels:
  keepalive_max: 0
  dial_timeout: 10
call_home: {{listen: nonsense}}
inventory: inventory.yaml
"
    );
    std::fs::write(dir.path().join("config.yaml"), config).unwrap();
    let inventory = "nodes:
  - {name: n1, addresses: [10.0.0.1], cidrs: [10.0.0.0/33]}
  - {name: n1, addresses: [10.0.0.2]}
  - name: n3
    addresses: [10.0.0.1]
    default_route: maybe
";
    std::fs::write(dir.path().join("inventory.yaml"), inventory).unwrap();
    expect_mistakes(
        "master-agent",
        dir.path(),
        &[
            ("config.yaml", "2:15: log.format"),
            ("config.yaml", "7:36: http_connect.unix.mode"),
            ("config.yaml", "8:3: http_connect.tls.key"),
            ("config.yaml", "8:3: http_connect.tls.client_ca"),
            ("config.yaml", "8:42: http_connect.tls.cert"),
            ("config.yaml", "9:3: http_connect.head_timeot"),
            ("config.yaml", "11:18: tunnels.keepalive_max"),
            ("config.yaml", "12:17: tunnels.dial_timeout"),
            ("config.yaml", "13:21: call_home.listen"),
            ("inventory.yaml", "2:47: nodes[0].cidrs[0]"),
            ("inventory.yaml", "3:12: nodes[1].name"),
            ("inventory.yaml", "5:17: nodes[2].addresses[0]"),
            ("inventory.yaml", "6:20: nodes[2].default_route"),
        ],
    );
    assert!(std::net::TcpStream::connect(("127.0.0.1", free)).is_err());
}

#[test]
fn every_mistake_of_a_node_is_shown_at_once_and_nothing_is_opened() {
    let dir = TempDir::new("mistakes").unwrap();
    let taken = TcpListener::bind("127.0.0.1:0").unwrap();
    let (taken, free) = (taken.local_addr().unwrap(), free_port());
    let config = format!(
        "state_dir: state
listen: '{taken}'
admin: {{listen: '127.0.0.1:{free}'}}
call_home: [master.example]
addresses: [10.0.0.5, 10.0.0.5]
policy:
  kubelet_port: 70000
  allow:
    - {{name: kubelet, to: 10.0.0.0/8, ports: '9090-80'}}
limits: {{max_streams: many}}
polcy: {{}}
"
    );
    std::fs::write(dir.path().join("config.yaml"), config).unwrap();
    expect_mistakes(
        "node-agent",
        dir.path(),
        &[
            ("config.yaml", "4:13: call_home[0]"),
            ("config.yaml", "5:23: addresses[1]"),
            ("config.yaml", "7:17: policy.kubelet_port"),
            ("config.yaml", "9:14: policy.allow[0].name"),
            ("config.yaml", "9:46: policy.allow[0].ports"),
            ("config.yaml", "10:23: limits.max_streams"),
            ("config.yaml", "11:1: polcy"),
        ],
    );
    assert!(std::net::TcpStream::connect(("127.0.0.1", free)).is_err());
}

#[test]
fn a_file_that_is_not_there_is_named() {
    for agent in AGENTS {
        for command in ["check-config", "run"] {
            let file = Path::new("/nonexistent/config.yaml");
            ran(agent, Some(file), &[command])
                .failed(EX_CONFIG, &["/nonexistent/config.yaml: can't be read: No such file"]);
        }
    }
}

#[test]
fn an_admin_address_that_others_reach_has_to_be_allowed() {
    let dir = TempDir::new("remote").unwrap();
    let config = dir.path().join("config.yaml");
    for (agent, field) in [("master-agent", ""), ("node-agent", "call_home: ['127.0.0.1:1']\n")] {
        let port = free_port();
        let text =
            |allow: &str| format!("state_dir: state\n{field}admin: {{listen: '0.0.0.0:{port}'{allow}}}\n");
        std::fs::write(&config, text("")).unwrap();
        for command in ["check-config", "run"] {
            ran(agent, Some(&config), &[command])
                .failed(EX_CONFIG, &["admin.listen", "loopback", "allow_remote: true"]);
        }
        assert!(std::net::TcpStream::connect(("127.0.0.1", port)).is_err());
        std::fs::write(&config, text(", allow_remote: true")).unwrap();
        ran(agent, Some(&config), &["check-config"]).succeeded();
        if agent == "master-agent" {
            std::fs::write(&config, text(", allow_remote: true, page: true")).unwrap();
            ran(agent, Some(&config), &["check-config"])
                .failed(EX_CONFIG, &["admin.page", "loopback", "front_end.serve_page"]);
        }
    }
}

#[test]
fn the_sample_files_load() {
    let dir = TempDir::new("samples").unwrap();
    let samples = concat!(env!("CARGO_MANIFEST_DIR"), "/../deploy/config");
    for name in ["master-agent.yaml", "node-agent.yaml", "inventory.yaml"] {
        std::fs::copy(Path::new(samples).join(name), dir.path().join(name)).unwrap();
    }
    let pki = tests::pki::Authority::new("sample").unwrap();
    pki.server(dir.path(), "tls", &["localhost"]).unwrap();
    pki.client(dir.path(), "kubelet-client").unwrap();
    pki.client(dir.path(), "front-proxy-client").unwrap();
    pki.client(dir.path(), "client").unwrap();
    pki.client(dir.path(), "collector-client").unwrap();
    for ca in [
        "client-ca",
        "kubelet-ca",
        "target-ca",
        "apiserver-ca",
        "webhook-ca",
        "oidc-ca",
        "front-end-ca",
        "collector-ca",
    ]
    .map(|ca| format!("{ca}.crt"))
    {
        std::fs::write(dir.path().join(ca), pki.pem()).unwrap();
    }
    std::fs::write(dir.path().join("kubeconfig"), "").unwrap();
    openssh::keygen(&dir.path().join("id_ed25519")).unwrap();
    for secret in ["tokens.csv", "bootstrap-tokens.csv", "collector-headers", "socks5-users"] {
        proto_config::secret_file::write_new(&dir.path().join(secret), b"").unwrap();
    }
    for file in ["service-account.pub", "rbac.yaml", "token"] {
        std::fs::write(dir.path().join(file), "").unwrap();
    }
    for agent in AGENTS {
        let config = dir.path().join(format!("{agent}.yaml"));
        let said = ran(agent, Some(&config), &["check-config"]).succeeded();
        assert_eq!(said, format!("{}: ok\n", config.display()));
    }
}

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
    eventually("the inventory is read again", SOON, async || {
        cluster.master.log_text().contains("inventory read again").then_some(())
    })
    .await;
    cluster.start_node(0).unwrap();
    cluster.wait_state("n1", "connected").await;
    cluster
}

fn explained(cluster: &Cluster, target: &str) -> Value {
    serde_json::from_str(&cluster.command(&["explain", target, "-o", "json"]).unwrap()).unwrap()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn explain_says_which_way_and_why() {
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
        let json = explained(&cluster, target);
        let way = &json["candidates"][0];
        assert_eq!((json["target"].as_str(), way["node"].as_str()), (Some(target), Some(node)), "{json}");
        assert_eq!((json["reason"].as_str(), way["state"].as_str()), (Some(reason), Some(state)), "{json}");
        assert_eq!((&json["node"], &json["dial_microseconds"]), (&Value::Null, &Value::Null), "{json}");
        assert!(json["verdict"].as_str().unwrap().contains(verdict), "{json}");

        let table = cluster.command(&["explain", target]).unwrap();
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
    let reached = explained(&cluster, "127.0.0.1:10250");
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

    let unknown = explained(&cluster, "192.0.2.1:80");
    assert_eq!((&unknown["node"], &unknown["candidates"][0]), (&Value::Null, &Value::Null));
    assert!(unknown["verdict"].as_str().unwrap().contains("no route to 192.0.2.1:80"), "{unknown}");
    let table = cluster.command(&["explain", "nonesuch:80"]).unwrap();
    assert!(table.contains("no route to nonesuch:80"), "{table}");

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

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn sockets_have_their_modes_and_owners() {
    let cluster = Cluster::start(Options {
        nodes: vec![("n1".to_owned(), Kind::CallHome)],
        nodes_down: true,
        ..Options::default()
    });
    let mut cluster = cluster.await.unwrap();
    let of = |name: &str| {
        let metadata = std::fs::metadata(cluster.path().join(name)).unwrap();
        (metadata.permissions().mode() & 0o7777, metadata.uid(), metadata.gid())
    };
    assert_eq!((of("admin.sock"), of("connect.sock")), ((0o600, 0, 0), (0o660, 0, 0)));

    let config = cluster.path().join("master.yaml");
    let text = std::fs::read_to_string(&config).unwrap();
    let owned = text
        .replace("{path: connect.sock}", "{path: connect.sock, mode: '0620', owner: nobody, group: 12345}");
    assert_ne!(text, owned);
    std::fs::write(&config, owned).unwrap();
    cluster.restart_master().unwrap();
    let nobody = eventually("the agent runs again", SOON, async || {
        cluster.command(&["node", "list"]).ok()?;
        std::fs::metadata(cluster.path().join("connect.sock")).ok()
    })
    .await;
    assert_eq!((nobody.permissions().mode() & 0o7777, nobody.uid(), nobody.gid()), (0o620, 65534, 12345));
    let admin = std::fs::metadata(cluster.path().join("admin.sock")).unwrap();
    assert_eq!((admin.permissions().mode() & 0o7777, admin.uid()), (0o600, 0));

    let wrong = text.replace("{path: connect.sock}", "{path: connect.sock, owner: nonesuch}");
    std::fs::write(&config, wrong).unwrap();
    ran("master-agent", Some(&config), &["check-config"])
        .failed(EX_CONFIG, &["http_connect.unix.owner", "nonesuch"]);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_socket_path_of_the_longest_length_that_is_accepted_works() {
    let dir = TempDir::new("long").unwrap();
    let base = dir.path().join("s");
    let room = 98 - base.as_os_str().len() - 1;
    std::fs::create_dir(&base).unwrap();
    let socket = base.join("x".repeat(room));
    assert_eq!(socket.as_os_str().len(), 98);
    let config = dir.path().join("master.yaml");
    let admin = free_port();
    std::fs::write(
        &config,
        format!("state_dir: state\nadmin: {{listen: '127.0.0.1:{admin}', socket: '{}'}}\n", socket.display()),
    )
    .unwrap();
    ran("master-agent", Some(&config), &["check-config"]).succeeded();
    let longer = dir.path().join("longer.yaml");
    std::fs::write(&longer, format!("admin: {{socket: '{}x'}}\n", socket.display())).unwrap();
    assert_eq!(ran("master-agent", Some(&longer), &["check-config"]).code, Some(78));
    let mut command = Command::new(binary("master-agent"));
    let mut master = Process::start(
        "master-agent",
        command.arg("--config").arg(&config).arg("run"),
        &dir.path().join("log"),
    )
    .unwrap();
    eventually("the agent answers on its socket", SOON, async || {
        assert!(master.is_running(), "{}", master.log_text());
        (ran("master-agent", Some(&config), &["node", "list"]).code == Some(0)).then_some(())
    })
    .await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn tokens_are_listed_and_revoked() {
    let dir = TempDir::new("tokens").unwrap();
    let config = dir.path().join("master.yaml");
    let run = |args: &[&str]| ran("master-agent", Some(&config), args);
    std::fs::write(&config, "state_dir: state\n").unwrap();
    run(&["token", "create"]).failed(1, &["call_home:"]);
    std::fs::write(&config, "state_dir: state\ncall_home: {listen: '127.0.0.1:2222'}\n").unwrap();

    let line = run(&["token", "create", "--node", "n1", "--address", "master.example:2222"]).succeeded();
    let words: Vec<&str> = line.split_whitespace().collect();
    assert_eq!(line.lines().count(), 1);
    assert_eq!(words[..4], ["node-agent", "join", "master.example:2222", "--ca-pin"], "{line}");
    assert!(words[4].starts_with("SHA256:") && words[5] == "--token" && words.len() == 7, "{line}");
    let (id, secret) = words[6].strip_prefix("mat1.").unwrap().split_once('.').unwrap();
    let other = run(&["token", "create", "--ttl", "30m"]).succeeded();
    assert!(other.contains(" 127.0.0.1:2222 "), "{other}");

    let table = run(&["token", "list"]).succeeded();
    let rows: Vec<Vec<&str>> = table.lines().map(|l| l.split_whitespace().collect()).collect();
    assert_eq!(rows[0], ["ID", "NODE", "EXPIRES", "USED", "BY"]);
    assert_eq!(rows.len(), 3, "{table}");
    assert!(rows.iter().any(|r| r[..2] == [id, "n1"] && r[3] == "-"), "{table}");
    assert!(rows.iter().any(|r| r[1] == "-" && r[3] == "-"), "{table}");
    let json: Value = serde_json::from_str(&run(&["token", "list", "-o", "json"]).succeeded()).unwrap();
    let listed = json.as_array().unwrap().iter().find(|t| t["id"] == id).unwrap();
    assert_eq!((listed["node"].as_str(), &listed["used_by"]), (Some("n1"), &Value::Null));
    for text in [table, json.to_string()] {
        assert!(!text.contains(secret));
    }

    run(&["token", "revoke", id]).succeeded();
    assert!(!run(&["token", "list"]).succeeded().contains(id));
    run(&["token", "revoke", id]).failed(1, &[id, "master-agent token list"]);
    run(&["token", "create", "--ttl", "1000d"]).failed(1, &["30days"]);
    run(&["token", "create", "--ttl", "soon"]).failed(2, &["--ttl"]);
}

#[test]
fn sshd_config_needs_a_node_of_the_inventory() {
    let dir = TempDir::new("sshd-config").unwrap();
    let config = dir.path().join("master.yaml");
    let key = dir.path().join("key");
    openssh::keygen(&key).unwrap();
    let public = dir.path().join("key.pub").display().to_string();
    let run =
        |node: &str, key: &str| ran("master-agent", Some(&config), &["sshd-config", node, "--host-key", key]);
    std::fs::write(&config, "state_dir: state\n").unwrap();
    run("n3", &public).failed(1, &["`inventory:` is not configured"]);
    let inventory = dir.path().join("inventory.yaml");
    std::fs::write(&inventory, "nodes: [{name: n3, dial: '10.0.0.7:22', addresses: [10.0.0.7]}]\n").unwrap();
    std::fs::write(&config, "state_dir: state\ninventory: inventory.yaml\n").unwrap();
    run("n4", &public).failed(1, &["node n4 is not in", &inventory.display().to_string(), "add it there"]);
    run("n3", &config.display().to_string()).failed(1, &["no OpenSSH public key"]);
    run("n3", "/nonexistent").failed(1, &["/nonexistent"]);
    let script = run("n3", &public).succeeded();
    assert!(script.starts_with("#!/bin/sh\n") && script.contains("PermitOpen 10.0.0.7:10250\n"), "{script}");
    let file = dir.path().join("script");
    std::fs::write(&file, script).unwrap();
    openssh::run(Command::new("sh").arg("-n").arg(&file)).unwrap();
}

#[test]
fn people_are_certified_but_not_as_the_master() {
    let dir = TempDir::new("sign-user").unwrap();
    let config = dir.path().join("master.yaml");
    std::fs::write(&config, "state_dir: state\n").unwrap();
    let key = dir.path().join("key");
    openssh::keygen(&key).unwrap();
    let public = dir.path().join("key.pub").display().to_string();
    let run = |login: &str| ran("master-agent", Some(&config), &["sign-user", login, "--key", &public]);
    let refused = run("master-agent");
    assert_eq!(refused.out, "");
    refused.failed(1, &["the master's own principal", "another login name"]);
    for login in ["alice,master-agent", "", "a\nb"] {
        run(login).failed(1, &["login name"]);
    }
    let certificate = run("alice").succeeded();
    let file = dir.path().join("key-cert.pub");
    std::fs::write(&file, certificate).unwrap();
    let shown = Command::new("ssh-keygen").arg("-L").arg("-f").arg(&file).output().unwrap();
    let shown = String::from_utf8(shown.stdout).unwrap();
    let words: Vec<&str> = shown.split_whitespace().collect();
    assert!(words.windows(3).any(|w| w == ["Principals:", "alice", "Critical"]), "{shown}");
    assert!(shown.contains("permit-port-forwarding") && !shown.contains("permit-pty"), "{shown}");
}

#[test]
fn a_port_that_is_taken_gives_the_three_ways_out() {
    let dir = TempDir::new("taken").unwrap();
    let config = dir.path().join("node.yaml");
    let sshd = TcpListener::bind("127.0.0.1:0").unwrap();
    let taken = sshd.local_addr().unwrap();
    std::fs::write(
        &config,
        format!("state_dir: state\nlisten: '{taken}'\nadmin: {{listen: '127.0.0.1:{}'}}\n", free_port()),
    )
    .unwrap();
    let error = ran("node-agent", Some(&config), &["run"]).failed(1, &WAYS_OUT);
    assert!(error.contains(&taken.to_string()) && error.contains("is taken"), "{error}");
    assert_eq!(error.lines().count(), 1, "{error}");
}

#[derive(Clone, Copy, Debug)]
enum Service {
    /// Accepts and closes.
    Closes,
    /// Answers as a web server does.
    Http,
    /// Takes a line of its own protocol for a mistake and says so, for as long as it is connected.
    Complains,
    /// Waits for a request that it understands.
    Silent,
}

async fn serve(service: Service) -> SocketAddr {
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    tokio::spawn(async move {
        while let Ok((mut socket, _)) = listener.accept().await {
            tokio::spawn(async move {
                let mut buffer = [0; 1024];
                match service {
                    Service::Closes => {}
                    Service::Http => {
                        let _ = socket.read(&mut buffer).await;
                        let _ =
                            socket.write_all(b"HTTP/1.1 400 Bad Request\r\nConnection: close\r\n\r\n").await;
                    }
                    Service::Complains => {
                        while socket.read(&mut buffer).await.is_ok_and(|n| n > 0) {
                            let _ = socket.write_all(b"-ERR unknown command\r\n").await;
                        }
                    }
                    Service::Silent => while socket.read(&mut buffer).await.is_ok_and(|n| n > 0) {},
                }
            });
        }
    });
    address
}

async fn the_reason_names_the_ways_out(service: Service) {
    let address = serve(service).await;
    let cluster = Cluster::start(Options {
        nodes: vec![("n1".to_owned(), Kind::Dialled)],
        master_config: "tunnels: {handshake_timeout: 1s}".to_owned(),
        dial: vec![("n1".to_owned(), address)],
        nodes_down: true,
        ..Options::default()
    })
    .await
    .unwrap();
    cluster.wait_state("n1", "retrying").await;
    let reason = cluster.node_status("n1").unwrap()["reason"].as_str().unwrap().to_owned();
    for way in WAYS_OUT {
        assert!(reason.contains(way), "{service:?}: no {way:?} in {reason:?}");
    }
    let table = cluster.command(&["node", "list"]).unwrap();
    assert!(table.contains("call_home:"), "{table}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn dialling_what_closes_at_once_names_the_ways_out() {
    the_reason_names_the_ways_out(Service::Closes).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn dialling_a_web_server_names_the_ways_out() {
    the_reason_names_the_ways_out(Service::Http).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn dialling_a_server_of_another_protocol_names_the_ways_out() {
    the_reason_names_the_ways_out(Service::Complains).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn dialling_a_silent_server_names_the_ways_out() {
    the_reason_names_the_ways_out(Service::Silent).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn dialling_an_sshd_that_knows_no_master_says_what_it_lacks() {
    let dir = TempDir::new("sshd").unwrap();
    let port = free_port();
    openssh::keygen(&dir.path().join("host_key")).unwrap();
    let host_key = dir.path().join("host_key").display().to_string();
    let _sshd = openssh::sshd(dir.path(), port, &format!("HostKey {host_key}")).unwrap();
    let cluster = Cluster::start(Options {
        nodes: vec![("n1".to_owned(), Kind::Dialled)],
        dial: vec![("n1".to_owned(), SocketAddr::from(([127, 0, 0, 1], port)))],
        nodes_down: true,
        ..Options::default()
    })
    .await
    .unwrap();
    cluster.wait_state("n1", "retrying").await;
    let reason = cluster.node_status("n1").unwrap()["reason"].to_string();
    for way in ["master-agent token create", "master-agent sshd-config", "pin the key in the inventory"] {
        assert!(reason.contains(way), "no {way:?} in {reason}");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_second_agent_does_not_take_the_sockets_of_the_first() {
    let port = target::start().await;
    let nodes = vec![("n1".to_owned(), Kind::Dialled)];
    let cluster = Cluster::start(Options { nodes, ports: vec![port], ..Options::default() }).await.unwrap();
    let config = cluster.path().join("master.yaml");
    // Another set of ports: only the Unix socket clashes.
    let mut text = std::fs::read_to_string(&config).unwrap();
    for address in [cluster.admin, cluster.call_home] {
        text = text.replace(&address.to_string(), &format!("127.0.0.1:{}", free_port()));
    }
    if let Door::Tls(address, _) = &cluster.tls {
        text = text.replace(&address.to_string(), &format!("127.0.0.1:{}", free_port()));
    }
    let second = cluster.path().join("second.yaml");
    std::fs::write(&second, text).unwrap();
    ran("master-agent", Some(&second), &["run"]).failed(1, &["connect.sock", "another process"]);
    let mut stream = cluster.unix.stream(&format!("n1:{port}")).await.unwrap();
    stream.write_all(b"source 8\n").await.unwrap();
    let mut all = Vec::new();
    tokio::time::timeout(Duration::from_secs(20), stream.read_to_end(&mut all)).await.unwrap().unwrap();
    assert_eq!(all.len(), 8);
}
