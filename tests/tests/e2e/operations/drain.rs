//! Nodes that are taken out of use: other nodes carry what they can, and what is left has until the deadline.

use std::net::SocketAddr;

use tests::{
    client::{Door, Stream, echo, still_echoes},
    cluster::{Cluster, Kind, Options, SOON},
    load::completes,
    process::eventually,
    repeated::Repeated,
    target,
};
use tokio::{io::AsyncReadExt, task::block_in_place};

use super::operate::nodes;

/// A cluster of two nodes, the target that both of them carry, and one of each node alone.
struct World {
    cluster: Cluster,
    any: String,
    own: [String; 2],
}

impl World {
    async fn start() -> Self {
        let port = target::start().await;
        let options = Options {
            nodes: nodes(&[("n1", Kind::Dialled), ("n2", Kind::CallHome)]),
            ports: vec![port],
            targets: vec![SocketAddr::from(([127, 9, 0, 1], port))],
            ..Options::default()
        };
        let cluster = Cluster::start(options).await.unwrap();
        let inventory = cluster.path().join("inventory.yaml");
        let text = std::fs::read_to_string(&inventory).unwrap();
        std::fs::write(&inventory, format!("{text}service_cidrs: [127.9.0.0/16]\n")).unwrap();
        let world = Self {
            cluster,
            any: format!("127.9.0.1:{port}"),
            own: ["n1", "n2"].map(|n| format!("{n}:{port}")),
        };
        eventually("any node carries it", SOON, async || world.door().stream(&world.any).await.ok()).await;
        world
    }

    fn door(&self) -> &Door {
        &self.cluster.unix
    }

    /// Dials what works whether or not n1 is drained.
    fn dials(&self) -> Repeated {
        Repeated::dials(self.cluster.doors().to_vec(), vec![self.any.clone(), self.own[1].clone()])
    }

    /// Runs a command of the master to its end, which may take a while.
    fn command(&self, args: &[&str]) -> String {
        block_in_place(|| self.cluster.command(args)).unwrap()
    }

    fn drain(&self, deadline: &str, more: &[&str]) -> String {
        self.command(&[&["node", "drain", "n1", "--deadline", deadline], more].concat())
    }

    fn on_node(&self, args: &[&str]) -> String {
        block_in_place(|| self.cluster.on_node(0, args)).unwrap()
    }

    /// The number of streams that a node has carried.
    fn carried(&self, node: &str) -> u64 {
        self.cluster.node_status(node).unwrap()["totals"]["streams"].as_u64().unwrap()
    }

    /// Shows that n1 gets nothing that n2 can carry, and what it alone can.
    async fn is_the_last_choice(&self) {
        self.cluster.wait_state("n1", "draining").await;
        let before = self.carried("n1");
        for _ in 0..20 {
            for door in self.cluster.doors() {
                drop(echo(&door, &self.any).await);
            }
        }
        assert_eq!(self.carried("n1"), before);
        drop(echo(self.door(), &self.own[0]).await);
        let explained = self.command(&["explain", &self.own[0]]);
        assert!(explained.contains("draining") && explained.contains("the node allows it"), "{explained}");
        let draining = self.cluster.metric(self.cluster.admin, "master_agent_nodes_draining").await.unwrap();
        assert_eq!(draining as usize, 1);
    }

    /// Shows that n1 gets nothing, and that the text says how to undo that.
    async fn is_drained(&self, undo: &str) {
        self.cluster.wait_state("n1", "drained").await;
        for door in self.cluster.doors() {
            let refused = door.connect(&self.own[0]).await.unwrap().err().expect("a refusal");
            assert!(refused.status == 503 && refused.reason.contains(undo), "{refused:?}");
            drop(echo(&door, &self.any).await);
        }
        let explained = self.cluster.output(&["explain", &self.own[0]]).unwrap();
        let text = String::from_utf8_lossy(&explained.stdout);
        assert!(explained.status.code() == Some(1) && text.contains(undo), "{text}");
    }

    /// Shows that n1 is used as any other node.
    async fn is_in_use(&self) {
        self.cluster.wait_state("n1", "connected").await;
        drop(echo(self.door(), &self.own[0]).await);
        let before = self.carried("n1");
        eventually("n1 carries what any node can", SOON, async || {
            drop(echo(self.door(), &self.any).await);
            (self.carried("n1") > before).then_some(())
        })
        .await;
    }
}

