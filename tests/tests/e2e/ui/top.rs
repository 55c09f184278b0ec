//! `master-agent top` works in a real terminal, which tmux provides.

use std::{path::PathBuf, time::Duration};

use tests::{
    cluster::{Cluster, Kind, Options, SOON, binary},
    figures,
    process::{TempDir, eventually},
    target,
};
use tokio::{io::AsyncWriteExt, process::Command, time::Instant};

/// A terminal with a shell in it, of a tmux server of its own.
struct Terminal {
    dir: TempDir,
}

impl Terminal {
    async fn start(width: u16, height: u16) -> Self {
        let terminal = Self { dir: TempDir::new("tmux").unwrap() };
        let size = [width.to_string(), height.to_string()];
        terminal.tmux(&["new-session", "-d", "-x", &size[0], "-y", &size[1], "sh"]).await;
        terminal
    }

    async fn tmux(&self, args: &[&str]) -> String {
        let mut command = Command::new("tmux");
        command.arg("-f").arg("/dev/null").arg("-S").arg(self.dir.path().join("socket")).args(args);
        let output = command.env("TERM", "xterm-256color").env_remove("TMUX").output().await.unwrap();
        assert!(output.status.success(), "{args:?}: {}", String::from_utf8_lossy(&output.stderr));
        String::from_utf8(output.stdout).unwrap()
    }

    async fn type_line(&self, line: &str) {
        self.tmux(&["send-keys", "-l", line]).await;
        self.keys(&["Enter"]).await;
    }

    async fn keys(&self, keys: &[&str]) {
        self.tmux(&[&["send-keys"], keys].concat()).await;
    }

    async fn screen(&self) -> String {
        self.tmux(&["capture-pane", "-p"]).await
    }

