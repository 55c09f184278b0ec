//! The master's state: backups, and what happens when the state can't be read or written.

use std::{
    path::{Path, PathBuf},
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
};

use proto_config::secret_file;
use tests::{
    client::{echo, still_echoes},
    cluster::{Cluster, Kind, Options},
    disk::Disk,
    process::{TempDir, free_port},
    target,
};

use super::{
    commands::{Ran, ran},
    operate::{PATIENCE, nodes},
};

const KINDS: [(&str, Kind); 2] = [("n1", Kind::Dialled), ("n2", Kind::CallHome)];

/// A cluster of both kinds of node-agent, and the port that may be reached through them.
async fn cluster() -> (Cluster, u16) {
    let port = target::start().await;
    let options = Options { nodes: nodes(&KINDS), ports: vec![port], ..Options::default() };
    (Cluster::start(options).await.unwrap(), port)
}

async fn both_nodes_carry(cluster: &Cluster, port: u16) {
    for door in cluster.doors() {
        for (node, _) in KINDS {
            echo(&door, &format!("{node}:{port}")).await;
        }
    }
}

/// Makes a token for the first node of the cluster in `directory`; gives the line with which the node joins.
fn token(directory: &Path) -> Ran {
    ran("master-agent", Some(&directory.join("master.yaml")), &["token", "create", "--node", "n1"])
}

/// Has the first node join again, which keeps its key, while its agent runs.
fn join(directory: &Path, line: &str) -> Ran {
    let words: Vec<&str> = line.split_whitespace().skip(1).collect();
    ran("node-agent", Some(&directory.join("n1/node.yaml")), &words)
}

/// Runs `backup FILE` or `restore FILE` with a configuration.
fn with_file(config: &Path, command: &str, file: &Path) -> Ran {
    ran("master-agent", Some(config), &[command, file.to_str().unwrap()])
}

