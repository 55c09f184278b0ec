//! Peers that are refused are told why, in words that reach their logs. Files that others can read or change are
//! refused.

use std::{
    fs::Permissions,
    io::Write,
    net::SocketAddr,
    os::unix::fs::{PermissionsExt, chown},
    path::{Path, PathBuf},
    process::{Command, Output, Stdio},
    sync::Arc,
    time::Duration,
};

use futures_util::future::join_all;
use russh::{
    Disconnect, MethodKind, MethodSet, SshId,
    keys::Certificate,
    server::{self, Auth, PublicKeyOffer},
};
use tests::{
    cluster::{Cluster, Kind, Options, SOON, binary},
    load::completes,
    openssh,
    pki::Authority,
    process::{Process, TempDir, eventually, free_port},
    rogue::{self, Identity},
};
use tokio::{
    net::{TcpListener, TcpStream},
    sync::Notify,
};

/// A text of an SSH peer that tries to forge lines of a log.
const NASTY: &str = "\u{1b}[2J\u{1b}]0;owned\u{7}\r\n2026-01-01T00:00:00Z  INFO all is well\u{202e}";

async fn cluster(kind: Kind) -> Cluster {
    let nodes = vec![("n1".to_owned(), kind)];
    Cluster::start(Options { nodes, nodes_down: true, ..Options::default() }).await.unwrap()
}

/// A host of `cluster` with a key of its own, which this CA certified with these arguments of ssh-keygen.
fn host(cluster: &Cluster, name: &str, certified: Option<(&Path, &[&str])>) -> PathBuf {
    let directory = cluster.path().join(format!("host-{name}"));
    let state = directory.join("state");
    std::fs::create_dir_all(&state).unwrap();
    openssh::keygen(&state.join("host_key")).unwrap();
    if let Some((ca, args)) = certified {
        rogue::certify(&state.join("host_key"), ca, args).unwrap();
    }
    for ca in ["host_ca.pub", "user_ca.pub"] {
        std::fs::copy(cluster.nodes[0].dir.join("state").join(ca), state.join(ca)).unwrap();
    }
    // An agent does not start with a certificate that its own host CA has not signed.
    if let Some((ca, _)) = certified {
        std::fs::copy(ca.with_extension("pub"), state.join("host_ca.pub")).unwrap();
    }
    directory
}

