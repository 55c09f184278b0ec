//! Commands explain themselves, and name every mistake in a configuration at once.

use std::{
    collections::BTreeSet,
    net::TcpListener,
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

pub(super) struct Ran {
    pub(super) code: Option<i32>,
    pub(super) out: String,
    pub(super) err: String,
}

/// Runs an agent's command to its end.
pub(super) fn ran(agent: &str, config: Option<&Path>, args: &[&str]) -> Ran {
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
    pub(super) fn succeeded(self) -> String {
        assert_eq!(self.code, Some(0), "{}", self.err);
        self.out
    }

    /// The error, of which each of `parts` has to be a part.
    pub(super) fn failed(self, code: i32, parts: &[&str]) -> String {
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
    for (agent, count) in [("master-agent", 24), ("node-agent", 8)] {
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
    run(&["token", "create", "--ttl", "1000d"]).failed(1, &["30 days"]);
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
    let nodes = "nodes: [{name: n2}, {name: n3, dial: '10.0.0.7:22', addresses: [10.0.0.7]}]\n";
    std::fs::write(&inventory, nodes).unwrap();
    std::fs::write(&config, "state_dir: state\ninventory: inventory.yaml\n").unwrap();
    run("n4", &public).failed(1, &["node n4 is not in", &inventory.display().to_string(), "add it there"]);
    run("n3", &config.display().to_string()).failed(1, &["no OpenSSH public key"]);
    run("n3", "/nonexistent").failed(1, &["/nonexistent"]);
    run("n2", &public).failed(1, &["n2", "`dial:`", "can't call home"]);
    let script = run("n3", &public).succeeded();
    assert!(script.starts_with("#!/bin/sh\n") && script.contains("PermitOpen 10.0.0.7:10250\n"), "{script}");
    let file = dir.path().join("script");
    std::fs::write(&file, script).unwrap();
    openssh::run(Command::new("sh").arg("-n").arg(&file)).unwrap();
    // Another key would keep the node out that is known.
    let other = dir.path().join("other");
    openssh::keygen(&other).unwrap();
    let other = dir.path().join("other.pub").display().to_string();
    run("n3", &other).failed(1, &["n3 is known by the key SHA256:", &other, "master-agent node forget n3"]);
    run("n3", &public).succeeded();
    ran("master-agent", Some(&config), &["node", "forget", "n3"]).succeeded();
    run("n3", &other).succeeded();
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