    async fn shows(&self, text: &str) -> String {
        let deadline = Instant::now() + SOON;
        loop {
            let screen = self.screen().await;
            if screen.contains(text) {
                return screen;
            }
            assert!(
                Instant::now() < deadline,
                "not within {SOON:?}: the terminal shows {text:?}; it shows\n{screen}"
            );
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    }
}

impl Drop for Terminal {
    fn drop(&mut self) {
        let socket = self.dir.path().join("socket");
        let _ = std::process::Command::new("tmux").arg("-S").arg(socket).arg("kill-server").output();
    }
}

/// The line that starts it; its pid is left in the file. The quotes keep what is typed from looking like what is printed
/// at the end: what a test types before the end would be lost.
fn line(cluster: &Cluster, pid: &std::path::Path, more: &str) -> String {
    format!(
        "sh -c 'echo $$ >{}; exec {} --config {} top {more}'; echo ended' with' $?",
        pid.display(),
        binary("master-agent").display(),
        cluster.path().join("master.yaml").display()
    )
}

async fn pid_in(file: &PathBuf) -> u32 {
    eventually("it runs", SOON, async || std::fs::read_to_string(file).ok()?.trim().parse().ok()).await
}

/// User and system time of a process.
fn cpu(pid: u32) -> Duration {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap();
    let fields: Vec<&str> = stat.rsplit(')').next().unwrap().split_whitespace().collect();
    let ticks = fields[11].parse::<u64>().unwrap() + fields[12].parse::<u64>().unwrap();
    Duration::from_millis(ticks * 10)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn nodes_streams_and_events_are_shown_live() {
    let port = target::start().await;
    let options = Options {
        nodes: vec![("n1".to_owned(), Kind::Dialled), ("n2".to_owned(), Kind::CallHome)],
        ports: vec![port],
        ..Options::default()
    };
    let mut cluster = Cluster::start(options).await.unwrap();
    let refused = cluster.unix.connect("n1:1").await.unwrap().err().unwrap();
    assert_eq!(refused.status, 403);
    let mut stream = cluster.unix.stream(&format!("n1:{port}")).await.unwrap();
    stream.write_all(b"source 100000000000\n").await.unwrap();

    let terminal = Terminal::start(120, 30).await;
    let pid = cluster.path().join("top.pid");
    terminal.type_line(&line(&cluster, &pid, "--interval 200ms --sort streams")).await;
    let screen = terminal.shows("2 of 2 nodes connected").await;
    assert!(
        screen.contains("STREAMS*") && screen.contains("call-home") && screen.contains("dialled"),
        "{screen}"
    );
    // Bytes flow to a reader that reads.
    let reader = tokio::spawn(async move { tokio::io::copy(&mut stream, &mut tokio::io::sink()).await });
    terminal.shows("MB").await;
    terminal.keys(&["Enter"]).await;
    let screen = terminal.shows("STREAM TO").await;
    assert!(screen.contains(&format!("n1:{port}")) && screen.contains("ROUND TRIP"), "{screen}");
    let screen = terminal.shows("policy").await;
    assert!(screen.contains("n1:1: refused by node policy"), "{screen}");
    reader.abort();
    let _ = reader.await;
    eventually("the stream is gone", SOON, async || {
        (!terminal.screen().await.contains("connect-unix:")).then_some(())
    })
    .await;

    // A node that dies is seen to; so is its return.
    terminal.keys(&["Escape"]).await;
    terminal.shows("NODE").await;
    cluster.nodes[1].process.as_mut().unwrap().kill();
    terminal.shows("1 of 2 nodes connected, 1 not").await;
    terminal.shows("lost").await;
    terminal.type_line("/lost").await;
    let screen = terminal.shows("filter: lost").await;
    assert!(screen.contains("n2 ") && !screen.contains("n1 "), "{screen}");
    cluster.start_node(1).unwrap();
    terminal.shows("2 of 2 nodes connected").await;

    // The window becomes small, and then large.
    terminal.keys(&["Escape"]).await;
    for (width, height) in [("60", "15"), ("20", "5"), ("200", "50")] {
        terminal.tmux(&["resize-window", "-x", width, "-y", height]).await;
        terminal.shows("n1").await;
    }
    terminal.tmux(&["resize-window", "-x", "60", "-y", "15"]).await;
    let screen = terminal.shows("STREAMS*").await;
    assert!(
        !screen.contains("DIRECTION") && screen.lines().all(|line| line.chars().count() <= 60),
        "{screen}"
    );

    // The master goes: that is said, and it goes on when the master is back.
    cluster.master.kill();
    terminal.shows("can't reach the running agent").await;
    cluster.restart_master().unwrap();
    terminal.shows("q quit").await;
    terminal.shows("2 of 2 nodes connected").await;
    terminal.keys(&["q"]).await;
    terminal.shows("ended with 0").await;

    // Killed, it leaves the terminal as it was: the shell's lines, and what is typed is seen.
    for signal in ["TERM", "HUP", "INT"] {
        std::fs::remove_file(&pid).unwrap();
        terminal.type_line("clear").await;
        terminal.type_line(&line(&cluster, &pid, "")).await;
        terminal.shows("nodes connected").await;
        let top = pid_in(&pid).await.to_string();
        assert!(Command::new("kill").args(["-s", signal, &top]).status().await.unwrap().success());
        terminal.shows("ended with").await;
        terminal.type_line(&format!("echo typed after {signal}")).await;
        let screen = terminal.shows(&format!("\ntyped after {signal}")).await;
        assert!(
            screen.contains(&format!("echo typed after {signal}")) && !screen.contains("NODE"),
            "{signal}: {screen}"
        );
        assert_eq!(
            terminal.tmux(&["display-message", "-p", "#{alternate_on} #{cursor_flag}"]).await,
            "0 1\n"
        );
    }

    // Standard output is not a terminal.
    let plain = cluster.command(&["top"]).unwrap();
    assert!(plain.contains("NODE") && plain.contains("n2") && !plain.contains('\u{1b}'), "{plain:?}");
}

/// A thousand nodes that never call, redrawn once a second.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_thousand_nodes_cost_little() {
    let cluster = Cluster::start(Options { nodes_down: true, ..Options::default() }).await.unwrap();
    let mut inventory = "nodes:\n".to_owned();
    for i in 0..1000 {
        use std::fmt::Write;
        writeln!(inventory, "  - name: node-{i}\n    addresses: ['10.9.{}.{}']", i / 250, i % 250 + 1)
            .unwrap();
    }
    std::fs::write(cluster.path().join("inventory.yaml"), inventory).unwrap();
    cluster.master.signal("HUP");
    eventually("the inventory is read", SOON, async || {
        (cluster.command(&["node", "list"]).ok()?.lines().count() > 1000).then_some(())
    })
    .await;
    let terminal = Terminal::start(120, 40).await;
    let pid = cluster.path().join("top.pid");
    let began = Instant::now();
    terminal.type_line(&line(&cluster, &pid, "")).await;
    terminal.shows("0 of 1000 nodes connected").await;
    let shown = began.elapsed();
    let pid = pid_in(&pid).await;
    let (before, began) = (cpu(pid), Instant::now());
    tokio::time::sleep(Duration::from_secs(10)).await;
    let share = (cpu(pid) - before).as_secs_f64() / began.elapsed().as_secs_f64();
    figures::note(&format!("top with 1,000 nodes: shown after {shown:?}, {:.1} % of a core", share * 100.0));
    terminal.keys(&["q"]).await;
    terminal.shows("ended with 0").await;
}
