//! Tunnels survive real outages of a node in a network namespace: links that fail, and a reboot.

use std::{net::SocketAddr, time::Instant};

use futures_util::future::join_all;
use tests::{
    cluster::{Cluster, Kind, Options, SOON, binary},
    netns::Namespace,
    process::{Process, eventually, free_port},
};

use super::chaos::{
    AGENTS, OpenStreams, back, callers_get_errors, door_streams, local, master_holds_no_stream,
};

/// A cluster of one node in a network namespace, with a target there.
struct Remote {
    // The processes end before the namespace that they are in.
    cluster: Cluster,
    target: Process,
    namespace: Namespace,
    port: u16,
}

impl Remote {
    async fn start(kind: Kind) -> Self {
        let namespace = Namespace::new().unwrap();
        let (port, node_port) = (free_port(), free_port());
        let options = Options {
            nodes: vec![("n1".to_owned(), kind)],
            ports: vec![port],
            node_ports: vec![node_port],
            dial: vec![("n1".to_owned(), SocketAddr::from((namespace.inside, node_port)))],
            nodes_down: true,
            ..Options::default()
        };
        let mut cluster = Cluster::start(options).await.unwrap();
        // The support makes clusters on loopback; this one's link leaves it.
        let node = cluster.nodes[0].dir.join("node.yaml");
        replace(
            &node,
            &format!("listen: '127.0.0.1:{node_port}'"),
            &format!("listen: '0.0.0.0:{node_port}'"),
        );
        let home = SocketAddr::from((namespace.outside, cluster.call_home.port()));
        replace(&node, &format!("call_home: ['{}']", cluster.call_home), &format!("call_home: ['{home}']"));
        let master = cluster.path().join("master.yaml");
        replace(
            &master,
            &format!("call_home: {{listen: '{}'}}", cluster.call_home),
            &format!("call_home: {{listen: '{home}'}}"),
        );
        cluster.restart_master().unwrap();
        let target = start_remote_target(&namespace, &cluster, port);
        let mut remote = Self { cluster, target, namespace, port };
        remote.start_node();
        remote.cluster.wait_connected().await;
        remote
    }

    fn start_node(&mut self) {
        let node = &mut self.cluster.nodes[0];
        let mut command = self.namespace.command(binary("node-agent"));
        command.arg("--config").arg(node.dir.join("node.yaml")).arg("run").current_dir(&node.dir);
        node.process = Some(Process::start("n1", &mut command, &node.dir.join("log")).unwrap());
    }

    fn node(&self) -> &Process {
        self.cluster.nodes[0].process.as_ref().unwrap()
    }

    fn target_name(&self) -> String {
        format!("n1:{}", self.port)
    }

    /// Cuts the link by `cut` under open streams, and mends it by `mend`.
    async fn outage(&self, cut: impl Fn(&Namespace), mend: impl Fn(&Namespace)) {
        let target = self.target_name();
        back(&self.cluster, "n1", &target, Instant::now()).await;
        let quiet = eventually("no stream is left", SOON, async || {
            (door_streams(&self.cluster).await == 0.0).then(|| self.node().usage().descriptors)
        })
        .await;
        let streams = OpenStreams::open(&self.cluster, &target).await;
        cut(&self.namespace);
        let since = Instant::now();
        callers_get_errors(&self.cluster, "n1", &target, since).await;
        streams.end(since).await;
        master_holds_no_stream(&self.cluster).await;
        // The node's own endpoints are on its loopback, out of reach here: its sockets tell.
        eventually("the node has closed the streams' sockets", SOON, async || {
            (self.node().usage().descriptors <= quiet).then_some(())
        })
        .await;
        println!("  the node had closed its sockets after {:.1?}", since.elapsed());
        let since = Instant::now();
        mend(&self.namespace);
        back(&self.cluster, "n1", &target, since).await;
    }
}

fn start_remote_target(namespace: &Namespace, cluster: &Cluster, port: u16) -> Process {
    let mut command = namespace.command(env!("CARGO_BIN_EXE_target"));
    command.arg(local(port).to_string());
    Process::start("target", &mut command, &cluster.path().join("target.log")).unwrap()
}

fn replace(file: &std::path::Path, from: &str, to: &str) {
    let text = std::fs::read_to_string(file).unwrap();
    std::fs::write(file, text.replace(from, to)).unwrap();
}

async fn link_drops_packets(kind: Kind) {
    println!("{kind:?}");
    let remote = Remote::start(kind).await;
    remote.outage(|n| n.drop_packets().unwrap(), |n| n.pass_packets().unwrap()).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn a_real_link_that_drops_packets_is_noticed_and_comes_back() {
    join_all(AGENTS.map(link_drops_packets)).await;
}

async fn link_goes_down(kind: Kind) {
    println!("{kind:?}");
    let remote = Remote::start(kind).await;
    remote.outage(|n| n.set_link(false).unwrap(), |n| n.set_link(true).unwrap()).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn a_real_link_that_goes_down_is_noticed_and_comes_back() {
    join_all(AGENTS.map(link_goes_down)).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn a_node_that_reboots_comes_back() {
    for kind in AGENTS {
        println!("{kind:?}");
        let mut remote = Remote::start(kind).await;
        let target = remote.target_name();
        let streams = OpenStreams::open(&remote.cluster, &target).await;
        let began = Instant::now();
        remote.namespace.set_link(false).unwrap();
        remote.cluster.nodes[0].process.as_mut().unwrap().kill();
        remote.target.kill();
        remote.namespace.recreate().unwrap();
        remote.target = start_remote_target(&remote.namespace, &remote.cluster, remote.port);
        let established = async |cluster: &Cluster| {
            cluster.metric(cluster.admin, "master_agent_tunnels_established_total").await.ok()
        };
        let tunnels = established(&remote.cluster).await.unwrap();
        let since = Instant::now();
        remote.start_node();
        // The master may still believe in the old tunnel, to which the rebooted node owes nothing.
        eventually("a new tunnel", SOON, async || {
            (established(&remote.cluster).await? > tunnels).then_some(())
        })
        .await;
        println!("  a new tunnel after {:.1?}", since.elapsed());
        streams.end(began).await;
        back(&remote.cluster, "n1", &target, since).await;
        eventually("one tunnel is left", SOON, async || {
            let status = remote.cluster.node_status("n1").ok()?;
            (status["tunnels"].as_array()?.len() == 1).then_some(())
        })
        .await;
    }
}