fn calling(directory: &Path, master: SocketAddr) -> Process {
    let config = format!(
        "state_dir: state\nadmin: {{listen: '127.0.0.1:{}', socket: admin.sock}}\ncall_home: ['{master}']\n",
        free_port()
    );
    let file = directory.join("node.yaml");
    std::fs::write(&file, config).unwrap();
    let mut command = Command::new(binary("node-agent"));
    command.arg("--config").arg(&file).arg("run").current_dir(directory);
    Process::start("node-agent", &mut command, &directory.join("log")).unwrap()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn a_node_that_calls_home_and_is_refused_says_why() {
    let cluster = cluster(Kind::CallHome).await;
    let ours = cluster.path().join("master/host_ca");
    let theirs = cluster.path().join("their_ca");
    openssh::keygen(&theirs).unwrap();
    let valid: &[&str] = &["-h", "-I", "node:n1", "-n", "n1", "-V", "-1h:+1d"];
    let expired: &[&str] = &["-h", "-I", "node:n1", "-n", "n1", "-V", "-2d:-1h"];
    let unlisted: &[&str] = &["-h", "-I", "node:n7", "-n", "n7", "-V", "-1h:+1d"];
    let mut said = String::new();
    for (name, certified, parts) in [
        ("uncertified", None, ["has no certificate of this master's host CA", "token create"]),
        (
            "other-ca",
            Some((theirs.as_path(), valid)),
            ["signed by another CA", "join the host to this master"],
        ),
        (
            "expired",
            Some((ours.as_path(), expired)),
            ["the host certificate expired at", "join the host again"],
        ),
        ("unlisted", Some((ours.as_path(), unlisted)), ["node n7 is not in the inventory", ""]),
        ("superseded", Some((ours.as_path(), valid)), ["node n1 has joined with another key", ""]),
    ] {
        let agent = calling(&host(&cluster, name, certified), cluster.call_home);
        said.push_str(&agent.says(&["the master refused the link", parts[0], parts[1]]).await);
    }
    // The key that n1 has is for those alone who have it.
    let current = Identity::read(&cluster.nodes[0].dir.join("state/host_key")).unwrap().fingerprint();
    assert!(!said.contains(&current) && !said.contains(&cluster.path().join("master").display().to_string()));
}

async fn node_is_forgotten(kind: Kind) {
    let mut cluster = cluster(kind).await;
    cluster.start_node(0).unwrap();
    cluster.wait_state("n1", "connected").await;
    cluster.command(&["node", "forget", "n1"]).unwrap();
    let node = cluster.nodes[0].process.as_ref().unwrap();
    node.says(&["the master takes no new streams", "no key of node n1 is known here"]).await;
    // The node says so at each further attempt.
    node.says(&["the master refused the link", "no key of node n1 is known here"]).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn a_node_that_is_forgotten_while_it_is_linked_says_why() {
    join_all([Kind::CallHome, Kind::Dialled].map(node_is_forgotten)).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn the_master_says_why_a_node_refuses_it() {
    let mut cluster = cluster(Kind::Dialled).await;
    let theirs = cluster.path().join("their_ca");
    openssh::keygen(&theirs).unwrap();
    let trusted = cluster.nodes[0].dir.join("state/user_ca.pub");
    std::fs::copy(theirs.with_extension("pub"), &trusted).unwrap();
    cluster.start_node(0).unwrap();
    let parts =
        ["the node refused the master's certificate", "signed by a CA that is not trusted here", "user CA"];
    let reason = eventually("node list says why", SOON, async || {
        let status = cluster.node_status("n1").ok()?;
        let reason = status["reason"].as_str()?.to_owned();
        parts.iter().all(|part| reason.contains(part)).then_some(reason)
    })
    .await;
    assert!(reason.contains("closed by the node"), "{reason}");
    cluster.master.says(&["no tunnel", parts[0], parts[1]]).await;
    let node = cluster.nodes[0].process.as_ref().unwrap();
    node.says(&["session ended", "refused the certificate of a master", parts[1]]).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn a_host_that_may_not_join_over_https_says_why() {
    let cluster = cluster(Kind::CallHomeHttps).await;
    // A key that is a node's already has nothing to join for.
    let key = Identity::read(&cluster.nodes[0].dir.join("state/host_key")).unwrap();
    let inventory = format!(
        "nodes:\n  - {{name: n1, host_keys: {{pins: ['{}']}}}}\n  - {{name: n2}}\n",
        key.fingerprint()
    );
    std::fs::write(cluster.path().join("inventory.yaml"), inventory).unwrap();
    cluster.master.signal("HUP");
    cluster.master.says(&["inventory read again"]).await;
    let line = cluster.command(&["token", "create", "--address", &cluster.https_master()]).unwrap();
    let joins =
        |node| cluster.node_command(0, &format!("{} --node {node}", line.trim())).unwrap_err().to_string();
    let error = joins("n1");
    assert!(error.contains("refused the link: the call home was admitted for a host that joins, but the host key belongs to node n1"), "{error}");
    // The front end's own refusals give a reason, too: the credential is n1's.
    let error = joins("n2");
    assert!(error.contains("403 Forbidden") && error.contains("can't call home as \"n2\""), "{error}");
}

/// In a node-agent's place: refuses every master, with a text.
struct Rude(Arc<Notify>);

impl server::Handler for Rude {
    type Error = russh::Error;

    async fn auth_publickey_offered(&mut self, _: &str, _: PublicKeyOffer<'_>) -> Result<Auth, russh::Error> {
        Ok(Auth::Accept)
    }

    async fn auth_openssh_certificate(&mut self, _: &str, _: &Certificate) -> Result<Auth, russh::Error> {
        self.0.notify_one();
        Ok(Auth::reject())
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn what_a_peer_says_harms_no_log() {
    let mut cluster = cluster(Kind::Dialled).await;
    cluster.start_node(0).unwrap();
    cluster.wait_state("n1", "connected").await;
    let long = format!("{NASTY}{}", "x".repeat(20_000));
    let harmless = |log: &str| {
        let clean = !log.contains(['\u{1b}', '\u{7}', '\u{202e}']);
        let whole = log.lines().all(|line| !line.starts_with("2026-01-01T00:00:00Z"));
        assert!(clean && whole && log.lines().all(|line| line.len() < 2000), "{log:?}");
    };

    // A stranger poses as a master to a node.
    let node = cluster.nodes[0].process.as_ref().unwrap();
    let address = SocketAddr::from(([127, 0, 0, 1], cluster.nodes[0].port));
    let stranger = Identity::new(&cluster.path().join("stranger")).unwrap();
    let socket = TcpStream::connect(address).await.unwrap();
    let (mut session, accepted) =
        completes("a session", rogue::authenticate(socket, &stranger, "x", 1 << 20)).await.unwrap();
    assert!(!accepted);
    let _ = completes("an answer", session.authenticate_none(format!("refused: {long}"))).await;
    harmless(&node.says(&["the master refused the link", "all is well"]).await);

    // A stranger poses as a node to the master.
    let listener = TcpListener::bind(("127.0.0.1", 0)).await.unwrap();
    let (at, pin) = (listener.local_addr().unwrap(), stranger.fingerprint());
    let config = Arc::new(server::Config {
        server_id: SshId::Standard("SSH-2.0-node-agent".into()),
        methods: MethodSet::from(&[MethodKind::PublicKey][..]),
        auth_rejection_time: Duration::ZERO,
        keys: vec![stranger.key.clone()],
        preferred: proto_net::ssh::preferred(),
        ..server::Config::default()
    });
    let text = long.clone();
    tokio::spawn(async move {
        while let Ok((socket, _)) = listener.accept().await {
            let refused = Arc::new(Notify::new());
            let Ok(session) = server::run_stream(config.clone(), socket, Rude(refused.clone())).await else {
                continue;
            };
            refused.notified().await;
            let _ = session.handle().disconnect(Disconnect::ByApplication, text.clone(), String::new()).await;
            let _ = session.await;
        }
    });
    let file = cluster.path().join("inventory.yaml");
    let mut inventory = std::fs::read_to_string(&file).unwrap();
    inventory.push_str(&format!("  - {{name: rude, dial: '{at}', host_keys: {{pins: ['{pin}']}}}}\n"));
    std::fs::write(&file, inventory).unwrap();
    cluster.master.signal("HUP");
    harmless(&cluster.master.says(&["no tunnel", "rude", "all is well"]).await);
    let reason = cluster.node_status("rude").unwrap()["reason"].as_str().unwrap().to_owned();
    harmless(&reason);
}

fn ran(agent: &str, config: &Path, command: &str) -> Output {
    Command::new(binary(agent))
        .arg("--config")
        .arg(config)
        .arg(command)
        .stdin(Stdio::null())
        .output()
        .unwrap()
}

#[test]
fn files_that_others_can_read_or_change_are_refused_with_what_to_do() {
    let dir = TempDir::new("modes").unwrap();
    let path = dir.path();
    let pki = Authority::new("CA").unwrap();
    std::fs::write(path.join("ca.crt"), pki.pem()).unwrap();
    pki.server(path, "tls", &["localhost"]).unwrap();
    let state = path.join("state");
    std::fs::create_dir(&state).unwrap();
    let key = path.join("tls.key");
    let configs = [
        (
            "master-agent",
            "http_connect: {tls: {cert: tls.crt, key: tls.key, client_ca: ca.crt}, unix: {path: a}}\n",
        ),
        ("node-agent", "listen: 127.0.0.1:0\ncall_home_https: {cert: tls.crt, key: tls.key}\n"),
    ]
    .map(|(agent, more)| {
        let file = path.join(format!("{agent}.yaml"));
        std::fs::write(&file, format!("state_dir: state\n{more}")).unwrap();
        (agent, file)
    });
    let mode = |path: &Path, mode| std::fs::set_permissions(path, Permissions::from_mode(mode)).unwrap();
    for (agent, config) in &configs {
        // With the group of the key's file, as Debian's ssl-cert or a pod's fsGroup.
        mode(&key, 0o640);
        chown(&key, None, Some(12345)).unwrap();
        let output = ran(agent, config, "check-config");
        assert!(output.status.success(), "{output:?}");
    }
    let refused = |what: &str, parts: &[&str]| {
        for (agent, config) in &configs {
            for command in ["check-config", "run"] {
                let output = ran(agent, config, command);
                let error = String::from_utf8(output.stderr).unwrap();
                assert_eq!(output.status.code(), Some(78), "{what}: {agent} {command}: {error}");
                for part in parts {
                    assert!(error.contains(part), "{what}: {agent} {command}: no {part:?} in {error}");
                }
            }
        }
    };
    let (key_text, state_text) = (key.display().to_string(), state.display().to_string());
    mode(&key, 0o644);
    refused("a key for all to read", &["mode 0644", &format!("chmod 600 {key_text}")]);
    mode(&key, 0o660);
    refused("a key for a group to write", &["mode 0660", &format!("chmod 600 {key_text}")]);
    mode(&key, 0o600);
    chown(&key, Some(65534), None).unwrap();
    refused("another user's key", &["uid 65534", &format!("chown 0 {key_text}")]);
    chown(&key, Some(0), None).unwrap();
    mode(&state, 0o775);
    refused("a state directory for a group to write", &["state_dir", &format!("chmod 700 {state_text}")]);
    mode(&state, 0o755);
    chown(&state, Some(65534), None).unwrap();
    refused("another user's state directory", &["state_dir", &format!("chown -R 0 {state_text}")]);
    chown(&state, Some(0), None).unwrap();

    // The reader of the file checks what is in it.
    for (agent, config, name) in
        [("master-agent", &configs[0].1, "user_ca"), ("node-agent", &configs[1].1, "host_key")]
    {
        let secret = state.join(name);
        openssh::keygen(&secret).unwrap();
        for (bits, advice) in [(0o640, "chmod 600"), (0o604, "chmod 600")] {
            mode(&secret, bits);
            let output = ran(agent, config, "run");
            let error = String::from_utf8(output.stderr).unwrap();
            assert!(error.contains(&format!("{advice} {}", secret.display())), "{agent}: {error}");
            assert_eq!(output.status.code(), Some(1), "{agent}: {error}");
        }
        mode(&secret, 0o600);
    }
    // The masters that a node trusts are no secret, but others must not choose them.
    let trusted = state.join("user_ca.pub");
    mode(&trusted, 0o646);
    let error = String::from_utf8(ran("node-agent", &configs[1].1, "run").stderr).unwrap();
    assert!(error.contains(&format!("chmod 644 {}", trusted.display())), "{error}");
}

#[test]
fn a_password_is_hashed_from_standard_input() {
    let hashed = |name: &str, input: &[u8]| {
        let mut command = Command::new(binary("master-agent"));
        command.args(["hash-password", name]);
        command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
        let mut child = command.spawn().unwrap();
        child.stdin.take().unwrap().write_all(input).unwrap();
        child.wait_with_output().unwrap()
    };
    let mut lines = Vec::new();
    for input in [&b"wonderland"[..], b"wonderland\n", b"wonderland\r\nmore"] {
        let output = hashed("alice", input);
        assert!(output.status.success(), "{output:?}");
        lines.push(String::from_utf8(output.stdout).unwrap());
    }
    for line in &lines {
        assert!(line.starts_with("alice:$argon2id$v=19$m=19456,t=2,p=1$") && line.ends_with('\n'), "{line}");
        assert!(!line.contains("wonderland"));
    }
    lines.dedup();
    assert_eq!(lines.len(), 3, "each has a salt of its own");
    for (name, input) in [("alice", &b"\n"[..]), ("alice", &[b'x'; 256]), ("al ice", b"x"), ("", b"x")] {
        let output = hashed(name, input);
        assert_eq!((output.status.code(), output.stdout.len()), (Some(1), 0), "{name:?} {output:?}");
    }

    // A file in the old form says what to do.
    let dir = TempDir::new("users").unwrap();
    let users = dir.path().join("users");
    let sha256 = "2bb80d537b1da3e38bd30361aa855686bde0eacd7162fef6a25fe97bf527a25b";
    proto_config::secret_file::write_new(&users, format!("# people\nalice:{sha256}\n").as_bytes()).unwrap();
    let config = dir.path().join("master.yaml");
    std::fs::write(
        &config,
        "state_dir: state\nadmin: {listen: '127.0.0.1:0', socket: admin.sock}\nhttp_connect: {unix: {path: connect.sock}}\n\
         socks5: {tcp: {listen: '127.0.0.1:0', users_file: users}}\n",
    )
    .unwrap();
    let output = ran("master-agent", &config, "run");
    let error = String::from_utf8(output.stderr).unwrap();
    assert_eq!(output.status.code(), Some(1), "{error}");
    assert!(error.contains("users:2: ") && error.contains("master-agent hash-password NAME"), "{error}");
    assert!(!error.contains(sha256));
}
