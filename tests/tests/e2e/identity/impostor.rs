//! Nobody else's key is ever taken for a node's or a master's, whoever dialled.

mod papers;

use std::{
    fmt::Write as _,
    net::SocketAddr,
    path::{Path, PathBuf},
    process::Command,
    sync::Arc,
    time::Duration,
};

use papers::{Papers, VALID, dialled_impostors, masters, papers, record_handshake};
use proto::mux::Version;
use tests::{
    cluster::{Cluster, Kind, Options, SOON, binary},
    load::completes,
    openssh,
    process::{Process, eventually, free_port},
    rogue::{self, Identity, Offer, RogueNode, Seen, authenticate, certificate_file},
    steady::{Echo, Steady},
    target,
};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpListener, TcpStream},
    task::JoinSet,
};

pub(super) async fn cluster(kind: Kind, port: u16) -> (Cluster, Steady) {
    let nodes = vec![("n1".to_owned(), kind)];
    let cluster = Cluster::start(Options { nodes, ports: vec![port], ..Options::default() }).await.unwrap();
    let steady = Steady::start(&cluster, "n1", port).await.unwrap();
    (cluster, steady)
}

/// Adds nodes to the inventory, and waits until the master knows them.
async fn add_nodes(cluster: &Cluster, entries: &str, last: &str) {
    let file = cluster.path().join("inventory.yaml");
    let inventory = std::fs::read_to_string(&file).unwrap();
    std::fs::write(&file, format!("{inventory}{entries}")).unwrap();
    cluster.master.signal("HUP");
    eventually("the inventory is read again", SOON, async || cluster.node_status(last).ok()).await;
}

async fn refused_total(cluster: &Cluster, reason: &str) -> f64 {
    let prefix = format!("master_agent_tunnels_refused_total{{reason=\"{reason}\"}}");
    cluster.metric(cluster.admin, &prefix).await.unwrap_or(0.0)
}

fn refused_of(cluster: &Cluster, node: &str) -> u64 {
    cluster.node_status(node).unwrap()["refused"].as_u64().unwrap()
}

/// A directory below the cluster's, for what an impostor holds.
pub(super) fn place(cluster: &Cluster, name: &str) -> PathBuf {
    let directory = cluster.path().join(format!("impostor-{name}"));
    std::fs::create_dir_all(&directory).unwrap();
    directory
}

