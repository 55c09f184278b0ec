//! The agents work as services: they tell systemd when they are ready, and need few rights.

use std::{
    os::unix::fs::{FileTypeExt, MetadataExt, PermissionsExt},
    path::Path,
    process::Command,
};

use tests::{
    client::Door,
    cluster::{Cluster, Kind, Options, SOON, binary},
    process::{Process, TempDir, eventually, free_port},
    target,
};
use tokio::net::{TcpStream, UnixDatagram, UnixStream};

use super::{
    draining::Download,
    operate::{PATIENCE, local, nodes, until},
};

/// Receives messages as systemd would, until one is not about a socket to keep. Returns it, and the names of the sockets.
async fn told(socket: &UnixDatagram) -> (String, Vec<String>) {
    let mut kept = Vec::new();
    loop {
        let mut buffer = [0; 1024];
        let received = tokio::time::timeout(SOON, socket.recv(&mut buffer)).await;
        let n = received.expect("a message to systemd").unwrap();
        let message = String::from_utf8(buffer[..n].to_vec()).unwrap();
        match message.strip_prefix("FDSTORE=1\nFDPOLL=0\nFDNAME=") {
            Some(name) => kept.push(name.trim().to_owned()),
            None if message.starts_with("FDSTOREREMOVE=1\n") => {}
            None => return (message.trim().to_owned(), kept),
        }
    }
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
    let (message, kept) = told(&socket).await;
    assert_eq!((message.as_str(), kept.len()), ("READY=1", 5), "{kept:?}");
    let Door::Tls(tls, _) = &cluster.tls else { unreachable!() };
    for address in [cluster.admin, cluster.call_home, *tls] {
        TcpStream::connect(address).await.unwrap();
    }
    for name in ["connect.sock", "admin.sock"] {
        UnixStream::connect(cluster.path().join(name)).await.unwrap();
    }
    master.signal("TERM");
    assert_eq!(told(&socket).await, ("STOPPING=1".to_owned(), Vec::new()));
    assert_eq!(master.wait(PATIENCE).unwrap(), Some(0));

    let mut node = start("node-agent", &cluster.nodes[0].dir.join("node.yaml"));
    let (message, kept) = told(&socket).await;
    assert_eq!((message.as_str(), kept.len()), ("READY=1", 3), "{kept:?}");
    for address in [cluster.nodes[0].admin, local(cluster.nodes[0].port)] {
        TcpStream::connect(address).await.unwrap();
    }
    node.signal("TERM");
    assert_eq!(told(&socket).await, ("STOPPING=1".to_owned(), Vec::new()));
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
            "state_dir: home/lib/node-agent\nadmin: {{listen: '127.0.0.1:{node_admin}', socket: home/run/node-admin.sock}}\nlisten: '127.0.0.1:{node_port}'\n\
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
    for (socket, rights) in [("connect.sock", 0o660), ("admin.sock", 0o600), ("node-admin.sock", 0o600)] {
        let socket = home.join("run").join(socket);
        assert!(std::fs::metadata(&socket).unwrap().file_type().is_socket());
        assert_eq!(mode(&socket), rights, "{}", socket.display());
    }
    for mut process in [node, master] {
        process.signal("TERM");
        assert_eq!(process.wait(PATIENCE).unwrap(), Some(0));
    }
}
