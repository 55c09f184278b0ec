//! Both agents under a real systemd: restarts refuse nobody, and reloads leave systemd in charge.

use std::{path::Path, process::Command, time::Duration};

use tests::{
    client::{Door, Stream, echo, still_echoes},
    cluster::{SOON, binary},
    pki::{Authority, client_config},
    process::{Process, TempDir, eventually, free_port},
    repeated::Repeated,
    systemd::Systemd,
    target,
};
use tokio::time::sleep;

const AGENTS: [&str; 2] = ["master-agent", "node-agent"];
/// Between two restarts, so that there are dials before and after each.
const PAUSE: Duration = Duration::from_millis(500);

/// How often each agent is restarted, and reloaded. TEST_RESTARTS asks for more.
fn times() -> usize {
    std::env::var("TEST_RESTARTS").ok().and_then(|v| v.parse().ok()).unwrap_or(4)
}

/// A master and the dialled node n1 under systemd, and the node n2 elsewhere, which calls home.
struct Site {
    systemd: Systemd,
    doors: Vec<Door>,
    targets: Vec<String>,
    _elsewhere: Process,
    _dir: TempDir,
}

impl Site {
    async fn start() -> Self {
        let (dir, port) = (TempDir::new("site").unwrap(), target::start().await);
        let path = dir.path();
        let pki = Authority::new("test CA").unwrap();
        std::fs::write(path.join("ca.crt"), pki.pem()).unwrap();
        pki.server(path, "server", &["localhost", "127.0.0.1"]).unwrap();
        pki.client(path, "kube-apiserver").unwrap();
        let [admin, tls, call_home, node, node_admin, other_admin] = std::array::from_fn(|_| free_port());
        let master = format!(
            "admin: {{listen: '127.0.0.1:{admin}'}}\ninventory: inventory.yaml\nhttp_connect:\n  \
             unix: {{path: /run/master-agent-egress/connect.sock}}\n  \
             tls: {{listen: '127.0.0.1:{tls}', cert: server.crt, key: server.key, client_ca: ca.crt}}\n\
             call_home: {{listen: '127.0.0.1:{call_home}'}}\nshutdown_grace: 1s\n"
        );
        let inventory = format!(
            "nodes:\n- {{name: n1, dial: '127.0.0.1:{node}', addresses: [127.0.0.1]}}\n- {{name: n2}}\n"
        );
        let policy = format!(
            "addresses: [127.0.0.1]\npolicy: {{allow: [{{name: target, to: 127.0.0.1, ports: '{port}'}}]}}\n\
             shutdown_grace: 1s\n"
        );
        let dialled =
            format!("admin: {{listen: '127.0.0.1:{node_admin}'}}\nlisten: '127.0.0.1:{node}'\n{policy}");
        let calls = format!(
            "state_dir: state\nadmin: {{listen: '127.0.0.1:{other_admin}', socket: admin.sock}}\n\
             call_home: ['127.0.0.1:{call_home}']\n{policy}"
        );
        let texts = [
            ("master.yaml", master),
            ("inventory.yaml", inventory),
            ("n1.yaml", dialled),
            ("n2.yaml", calls),
        ];
        for (name, text) in &texts {
            std::fs::write(path.join(name), text).unwrap();
        }
        let files = [
            ("master.yaml", "/etc/master-agent/master-agent.yaml"),
            ("inventory.yaml", "/etc/master-agent/inventory.yaml"),
            ("server.crt", "/etc/master-agent/server.crt"),
            ("server.key", "/etc/master-agent/server.key"),
            ("ca.crt", "/etc/master-agent/ca.crt"),
            ("n1.yaml", "/etc/node-agent/node-agent.yaml"),
        ];
        let files = files.map(|(name, to)| (path.join(name), to));
        let systemd = Systemd::start(&files).unwrap();
        systemd.systemctl("start", "master-agent").unwrap();

        let join = |node: &str| {
            let create =
                ["runuser", "-u", "master-agent", "--", "master-agent", "token", "create", "--node", node];
            systemd.run(&create).unwrap()
        };
        systemd
            .run(&[
                "install",
                "-d",
                "-o",
                "node-agent",
                "-g",
                "node-agent",
                "-m",
                "700",
                "/var/lib/node-agent",
            ])
            .unwrap();
        let line = join("n1");
        let command: Vec<_> =
            ["runuser", "-u", "node-agent", "--"].into_iter().chain(line.split_whitespace()).collect();
        systemd.run(&command).unwrap();
        systemd.systemctl("start", "node-agent").unwrap();
        let elsewhere = elsewhere(path, &join("n2"));

        let config = client_config(&path.join("ca.crt"), Some((path, "kube-apiserver"))).unwrap();
        let unix = Door::Unix(systemd.path("/run/master-agent-egress/connect.sock"));
        let doors = vec![unix, Door::Tls(([127, 0, 0, 1], tls).into(), config)];
        let targets: Vec<_> = ["n1", "n2"].map(|node| format!("{node}:{port}")).to_vec();
        let site = Self { systemd, doors, targets, _elsewhere: elsewhere, _dir: dir };
        for target in &site.targets {
            eventually("both nodes are reached", SOON, async || {
                site.doors[0].connect(target).await.ok()?.ok()
            })
            .await;
        }
        site
    }