#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn an_impostor_that_the_master_dials_is_refused() {
    let port = target::start().await;
    let (cluster, mut steady) = cluster(Kind::Dialled, port).await;
    let impostors = dialled_impostors(&cluster);
    let mut rogues = Vec::new();
    let mut sshds = Vec::new();
    let mut entries = String::new();
    let mut names = Vec::new();
    for impostor in &impostors {
        let host_keys = match impostor.host_keys.as_str() {
            "" => String::new(),
            text => format!(", host_keys: {{{text}}}"),
        };
        let at = free_port();
        rogues.push(RogueNode::listen(at, impostor.identity.clone(), true).await.unwrap());
        writeln!(entries, "  - {{name: {}, dial: '127.0.0.1:{at}'{host_keys}}}", impostor.name).unwrap();
        names.push((impostor.name.to_owned(), impostor));
        // Where neither a principal nor a pin decides, each of which is good for one node, a real sshd poses as it, too.
        if ["uncertified", "expired", "not-yet", "other-ca", "unknown", "revoked"].contains(&impostor.name) {
            let (at, directory) = (free_port(), place(&cluster, impostor.name));
            let mut config = format!("HostKey {}\n", impostor.identity.file.display());
            if impostor.identity.certificate.is_some() {
                writeln!(config, "HostCertificate {}", certificate_file(&impostor.identity.file).display())
                    .unwrap();
            }
            sshds.push(openssh::sshd(&directory, at, &config).unwrap());
            let name = format!("{}-sshd", impostor.name);
            writeln!(entries, "  - {{name: {name}, dial: '127.0.0.1:{at}'{host_keys}}}").unwrap();
            names.push((name, impostor));
        }
    }
    add_nodes(&cluster, &entries, &names.last().unwrap().0).await;

    for (name, impostor) in &names {
        let reason = eventually(&format!("{name} is refused"), SOON * 3, async || {
            let status = cluster.node_status(name).ok()?;
            assert_ne!(status["state"], "connected", "{name}");
            (status["refused"].as_u64()? > 0 && status["state"] == "retrying")
                .then(|| status["reason"].to_string())
        })
        .await;
        assert!(reason.contains(impostor.says), "{name}: {reason}");
        assert!(refused_total(&cluster, impostor.reason).await >= 1.0, "{name}: {}", impostor.reason);
        cluster.master.says(&["no tunnel", impostor.says, name.as_str()]).await;
        let refused = cluster.unix.connect(&format!("{name}:{port}")).await.unwrap().err().unwrap();
        assert_eq!(refused.status, 503, "{name}: {refused:?}");
    }
    for (rogue, impostor) in rogues.iter().zip(&impostors) {
        let seen = &rogue.seen;
        assert!(seen.connections() > 0, "{}", impostor.name);
        assert_eq!((seen.authentications(), seen.channels()), (0, 0), "{}", impostor.name);
    }
    for sshd in &sshds {
        assert!(!sshd.log_text().contains("Accepted"), "{}", sshd.log_text());
    }
    assert_eq!(refused_of(&cluster, "n1"), 0);
    steady.check(&cluster).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn a_key_that_changed_after_its_first_use_is_refused() {
    let port = target::start().await;
    let (cluster, mut steady) = cluster(Kind::Dialled, port).await;
    let at = free_port();
    let first = RogueNode::listen(at, papers(&cluster, "first", Papers::None), false).await.unwrap();
    add_nodes(
        &cluster,
        &format!("  - {{name: n9, dial: '127.0.0.1:{at}', host_keys: {{first_use: true}}}}\n"),
        "n9",
    )
    .await;
    cluster.wait_state("n9", "connected").await;
    cluster.master.says(&["trusting a host key on first use"]).await;
    drop(first);

    let ca = ["-h", "-I", "node:n9", "-n", "n9", "-V", "-1h:+1d"];
    for (name, given) in [("second", Papers::None), ("certified", Papers::Ca("host_ca", &ca))] {
        let identity = papers(&cluster, name, given);
        let before = (refused_total(&cluster, "key_changed").await, refused_of(&cluster, "n9"));
        let second = eventually("the port is free again", SOON, async || {
            RogueNode::listen(at, identity.clone(), true).await.ok()
        })
        .await;
        eventually("the changed key is refused", SOON, async || {
            let counted = refused_total(&cluster, "key_changed").await > before.0
                && refused_of(&cluster, "n9") > before.1;
            (counted && second.seen.connections() > 0).then_some(())
        })
        .await;
        cluster.master.says(&["the host key of node n9 has changed", &identity.fingerprint()]).await;
        let refused = cluster.unix.connect(&format!("n9:{port}")).await.unwrap().err().unwrap();
        assert_eq!(refused.status, 503);
        assert_eq!((second.seen.authentications(), second.seen.channels()), (0, 0));
    }
    steady.check(&cluster).await;
}

/// Calls the master home with a session that lets everybody in.
async fn call_home(cluster: &Cluster, identity: &Identity) -> Arc<Seen> {
    let seen = Arc::new(Seen::default());
    let socket = TcpStream::connect(cluster.call_home).await.unwrap();
    let (tunnels, _received) = tokio::sync::mpsc::unbounded_channel();
    let offer = Offer { version: Version::V1, tunnels };
    let _ =
        completes("an impostor's session", rogue::serve(socket, identity.clone(), Some(offer), seen.clone()))
            .await;
    seen
}

