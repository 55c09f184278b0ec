//! A running agent hands over to its next process, and nobody notices.

use std::{
    os::unix::fs::PermissionsExt,
    path::{Path, PathBuf},
    process::Command,
    time::Duration,
};

use tests::{
    client::{echo, still_echoes},
    cluster::{Cluster, Kind, Options, SOON, binary},
    process::{Process, TempDir, eventually},
    repeated::Repeated,
    target,
};

use super::operate::nodes;

const ALL: [(&str, Kind); 4] =
    [("n1", Kind::Dialled), ("n2", Kind::CallHome), ("n3", Kind::CallHomeHttps), ("n4", Kind::Sshd)];
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_master_reloads_again_and_again_and_no_dial_fails_and_no_stream_is_cut() {
    const TIMES: usize = 5;
    let port = target::start().await;
    let options = Options { nodes: nodes(&ALL), ports: vec![port], ..Options::default() };
    let mut cluster = Cluster::start(options).await.unwrap();
    let targets: Vec<_> = ALL.iter().map(|(node, _)| format!("{node}:{port}")).collect();
    let mut held = Vec::new();
    let dials = Repeated::dials(cluster.doors().to_vec(), targets.clone());
    for _ in 0..TIMES {
        for (door, target) in cluster.doors().iter().flat_map(|door| targets.iter().map(move |t| (door, t))) {
            held.push(echo(door, target).await);
        }
        cluster.reload_master().unwrap_or_else(|e| panic!("{e:#}\n{}", cluster.master.log_text()));
        for stream in &mut held {
            still_echoes(stream).await;
        }
    }
    dials.finish(TIMES * 10).await;
    // Each process is there as long as it has streams, and the one that serves shows them.
    assert!(cluster.former_masters.iter_mut().all(|process| process.is_running()));
    let draining = cluster.metric(cluster.admin, "master_agent_draining_processes").await.unwrap();
    assert_eq!(draining as usize, TIMES);
    drop(held);
    for process in &mut cluster.former_masters {
        process.wait(SOON).unwrap();
    }
    eventually("nothing drains", SOON, async || {
        let draining = cluster.metric(cluster.admin, "master_agent_draining_processes").await.ok()?;
        (draining == 0.0).then_some(())
    })
    .await;
    for (door, target) in cluster.doors().iter().flat_map(|door| targets.iter().map(move |t| (door, t))) {
        echo(door, target).await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_configuration_or_a_program_that_can_not_serve_changes_nothing() {
    let port = target::start().await;
    let kinds = [("n1", Kind::Dialled), ("n2", Kind::CallHome)];
    let options = Options { nodes: nodes(&kinds), ports: vec![port], ..Options::default() };
    let mut cluster = Cluster::start(options).await.unwrap();
    let targets: Vec<_> = kinds.iter().map(|(node, _)| format!("{node}:{port}")).collect();
    let mut stream = echo(&cluster.unix, &targets[0]).await;
    let dials = Repeated::dials(cluster.doors().to_vec(), targets);
    let (path, pid) = (cluster.path().join("master.yaml"), cluster.master.pid());
    let good = std::fs::read_to_string(&path).unwrap();
    for (change, why) in [
        ("no_such_field: 1\n", "no_such_field"),
        ("front_end: {listen: '127.0.0.1:0'}\n", "front_end"),
        ("socks5: {unix: {path: /proc/nowhere/socks5.sock}}\n", "/proc/nowhere"),
    ] {
        std::fs::write(&path, format!("{good}{change}")).unwrap();
        let output = cluster.output(&["reload"]);
        // The command itself reads the file, too.
        let output = output.unwrap();
        let said = String::from_utf8_lossy(&output.stderr);
        assert!(!output.status.success() && said.contains(why), "{change}: {said}");
    }
    std::fs::write(&path, &good).unwrap();
    still_echoes(&mut stream).await;
    dials.finish(10).await;
    assert_eq!(cluster.master.pid(), pid);
    assert!(cluster.master.is_running());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_process_that_is_told_to_stop_tells_the_former_ones_and_one_that_crashes_does_not() {
    let port = target::start().await;
    let kinds = [("n1", Kind::Dialled), ("n2", Kind::CallHome)];
    let master_config = "shutdown_grace: 2s".to_owned();
    let options = Options { nodes: nodes(&kinds), ports: vec![port], master_config, ..Options::default() };
    let mut cluster = Cluster::start(options).await.unwrap();
    let target = format!("n1:{port}");
    let mut stream = echo(&cluster.unix, &target).await;
    cluster.reload_master().unwrap();
    cluster.reload_master().unwrap();
    // The former process of one that ends at once ends as well.
    tokio::time::sleep(Duration::from_secs(2)).await;
    cluster.master.kill();
    // Whoever supervises the agent has to start it again. The former processes go on, and keep nobody waiting.
    for door in cluster.doors() {
        eventually("connections are refused", SOON, async || door.connect(&target).await.err()).await;
    }
    tokio::time::sleep(Duration::from_secs(3)).await;
    still_echoes(&mut stream).await;

    eventually("the former processes have closed their sockets", SOON, async || {
        tokio::net::TcpStream::connect(cluster.admin).await.is_err().then_some(())
    })
    .await;
    cluster.restart_master().unwrap();
    for (node, _) in kinds {
        cluster.wait_state(node, "connected").await;
    }
    let mut other = echo(&cluster.unix, &target).await;
    cluster.reload_master().unwrap();
    cluster.reload_master().unwrap();
    still_echoes(&mut other).await;
    cluster.master.signal("TERM");
    cluster.master.wait(SOON).unwrap();
    let mut former = cluster.former_masters.split_off(2);
    for process in &mut former {
        process.wait(SOON).unwrap();
    }
    still_echoes(&mut stream).await;
    drop(stream);
    cluster.former_masters[0].wait(SOON).unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn nodes_reload_again_and_again_and_no_dial_fails_and_no_stream_is_cut() {
    const TIMES: usize = 4;
    let port = target::start().await;
    let kinds = [("n1", Kind::Dialled), ("n2", Kind::CallHome), ("n3", Kind::CallHomeHttps)];
    let options = Options { nodes: nodes(&kinds), ports: vec![port], ..Options::default() };
    let mut cluster = Cluster::start(options).await.unwrap();
    let targets: Vec<_> = kinds.iter().map(|(node, _)| format!("{node}:{port}")).collect();
    let (mut held, mut former) = (Vec::new(), Vec::new());
    let dials = Repeated::dials(cluster.doors().to_vec(), targets.clone());
    for _ in 0..TIMES {
        for (index, target) in targets.iter().enumerate() {
            held.push(echo(&cluster.unix, target).await);
            let reloaded = cluster.reload_node(index);
            former.push(reloaded.unwrap_or_else(|e| {
                panic!("{e:#}\n{}", cluster.nodes[index].process.as_ref().unwrap().log_text())
            }));
            for stream in &mut held {
                still_echoes(stream).await;
            }
        }
    }
    dials.finish(TIMES * 10).await;
    assert!(former.iter_mut().all(|process| process.is_running()));
    for node in &cluster.nodes {
        let draining = cluster.metric(node.admin, "node_agent_draining_processes").await.unwrap();
        assert_eq!(draining as usize, TIMES, "{}", node.name);
    }
    drop(held);
    for process in &mut former {
        process.wait(SOON).unwrap();
    }
    for (index, target) in targets.iter().enumerate() {
        let node = &cluster.nodes[index];
        eventually("nothing drains, and one link is left", SOON, async || {
            let draining = cluster.metric(node.admin, "node_agent_draining_processes").await.ok()?;
            let tunnels = cluster.node_status(&node.name).ok()?["tunnels"].as_array()?.len();
            (draining == 0.0 && tunnels == 1).then_some(())
        })
        .await;
        for door in cluster.doors() {
            echo(&door, target).await;
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_node_s_configuration_that_can_not_serve_changes_nothing() {
    let port = target::start().await;
    let options = Options { nodes: nodes(&[("n1", Kind::Dialled)]), ports: vec![port], ..Options::default() };
    let mut cluster = Cluster::start(options).await.unwrap();
    let target = format!("n1:{port}");
    let mut stream = echo(&cluster.unix, &target).await;
    let path = cluster.nodes[0].dir.join("node.yaml");
    let (good, pid) =
        (std::fs::read_to_string(&path).unwrap(), cluster.nodes[0].process.as_ref().unwrap().pid());
    for (change, why) in [
        ("no_such_field: 1\n", "no_such_field"),
        ("front_end: {unix: {path: /proc/nowhere/front-end.sock}}\n", "/proc/nowhere"),
    ] {
        std::fs::write(&path, format!("{good}{change}")).unwrap();
        let error = cluster.reload_node(0).map(drop).unwrap_err().to_string();
        assert!(error.contains(why), "{error}");
    }
    std::fs::write(&path, &good).unwrap();
    still_echoes(&mut stream).await;
    for door in cluster.doors() {
        echo(&door, &target).await;
    }
    assert_eq!(cluster.nodes[0].process.as_ref().unwrap().pid(), pid);
    drop(cluster.reload_node(0).unwrap());
    echo(&cluster.unix, &target).await;
}

/// The process that a line of a log names.
fn next_process(log: &str) -> Option<u32> {
    let line = log.lines().rfind(|line| line.contains("a new process serves"))?;
    line.split_once("pid=")?.1.split_whitespace().next()?.parse().ok()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn sighup_checks_the_whole_configuration_and_takes_a_changed_one_over() {
    let port = target::start().await;
    let options = Options { nodes: nodes(&[("n1", Kind::Dialled)]), ports: vec![port], ..Options::default() };
    let mut cluster = Cluster::start(options).await.unwrap();
    let target = format!("n1:{port}");
    let mut stream = echo(&cluster.unix, &target).await;
    let files = [cluster.path().join("master.yaml"), cluster.nodes[0].dir.join("node.yaml")];
    for (index, (file, change)) in
        files.iter().zip(["socks5: {unix: {path: socks5.sock}}", "drain_timeout: 10m"]).enumerate()
    {
        let node = cluster.nodes[0].process.take().unwrap();
        let process = if index == 0 { &cluster.master } else { &node };
        let good = std::fs::read_to_string(file).unwrap();
        process.signal("HUP");
        process.says(&["the configuration has not changed"]).await;
        std::fs::write(file, format!("{good}{change}\nno_such_field: 1\n")).unwrap();
        process.signal("HUP");
        let log = process.says(&["the configuration has mistakes; nothing changes"]).await;
        assert!(log.contains("no_such_field"), "{log}");
        std::fs::write(file, format!("{good}{change}\n")).unwrap();
        process.signal("HUP");
        let field = change.split(':').next().unwrap();
        process.says(&["the configuration has changed", &format!("changed=\"{field}\"")]).await;
        let next = process.adopt(next_process(&process.says(&["a new process serves"]).await).unwrap());
        still_echoes(&mut stream).await;
        if index == 0 {
            cluster.former_masters.push(std::mem::replace(&mut cluster.master, next));
            assert!(cluster.path().join("socks5.sock").exists());
            cluster.nodes[0].process = Some(node);
        } else {
            cluster.nodes[0].process = Some(next);
            echo(&cluster.unix, &target).await;
            drop(stream);
            return;
        }
    }
}

/// Each step of a handover, in its order (`tests/data/units/next_process.py`).
const STEPS: [&str; 5] = ["start", "begin", "load", "loaded", "link"];

/// Starts the agents from copies of their programs, which others may take the place of.
fn copy_of(agent: &str, directory: &Path) -> PathBuf {
    let program = directory.join(agent);
    std::fs::copy(binary(agent), &program).unwrap();
    program
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_next_process_that_is_killed_or_says_nonsense_at_any_step_changes_nothing() {
    let port = target::start().await;
    let kinds = [("n1", Kind::Dialled), ("n2", Kind::CallHome)];
    let options = Options { nodes: nodes(&kinds), ports: vec![port], ..Options::default() };
    let mut cluster = Cluster::start(options).await.unwrap();
    let dir = TempDir::new("steps").unwrap();
    let programs = ["master-agent", "node-agent"].map(|agent| copy_of(agent, dir.path()));
    cluster.master.kill();
    cluster.master = start(&programs[0], &cluster.path().join("master.yaml"));
    let node = &mut cluster.nodes[0];
    drop(node.process.take());
    node.process = Some(start(&programs[1], &node.dir.join("node.yaml")));
    cluster.wait_connected().await;

    let targets: Vec<_> = kinds.iter().map(|(node, _)| format!("{node}:{port}")).collect();
    let mut stream = echo(&cluster.unix, &targets[0]).await;
    let dials = Repeated::dials(cluster.doors().to_vec(), targets.clone());
    let stand_in = Path::new(env!("CARGO_MANIFEST_DIR")).join("data/units/next_process.py");
    for program in &programs {
        // A running program can't be written to, but another file may take its name.
        let other = dir.path().join("other");
        std::fs::copy(&stand_in, &other).unwrap();
        std::fs::set_permissions(&other, std::fs::Permissions::from_mode(0o755)).unwrap();
        std::fs::rename(&other, program).unwrap();
    }
    for step in STEPS {
        for how in ["killed", "nonsense"] {
            std::fs::write(dir.path().join("FAIL_AT"), format!("{step} {how}")).unwrap();
            let pids = [cluster.master.pid(), cluster.nodes[0].process.as_ref().unwrap().pid()];
            let errors = [cluster.next_master().unwrap_err(), cluster.next_node(0).unwrap_err()];
            for error in errors {
                let error = error.to_string();
                assert!(error.contains("the running process goes on"), "{step} {how}: {error}");
            }
            still_echoes(&mut stream).await;
            for target in &targets {
                echo(&cluster.tls, target).await;
            }
            assert_eq!(pids, [cluster.master.pid(), cluster.nodes[0].process.as_ref().unwrap().pid()]);
        }
    }
    // The right program is there again, and takes over.
    for (program, agent) in programs.iter().zip(["master-agent", "node-agent"]) {
        let other = copy_of(agent, &{
            let directory = dir.path().join("again");
            std::fs::create_dir_all(&directory).unwrap();
            directory
        });
        std::fs::rename(other, program).unwrap();
    }
    cluster.reload_master().unwrap();
    let _former = cluster.reload_node(0).unwrap();
    still_echoes(&mut stream).await;
    dials.finish(50).await;
}

fn start(program: &Path, config: &Path) -> Process {
    let mut command = Command::new(program);
    command.arg("--config").arg(config).arg("run").current_dir(config.parent().unwrap());
    let name = program.file_name().unwrap().to_string_lossy();
    Process::start(&name, &mut command, &config.with_extension("log")).unwrap()
}