    fn dials(&self) -> Repeated {
        Repeated::dials(self.doors.clone(), self.targets.clone())
    }

    async fn echoes(&self) -> Vec<Stream> {
        let mut streams = Vec::new();
        for door in &self.doors {
            for target in &self.targets {
                streams.push(echo(door, target).await);
            }
        }
        streams
    }

    /// Waits until an agent has that many processes.
    async fn wait_for_processes(&self, agent: &str, count: usize) {
        eventually(&format!("{agent} has {count} processes"), SOON, async || {
            (self.systemd.processes(agent) == count).then_some(())
        })
        .await;
    }

    /// Waits until systemd has started an agent's main process anew, and that serves.
    async fn wait_for_another(&self, agent: &str, former: &str) {
        eventually(&format!("systemd starts {agent} again"), SOON, async || {
            let pid = self.systemd.property(agent, "MainPID");
            let is_active = self.systemd.property(agent, "ActiveState") == "active";
            (is_active && pid != "0" && pid != former).then_some(())
        })
        .await;
    }
}

/// Joins n2, and starts it.
fn elsewhere(path: &Path, line: &str) -> Process {
    let command = |args: &mut dyn Iterator<Item = &str>| {
        let mut command = Command::new(binary("node-agent"));
        command.args(args).arg("--config").arg(path.join("n2.yaml")).current_dir(path);
        command
    };
    let joined = command(&mut line.split_whitespace().skip(1)).output().unwrap();
    assert!(joined.status.success(), "{}", String::from_utf8_lossy(&joined.stderr));
    Process::start("n2", &mut command(&mut ["run"].into_iter()), &path.join("n2.log")).unwrap()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn restarts_refuse_no_dial() {
    let site = Site::start().await;
    for agent in AGENTS {
        let dials = site.dials();
        for _ in 0..times() {
            sleep(PAUSE).await;
            site.systemd.systemctl("restart", agent).unwrap();
        }
        println!("{} restarts of {agent}", times());
        dials.finish(100).await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_killed_agent_is_back_at_once() {
    let site = Site::start().await;
    for agent in AGENTS {
        for _ in 0..times() {
            let pid = site.systemd.property(agent, "MainPID");
            site.systemd.run(&["kill", "-9", &pid]).unwrap();
            site.wait_for_another(agent, &pid).await;
            let dials = site.dials();
            dials.finish(20).await;
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn reloads_cut_nothing_and_systemd_stays_in_charge() {
    let site = Site::start().await;
    for agent in AGENTS {
        let mut held = Vec::new();
        let dials = site.dials();
        for _ in 0..times() {
            held.extend(site.echoes().await);
            let pid = site.systemd.property(agent, "MainPID");
            site.systemd.systemctl("reload", agent).unwrap();
            assert_ne!(site.systemd.property(agent, "MainPID"), pid);
            for stream in &mut held {
                still_echoes(stream).await;
            }
        }
        println!("{} reloads of {agent}", times());
        dials.finish(100).await;
        assert_eq!(site.systemd.processes(agent), 1 + times());

        // A crash, unless it comes at once, leaves the former processes their streams, and systemd starts the agent again.
        sleep(Duration::from_secs(2)).await;
        let pid = site.systemd.property(agent, "MainPID");
        site.systemd.run(&["kill", "-9", &pid]).unwrap();
        site.wait_for_another(agent, &pid).await;
        for stream in &mut held {
            still_echoes(stream).await;
        }
        site.dials().finish(20).await;
        drop(held);
        site.wait_for_processes(agent, 1).await;

        // A restart gives the grace to the streams of a process that a reload has started, and of its former one.
        let former = site.echoes().await;
        site.systemd.systemctl("reload", agent).unwrap();
        let present = site.echoes().await;
        let restarting = std::thread::scope(|scope| {
            let restart = scope.spawn(|| site.systemd.systemctl("restart", agent));
            std::thread::sleep(Duration::from_millis(300));
            let stopping = site.systemd.property(agent, "ActiveState");
            (restart.join().unwrap(), stopping)
        });
        restarting.0.unwrap();
        assert_eq!(restarting.1, "deactivating", "it was stopped without a grace");
        let journal = site.systemd.journal();
        assert!(journal.contains("stopped cut="), "{journal}");
        drop((former, present));
        site.wait_for_processes(agent, 1).await;
        site.dials().finish(20).await;
    }
    site.systemd.systemctl("stop", "master-agent").unwrap();
    site.wait_for_processes("master-agent", 0).await;
    for door in &site.doors {
        assert!(door.connect(&site.targets[0]).await.is_err());
    }
}