#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn an_impostor_that_calls_home_is_refused() {
    let port = target::start().await;
    let (cluster, mut steady) = cluster(Kind::CallHome, port).await;
    let pinned = papers(&cluster, "pinned", Papers::None);
    let entries =
        format!("  - {{name: n2}}\n  - {{name: n3, host_keys: {{pins: ['{}']}}}}\n", pinned.fingerprint());
    add_nodes(&cluster, &entries, "n3").await;

    let n1 = ["-h", "-I", "node:n1", "-n", "n1"];
    let with = |args: &[&'static str], validity: [&'static str; 2]| [args, &validity].concat();
    let expired = with(&n1, ["-V", "-2d:-1h"]);
    let not_yet = with(&n1, ["-V", "+1h:+2d"]);
    let good_dates = with(&n1, VALID);
    let user = with(&["-I", "node:n1", "-n", "n1"], VALID);
    let another_name = with(&["-h", "-I", "node:n1", "-n", "n2"], VALID);
    let nameless = with(&["-h", "-I", "n1", "-n", "n1"], VALID);
    let no_principals = with(&["-h", "-I", "node:n1"], VALID);
    let stranger = with(&["-h", "-I", "node:n7", "-n", "n7"], VALID);
    let around_pins = with(&["-h", "-I", "node:n3", "-n", "n3"], VALID);
    // Columns: the impostor, the metric's reason, the words of the log, its identity, the node that counts it.
    type Case<'a> = (&'a str, &'a str, &'a str, Papers<'a>, Option<&'a str>);
    let cases: [Case<'_>; 12] = [
        ("uncertified", "unknown_key", "has no certificate of this master's host CA", Papers::None, None),
        ("expired", "expired", "expired at", Papers::Ca("host_ca", &expired), None),
        ("not-yet", "not_yet_valid", "is not valid before", Papers::Ca("host_ca", &not_yet), None),
        (
            "other-ca",
            "wrong_ca",
            "shows a certificate of another CA",
            Papers::Ca("other_ca", &good_dates),
            None,
        ),
        (
            "user-ca",
            "wrong_ca",
            "shows a certificate of another CA",
            Papers::Ca("user_ca", &good_dates),
            None,
        ),
        ("user", "user_certificate", "shows a user certificate", Papers::Ca("host_ca", &user), None),
        (
            "another-name",
            "wrong_principal",
            "names no node (key id \"node:n1\"",
            Papers::Ca("host_ca", &another_name),
            None,
        ),
        (
            "nameless",
            "wrong_principal",
            "names no node (key id \"n1\"",
            Papers::Ca("host_ca", &nameless),
            None,
        ),
        ("no-principals", "wrong_principal", "names no node", Papers::Ca("host_ca", &no_principals), None),
        (
            "stranger",
            "unknown_node",
            "node n7 is not in the inventory",
            Papers::Ca("host_ca", &stranger),
            None,
        ),
        (
            "around-pins",
            "other_trust",
            "node n3 is recognised by its `host_keys:`",
            Papers::Ca("host_ca", &around_pins),
            Some("n3"),
        ),
        // The host CA does vouch for this key as n1's, but n1 joined with another.
        (
            "superseded",
            "superseded",
            "node n1 has joined with another key",
            Papers::Ca("host_ca", &good_dates),
            Some("n1"),
        ),
    ];
    for (name, reason, says, given, node) in cases {
        let identity = papers(&cluster, name, given);
        let before = refused_total(&cluster, reason).await;
        let counted = node.map(|node| refused_of(&cluster, node));
        let seen = call_home(&cluster, &identity).await;
        eventually(&format!("{name} is counted as {reason}"), SOON, async || {
            (refused_total(&cluster, reason).await > before).then_some(())
        })
        .await;
        cluster.master.says(&["refused a call home", says]).await;
        if let Some(node) = node {
            assert_eq!(Some(refused_of(&cluster, node)), counted.map(|n| n + 1), "{name}");
        }
        // A key that is nobody's is asked whether it wants to join; any other is not even shown who the master is.
        if name == "uncertified" {
            assert_eq!(seen.channels(), 1);
        } else {
            assert_eq!((seen.authentications(), seen.channels()), (0, 0), "{name}");
        }
        steady.check(&cluster).await;
    }
    assert_eq!(refused_of(&cluster, "n2"), 0);
    assert_eq!(cluster.node_status("n2").unwrap()["state"], "waiting");
    Echo::open(&cluster.unix, &format!("n1:{port}")).await.unwrap();
}

/// A further node-agent with a copy of that state directory, which calls `master`.
fn second_agent(cluster: &Cluster, name: &str, state: &Path, master: SocketAddr) -> (Process, PathBuf) {
    let directory = place(cluster, name);
    let copy = directory.join("state");
    openssh::run(Command::new("cp").arg("-a").arg(state).arg(&copy)).unwrap();
    (start_agent(&directory, name, &cluster.nodes[0].dir, master), copy)
}

