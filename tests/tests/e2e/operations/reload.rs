//! A running agent hands over to its next process, and nobody notices.

use std::{
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    time::{Duration, Instant},
};

use tests::{
    client::{Door, echo, still_echoes},
    cluster::{Cluster, Kind, Options, SOON},
    load::get,
    process::eventually,
    target,
};
use tokio::{
    sync::Mutex,
    task::JoinHandle,
    time::{MissedTickBehavior, interval, timeout},
};
use tokio_util::sync::CancellationToken;

use super::operate::nodes;

const ALL: [(&str, Kind); 4] =
    [("n1", Kind::Dialled), ("n2", Kind::CallHome), ("n3", Kind::CallHomeHttps), ("n4", Kind::Sshd)];
/// The time between two dials.
const PAUSE: Duration = Duration::from_millis(20);
/// Far longer than a dial takes on a busy machine.
const HANGS: Duration = Duration::from_secs(30);

/// Dials one target after the other, 50 a second, each with a request.
struct Dialler {
    dialling: JoinHandle<()>,
    count: Arc<AtomicUsize>,
    failed: Arc<Mutex<Vec<String>>>,
    stop: CancellationToken,
}

impl Dialler {
    fn start(doors: Vec<Door>, targets: Vec<String>) -> Self {
        let (failed, stop) = (Arc::<Mutex<Vec<String>>>::default(), CancellationToken::new());
        let count = Arc::<AtomicUsize>::default();
        let dialling = tokio::spawn({
            let (failed, stop, counted) = (failed.clone(), stop.clone(), count.clone());
            async move {
                let mut ticks = interval(PAUSE);
                ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
                let mut dials = tokio::task::JoinSet::new();
                while stop.run_until_cancelled(ticks.tick()).await.is_some() {
                    let count = counted.fetch_add(1, Ordering::Relaxed);
                    let door = doors[count % doors.len()].clone();
                    let target = targets[count / doors.len() % targets.len()].clone();
                    let failed = failed.clone();
                    dials.spawn(async move {
                        let began = Instant::now();
                        let dialled = timeout(HANGS, dial(&door, &target)).await;
                        let dialled = dialled.unwrap_or_else(|_| Err("no answer".to_owned()));
                        if let Err(error) = dialled {
                            let after = began.elapsed();
                            let text = format!("{target} by {} after {after:?}: {error}", door.name());
                            failed.lock().await.push(text);
                        }
                    });
                }
                dials.join_all().await;
            }
        });
        Self { dialling, count, failed, stop }
    }

    /// Goes on until there have been as many dials, and shows that none has failed.
    async fn finish(self, least: usize) {
        let count = || self.count.load(Ordering::Relaxed);
        eventually("there are enough dials", HANGS, async || (count() >= least).then_some(())).await;
        self.stop.cancel();
        self.dialling.await.unwrap();
        let failed = self.failed.lock().await;
        assert!(
            failed.is_empty(),
            "{} of {} dials failed: {failed:#?}",
            failed.len(),
            self.count.load(Ordering::Relaxed)
        );
    }
}

async fn dial(door: &Door, target: &str) -> Result<(), String> {
    let connected = door.connect(target).await.map_err(|error| format!("{error:#}"))?;
    let mut stream = connected.map_err(|refused| format!("{}: {}", refused.status, refused.reason))?;
    get(&mut stream).await.map_err(|error| error.to_string())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_master_reloads_again_and_again_and_no_dial_fails_and_no_stream_is_cut() {
    const TIMES: usize = 5;
    let port = target::start().await;
    let options = Options { nodes: nodes(&ALL), ports: vec![port], ..Options::default() };
    let mut cluster = Cluster::start(options).await.unwrap();
    let targets: Vec<_> = ALL.iter().map(|(node, _)| format!("{node}:{port}")).collect();
    let mut held = Vec::new();
    let dialler = Dialler::start(cluster.doors().to_vec(), targets.clone());
    for _ in 0..TIMES {
        for (door, target) in cluster.doors().iter().flat_map(|door| targets.iter().map(move |t| (door, t))) {
            held.push(echo(door, target).await);
        }
        cluster.reload_master().unwrap_or_else(|e| panic!("{e:#}\n{}", cluster.master.log_text()));
        for stream in &mut held {
            still_echoes(stream).await;
        }
    }
    dialler.finish(TIMES * 10).await;
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
    let dialler = Dialler::start(cluster.doors().to_vec(), targets);
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
    dialler.finish(10).await;
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
    let dialler = Dialler::start(cluster.doors().to_vec(), targets.clone());
    for _ in 0..TIMES {
        for index in 0..kinds.len() {
            held.push(echo(&cluster.unix, &targets[index]).await);
            let reloaded = cluster.reload_node(index);
            former.push(reloaded.unwrap_or_else(|e| {
                panic!("{e:#}\n{}", cluster.nodes[index].process.as_ref().unwrap().log_text())
            }));
            for stream in &mut held {
                still_echoes(stream).await;
            }
        }
    }
    dialler.finish(TIMES * 10).await;
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