/// Waits until a stream is cut.
async fn ended(mut stream: Stream) {
    let mut rest = [0; 64];
    let end = async { while stream.read(&mut rest).await.is_ok_and(|count| count > 0) {} };
    completes("the end of a stream", end).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_drained_node_gives_its_streams_to_others_and_loses_the_rest_at_the_deadline() {
    let world = World::start().await;
    let mut held = echo(world.door(), &world.own[0]).await;
    let dials = world.dials();
    let said = world.drain("1h", &["--no-wait"]);
    let undo = "`master-agent node undrain n1`";
    assert!(said.contains(undo) && said.contains(&world.own[0]) && said.contains("connect-unix"), "{said}");
    let status = world.cluster.node_status("n1").unwrap();
    assert_eq!(
        (status["state"].as_str(), status["drain"]["by"].as_str()),
        (Some("draining"), Some("master"))
    );
    assert!(status["drain"]["until_unix_milliseconds"].is_u64(), "{status}");
    world.is_the_last_choice().await;
    still_echoes(&mut held).await;
    // A second drain has another deadline, and this one waits for it.
    let said = world.drain("1s", &[]);
    assert!(said.contains("cut at the deadline: 1 stream\n"), "{said}");
    ended(held).await;
    world.is_drained(undo).await;
    // Nothing is left to wait for.
    assert!(world.drain("1h", &[]).contains("node n1 has no streams left"));
    dials.finish(50).await;
    assert!(world.command(&["node", "undrain", "n1"]).contains("no longer drained"));
    world.is_in_use().await;
    for args in [["node", "undrain", "n1"], ["node", "undrain", "n9"], ["node", "drain", "n9"]] {
        let output = world.cluster.output(&args).unwrap();
        let said = String::from_utf8_lossy(&output.stderr);
        let why = if args[1] == "drain" { "is not known" } else { "is not drained" };
        assert!(output.status.code() == Some(1) && said.contains(why), "{args:?}: {said}");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_drain_outlives_the_process_and_holds_for_the_former_one() {
    let mut world = World::start().await;
    let mut held = echo(world.door(), &world.own[0]).await;
    world.drain("1h", &["--no-wait"]);
    let until = world.cluster.node_status("n1").unwrap()["drain"]["until_unix_milliseconds"].clone();
    world.cluster.reload_master().unwrap();
    world.is_the_last_choice().await;
    assert_eq!(world.cluster.node_status("n1").unwrap()["drain"]["until_unix_milliseconds"], until);
    still_echoes(&mut held).await;
    // The stream is the former process's.
    world.drain("1s", &["--no-wait"]);
    ended(held).await;
    world.cluster.former_masters[0].wait(SOON).unwrap();
    world.is_drained("`master-agent node undrain n1`").await;
    world.cluster.restart_master().unwrap();
    eventually("the master runs again", SOON, async || world.cluster.command(&["node", "list"]).ok()).await;
    world.cluster.wait_state("n2", "connected").await;
    world.is_drained("`master-agent node undrain n1`").await;
    world.command(&["node", "undrain", "n1"]);
    world.is_in_use().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_node_drains_itself_whichever_process_of_either_agent_serves() {
    let mut world = World::start().await;
    let dials = world.dials();
    let said = world.on_node(&["drain", "--deadline", "1h", "--no-wait"]);
    let undo = "`node-agent undrain`";
    assert!(said.contains(undo), "{said}");
    world.is_the_last_choice().await;
    assert_eq!(world.cluster.node_status("n1").unwrap()["drain"]["by"], "node");
    drop(world.cluster.reload_node(0).unwrap());
    world.is_the_last_choice().await;
    world.cluster.reload_master().unwrap();
    world.is_the_last_choice().await;
    let output = world.cluster.output(&["node", "undrain", "n1"]).unwrap();
    assert!(String::from_utf8_lossy(&output.stderr).contains(undo) && !output.status.success());
    let held = echo(world.door(), &world.own[0]).await;
    let said = world.on_node(&["drain", "--deadline", "1s"]);
    assert!(said.contains("cut at the deadline: 1 stream\n"), "{said}");
    ended(held).await;
    world.is_drained(undo).await;
    dials.finish(50).await;
    world.cluster.kill_node(0);
    eventually("n1 has no tunnel", SOON, async || {
        let status = world.cluster.node_status("n1").ok()?;
        status["tunnels"].as_array()?.is_empty().then_some(())
    })
    .await;
    world.cluster.start_node(0).unwrap();
    world.is_drained(undo).await;
    assert!(world.on_node(&["undrain"]).contains("no longer drained"));
    world.is_in_use().await;
    assert!(world.cluster.on_node(0, &["undrain"]).unwrap_err().to_string().contains("is not drained"));
}