/// Starts a node-agent of `directory/state` with the policy of the node in `like`.
fn start_agent(directory: &Path, name: &str, like: &Path, master: SocketAddr) -> Process {
    let config = std::fs::read_to_string(like.join("node.yaml")).unwrap();
    let policy = config.lines().find(|line| line.starts_with("policy:")).unwrap();
    let file = directory.join("node.yaml");
    let admin = free_port();
    std::fs::write(
        &file,
        format!(
            "state_dir: state\nadmin: {{listen: '127.0.0.1:{admin}', socket: admin.sock}}\ncall_home: ['{master}']\n{policy}\n"
        ),
    )
    .unwrap();
    let mut command = Command::new(binary("node-agent"));
    command.arg("--config").arg(&file).arg("run").current_dir(directory);
    Process::start(name, &mut command, &directory.join("log")).unwrap()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn a_stolen_certificate_proves_nothing_without_its_key() {
    let port = target::start().await;
    let (cluster, _) = cluster(Kind::CallHome, port).await;
    let recorded = record_handshake(&cluster).await;
    eventually("the recorded tunnel is gone", SOON, async || {
        (cluster.node_status("n1").ok()?["tunnels"].as_array()?.len() == 1).then_some(())
    })
    .await;
    let mut steady = Steady::start(&cluster, "n1", port).await.unwrap();

    // Played back, the certificate is genuine, and the signature is over another exchange.
    let before = refused_total(&cluster, "ssh").await;
    let mut socket = TcpStream::connect(cluster.call_home).await.unwrap();
    socket.write_all(&recorded).await.unwrap();
    let mut answer = Vec::new();
    let _ = completes("the master hangs up", socket.read_to_end(&mut answer)).await;
    eventually("the replay is counted", SOON, async || {
        (refused_total(&cluster, "ssh").await > before).then_some(())
    })
    .await;
    cluster.master.says(&["refused a call home", "ignature"]).await;
    steady.check(&cluster).await;

    // A server with the certificate of another key has only its own key to show.
    let thief = papers(&cluster, "thief", Papers::None);
    let stolen = cluster.nodes[0].dir.join("state/host_key-cert.pub");
    std::fs::copy(&stolen, certificate_file(&thief.file)).unwrap();
    let thief = Identity::read(&thief.file).unwrap();
    let before = refused_total(&cluster, "unknown_key").await;
    let _ = call_home(&cluster, &thief).await;
    eventually("the thief is counted", SOON, async || {
        (refused_total(&cluster, "unknown_key").await > before).then_some(())
    })
    .await;
    steady.check(&cluster).await;

    // And a node-agent does not start with them.
    let directory = place(&cluster, "thief-agent");
    openssh::run(
        Command::new("cp").arg("-a").arg(cluster.nodes[0].dir.join("state")).arg(directory.join("state")),
    )
    .unwrap();
    proto_config::secret_file::replace(
        &directory.join("state/host_key"),
        &std::fs::read(&thief.file).unwrap(),
    )
    .unwrap();
    let mut agent = start_agent(&directory, "thief", &cluster.nodes[0].dir, cluster.call_home);
    assert_eq!(agent.wait(Duration::from_secs(60)).unwrap(), Some(1));
    assert!(agent.log_text().contains("is for another key than host_key"), "{}", agent.log_text());
    steady.check(&cluster).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn the_key_that_a_node_had_before_it_joined_anew_is_worthless() {
    let port = target::start().await;
    let (mut cluster, before) = cluster(Kind::CallHome, port).await;
    drop(before);
    let state = cluster.nodes[0].dir.join("state");
    let old = cluster.path().join("old-state");
    openssh::run(Command::new("cp").arg("-a").arg(&state).arg(&old)).unwrap();
    cluster.nodes[0].process = None;
    std::fs::remove_dir_all(&state).unwrap();
    let line = cluster.command(&["token", "create", "--node", "n1"]).unwrap();
    cluster.node_command(0, line.trim()).unwrap();
    cluster.start_node(0).unwrap();
    cluster.wait_connected().await;
    let mut steady = eventually("the new tunnel carries streams", SOON, async || {
        Steady::start(&cluster, "n1", port).await.ok()
    })
    .await;

    let (counted, total) = (refused_of(&cluster, "n1"), refused_total(&cluster, "superseded").await);
    let (agent, _) = second_agent(&cluster, "old", &old, cluster.call_home);
    eventually("the old key is refused again and again", SOON * 2, async || {
        (refused_of(&cluster, "n1") >= counted + 3
            && refused_total(&cluster, "superseded").await >= total + 3.0)
            .then_some(())
    })
    .await;
    cluster.master.says(&["node n1 has joined with another key"]).await;
    assert!(!agent.log_text().contains("authenticated"), "{}", agent.log_text());
    steady.check(&cluster).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn an_agent_with_another_clusters_identity_is_refused_by_this_master() {
    let port = target::start().await;
    let (ours, mut steady) = cluster(Kind::CallHome, port).await;
    let (theirs, mut their_steady) = cluster(Kind::CallHome, port).await;
    let before = refused_total(&ours, "wrong_ca").await;
    // Both clusters have an n1.
    let (agent, _) = second_agent(&theirs, "astray", &theirs.nodes[0].dir.join("state"), ours.call_home);
    eventually("the foreign n1 is refused", SOON, async || {
        (refused_total(&ours, "wrong_ca").await >= before + 2.0).then_some(())
    })
    .await;
    ours.master.says(&["shows a certificate of another CA"]).await;
    let log = agent.says(&["no tunnel to the master"]).await;
    assert!(!log.contains("authenticated"), "{log}");
    steady.check(&ours).await;
    their_steady.check(&theirs).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn a_second_connection_of_the_same_node_stands_by_and_takes_over() {
    let port = target::start().await;
    let (mut cluster, mut steady) = cluster(Kind::CallHome, port).await;
    let (second, _) =
        second_agent(&cluster, "second", &cluster.nodes[0].dir.join("state"), cluster.call_home);
    let roles = |cluster: &Cluster| -> Option<Vec<(String, u64)>> {
        let status = cluster.node_status("n1").ok()?;
        let tunnels = status["tunnels"].as_array()?;
        tunnels.iter().map(|t| Some((t["role"].as_str()?.to_owned(), t["streams"].as_u64()?))).collect()
    };
    eventually("one is active, one stands by", SOON, async || {
        (roles(&cluster)? == [("active".to_owned(), 1), ("standby".to_owned(), 0)]).then_some(())
    })
    .await;
    // New streams go to the active one.
    let further = Echo::open(&cluster.unix, &format!("n1:{port}")).await.unwrap();
    assert_eq!(roles(&cluster).unwrap(), [("active".to_owned(), 2), ("standby".to_owned(), 0)]);
    drop(further);
    steady.say().await.unwrap();

    cluster.nodes[0].process = None;
    // The other takes over as soon as the kernel has told the master.
    let began = std::time::Instant::now();
    let mut echo = eventually("the other carries streams", SOON, async || {
        Echo::open(&cluster.unix, &format!("n1:{port}")).await.ok()
    })
    .await;
    println!("taken over after {:?}", began.elapsed());
    assert_eq!(cluster.node_status("n1").unwrap()["state"], "connected");
    assert!(steady.say().await.is_err(), "a stream of the dead agent still echoes");
    eventually("one tunnel is left", SOON, async || {
        (roles(&cluster)? == [("active".to_owned(), 1)]).then_some(())
    })
    .await;
    echo.say().await.unwrap();
    second.says(&["called home"]).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn an_impostor_master_that_dials_a_node_is_refused() {
    let port = target::start().await;
    let (cluster, mut steady) = cluster(Kind::Dialled, port).await;
    let node = cluster.nodes[0].process.as_ref().unwrap();
    let address = SocketAddr::from(([127, 0, 0, 1], cluster.nodes[0].port));
    let said = |says: &str| node.log_text().matches(says).count();
    for (name, login, says, identity) in masters(&cluster) {
        let before = said(says);
        let socket = TcpStream::connect(address).await.unwrap();
        let came = completes(name, authenticate(socket, &identity, login, 1 << 20)).await;
        assert!(!matches!(came, Ok((_, true))), "{name} was let in");
        eventually(&format!("{name}: {says}"), SOON, async || (said(says) > before).then_some(())).await;
        steady.check(&cluster).await;
    }

    // A person's certificate is good for a person: no multiplexer, and only what the policy allows.
    let args = ["-I", "alice", "-n", "alice", "-V", "-1h:+1d"];
    let identity = papers(&cluster, "alice", Papers::Ca("user_ca", &args));
    let socket = TcpStream::connect(address).await.unwrap();
    let (session, accepted) = authenticate(socket, &identity, "alice", 1 << 20).await.unwrap();
    assert!(accepted);
    assert!(session.channel_open_session().await.is_err());
    let forbidden = u32::from(address.port());
    assert!(session.channel_open_direct_tcpip("127.0.0.1", forbidden, "127.0.0.1", 1).await.is_err());
    assert!(session.channel_open_direct_tcpip("127.0.0.1", u32::from(port), "127.0.0.1", 1).await.is_ok());
    steady.check(&cluster).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn an_impostor_master_that_is_called_is_refused() {
    let port = target::start().await;
    let (cluster, mut steady) = cluster(Kind::CallHome, port).await;
    let listener = TcpListener::bind(("127.0.0.1", 0)).await.unwrap();
    let at = listener.local_addr().unwrap();
    // n1's own identity, which by mistake or malice is pointed at the impostor.
    let (agent, _) = second_agent(&cluster, "called", &cluster.nodes[0].dir.join("state"), at);
    let said = |says: &str| agent.log_text().matches(says).count();
    // A person may come to a node that listens, and must not take a master's place here.
    let args = ["-I", "alice", "-n", "alice", "-V", "-1h:+1d"];
    let person = papers(&cluster, "called-person", Papers::Ca("user_ca", &args));
    let person = ("a person", "alice", "only a master may answer where this node calls home", person);
    for (name, login, says, identity) in masters(&cluster).into_iter().chain([person]) {
        let before = said(says);
        let (socket, _) = completes("the node calls", listener.accept()).await.unwrap();
        let came = completes(name, authenticate(socket, &identity, login, 1 << 20)).await;
        assert!(!matches!(came, Ok((_, true))), "{name} was let in");
        drop(came);
        eventually(&format!("{name}: {says}"), SOON, async || (said(says) > before).then_some(())).await;
    }
    assert!(!agent.log_text().contains("called home"), "{}", agent.log_text());
    steady.check(&cluster).await;
}

/// A master whose host CA is its own, and which n1's port is given to.
#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn another_clusters_master_gets_no_tunnel_to_this_node() {
    let port = target::start().await;
    let (ours, mut steady) = cluster(Kind::Dialled, port).await;
    let (theirs, _) = cluster(Kind::Dialled, port).await;
    let ours_at = ours.nodes[0].port;
    // They try once with their own idea of whom to trust, and once with the node's key pinned, so that the node decides.
    let pin = Identity::read(&ours.nodes[0].dir.join("state/host_key")).unwrap().fingerprint();
    let entries = format!(
        "  - {{name: borrowed, dial: '127.0.0.1:{ours_at}'}}\n  - {{name: pinned, dial: '127.0.0.1:{ours_at}', host_keys: {{pins: ['{pin}']}}}}\n"
    );
    add_nodes(&theirs, &entries, "pinned").await;
    for (name, reason, says) in [
        ("borrowed", "wrong_ca", "shows a certificate of another CA"),
        ("pinned", "unauthorized", "the node refused the master's certificate"),
    ] {
        eventually(&format!("{name} is refused"), SOON, async || {
            let status = theirs.node_status(name).ok()?;
            (status["state"] == "retrying" && status["reason"].as_str()?.contains(says)).then_some(())
        })
        .await;
        assert!(refused_total(&theirs, reason).await >= 1.0);
        assert_eq!(theirs.unix.connect(&format!("{name}:{port}")).await.unwrap().err().unwrap().status, 503);
    }
    let node = ours.nodes[0].process.as_ref().unwrap();
    node.says(&["refused a certificate", "signed by a CA that is not trusted here"]).await;
    steady.check(&ours).await;
}

/// Many impostors at once: each is refused, whatever the others do.
#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn a_crowd_of_impostors_changes_nothing() {
    let port = target::start().await;
    let (cluster, mut steady) = cluster(Kind::CallHome, port).await;
    let identity = papers(
        &cluster,
        "crowd",
        Papers::Ca("other_ca", &["-h", "-I", "node:n1", "-n", "n1", "-V", "-1h:+1d"]),
    );
    let before = refused_total(&cluster, "wrong_ca").await;
    let mut crowd = JoinSet::new();
    for _ in 0..64 {
        let (address, identity) = (cluster.call_home, identity.clone());
        crowd.spawn(async move {
            let seen = Arc::new(Seen::default());
            let socket = TcpStream::connect(address).await.unwrap();
            let _ =
                completes("an impostor's session", rogue::serve(socket, identity, None, seen.clone())).await;
            seen.authentications()
        });
    }
    assert_eq!(crowd.join_all().await.iter().sum::<usize>(), 0);
    eventually("all are counted", SOON, async || {
        (refused_total(&cluster, "wrong_ca").await >= before + 64.0).then_some(())
    })
    .await;
    steady.check(&cluster).await;
}