fn stop(cluster: &mut Cluster) {
    cluster.master.signal("TERM");
    // Nobody knows how a process ends that a reload has started.
    assert!(matches!(cluster.master.wait(PATIENCE).unwrap(), Some(0) | None));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn after_a_restore_of_a_backup_under_load_nodes_link_without_joining_anew() {
    let (mut cluster, port) = cluster().await;
    let path = cluster.path().to_owned();
    let config = path.join("master.yaml");
    let done = Arc::new(AtomicBool::new(false));
    let joins = tokio::task::spawn_blocking({
        let (path, done) = (path.clone(), done.clone());
        move || {
            let mut joins = 0;
            while !done.load(Ordering::Relaxed) {
                join(&path, &token(&path).succeeded()).succeeded();
                joins += 1;
            }
            joins
        }
    });
    let backups: Vec<PathBuf> = (0..5).map(|number| path.join(format!("backup-{number}"))).collect();
    for backup in &backups {
        both_nodes_carry(&cluster, port).await;
        with_file(&config, "backup", backup).succeeded();
    }
    done.store(true, Ordering::Relaxed);
    assert!(joins.await.unwrap() > 0);
    for (number, backup) in backups.iter().enumerate() {
        let elsewhere = path.join(format!("elsewhere-{number}.yaml"));
        std::fs::write(&elsewhere, format!("state_dir: elsewhere-{number}\nadmin: {{socket: none.sock}}\n"))
            .unwrap();
        with_file(&elsewhere, "restore", backup).succeeded();
        ran("master-agent", Some(&elsewhere), &["token", "list"]).succeeded();
    }

    with_file(&config, "restore", &backups[2]).failed(1, &["the agent runs"]);
    stop(&mut cluster);
    with_file(&config, "restore", &backups[2]).failed(1, &["has a state already", "move the directory away"]);
    std::fs::rename(path.join("master"), path.join("lost")).unwrap();
    with_file(&config, "restore", &backups[2]).succeeded();
    cluster.restart_master().unwrap();
    cluster.wait_connected().await;
    both_nodes_carry(&cluster, port).await;
    for node in &mut cluster.nodes {
        assert!(node.process.as_mut().unwrap().is_running(), "{} was not started again", node.name);
    }
}

#[test]
fn a_state_that_is_damaged_or_incomplete_is_an_error_with_the_ways_out() {
    let dir = TempDir::new("damaged").unwrap();
    let (config, state) = (dir.path().join("master.yaml"), dir.path().join("state"));
    let (admin, call_home) = (free_port(), free_port());
    std::fs::write(
        &config,
        format!(
            "state_dir: state\nadmin: {{listen: '127.0.0.1:{admin}', socket: admin.sock}}\n\
             call_home: {{listen: '127.0.0.1:{call_home}'}}\n"
        ),
    )
    .unwrap();
    let run = |args: &[&str]| ran("master-agent", Some(&config), args);
    let backup = dir.path().join("backup");
    run(&["token", "create"]).succeeded();
    with_file(&config, "backup", &backup).succeeded();
    let ids = run(&["token", "list"]).succeeded();
    let refused = |parts: &[&str]| {
        for args in [&["run"][..], &["token", "create"], &["backup", "other-backup"]] {
            run(args).failed(1, parts);
        }
    };
    for name in ["host_ca", "user_ca", "state.sqlite"] {
        let bytes = std::fs::read(state.join(name)).unwrap();
        std::fs::remove_file(state.join(name)).unwrap();
        refused(&[&format!("lacks {name}"), "Move the directory away", "master-agent restore FILE"]);
        assert!(!state.join(name).exists());
        secret_file::write_new(&state.join(name), &bytes).unwrap();
    }
    let keys = std::fs::read(state.join("user_ca")).unwrap();
    let nonsense = b"nonsense".repeat(10_000);
    std::fs::write(state.join("state.sqlite"), &nonsense).unwrap();
    refused(&["file is not a database", "changed nothing", "master-agent restore FILE"]);
    assert_eq!(std::fs::read(state.join("state.sqlite")).unwrap(), nonsense);

    // The first way out.
    std::fs::rename(&state, dir.path().join("away")).unwrap();
    let said = with_file(&config, "restore", &backup).succeeded();
    assert!(said.starts_with("restored ") && said.contains(backup.to_str().unwrap()), "{said}");
    assert_eq!(std::fs::read(state.join("user_ca")).unwrap(), keys);
    assert_eq!(run(&["token", "list"]).succeeded(), ids);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_full_or_read_only_disk_fails_joins_with_the_cause_and_ends_no_tunnel() {
    let (mut cluster, port) = cluster().await;
    let path = cluster.path().to_owned();
    let (config, state) = (path.join("master.yaml"), path.join("master"));
    with_file(&config, "backup", &path.join("backup")).succeeded();
    stop(&mut cluster);
    std::fs::rename(&state, path.join("former")).unwrap();
    let disk = Disk::mount(&state, "1m").unwrap();
    with_file(&config, "restore", &path.join("backup")).succeeded();
    cluster.restart_master().unwrap();
    cluster.wait_connected().await;

    let mut streams = Vec::new();
    for (node, _) in KINDS {
        streams.push(echo(&cluster.unix, &format!("{node}:{port}")).await);
    }
    let line = token(&path).succeeded();
    let filler = disk.fill().unwrap();
    token(&path).failed(1, &["disk is full"]);
    let refused = join(&path, &line);
    assert_ne!(refused.code, Some(0));
    for part in ["disk is full", "not used up"] {
        assert!(refused.err.contains(part), "no {part:?} in {}", refused.err);
    }
    for stream in &mut streams {
        still_echoes(stream).await;
    }
    both_nodes_carry(&cluster, port).await;
    // A reload succeeds without writing, or changes nothing.
    let reloaded = cluster.reload_master();
    println!("a reload with a full disk: {reloaded:?}");
    for stream in &mut streams {
        still_echoes(stream).await;
    }
    both_nodes_carry(&cluster, port).await;
    std::fs::remove_file(filler).unwrap();
    join(&path, &line).succeeded();
    // A backup is made of a sound database only.
    with_file(&config, "backup", &path.join("later")).succeeded();

    drop(streams);
    stop(&mut cluster);
    disk.remount("ro").unwrap();
    ran("master-agent", Some(&config), &["run"]).failed(1, &["state.sqlite", "read-only"]);
    disk.remount("rw").unwrap();
    cluster.restart_master().unwrap();
    cluster.wait_connected().await;
    both_nodes_carry(&cluster, port).await;
}
