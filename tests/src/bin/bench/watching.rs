//! Measures what observers cost the data path: `top` in a terminal, the page, and a scrape every second, of a master
//! that knows 1,000 nodes. The column `direct` is without observers here, and `ours` is with them.

use std::{
    net::SocketAddr,
    process::Command,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    time::Duration,
};

use anyhow::{Context, ensure};
use tests::{
    client::{Stream, http_get},
    cluster::{Cluster, Kind, Options, binary},
    process::{TempDir, free_port},
};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpStream,
    task::JoinHandle,
    time::Instant,
};

use super::{
    paths::target_process,
    report::{Figures, Path, rounds},
    work::{download, kept_get_rate},
};

const BOTH: [Path; 2] = [Path::Direct, Path::Ours];
const NODES: usize = 1000;
/// Rounds are short, so that both ways meet the same machine.
const VOLUME: u64 = 512 << 20;

pub async fn figures(n: usize, time: Duration) -> anyhow::Result<Figures> {
    let dir = TempDir::new("bench")?;
    let port = free_port();
    let _target = target_process(port, &dir.path().join("target.log"))?;
    let cluster = Cluster::start(Options {
        nodes: vec![("n1".to_owned(), Kind::Dialled)],
        ports: vec![port],
        admin: ", page: true",
        master_config: "log: {level: warn}\n".to_owned(),
        node_config: "log: {level: warn}".to_owned(),
        ..Options::default()
    })
    .await?;
    let inventory = cluster.path().join("inventory.yaml");
    let mut text = std::fs::read_to_string(&inventory)?;
    text.extend((2..=NODES).map(|node| format!("  - {{name: n{node}}}\n")));
    std::fs::write(&inventory, text)?;
    cluster.master.signal("HUP");
    while !http_get(cluster.admin, "/metrics").await?.contains(&format!("master_agent_nodes {NODES}\n")) {
        tokio::time::sleep(Duration::from_millis(50)).await;
    }

    let connect = async || -> anyhow::Result<Stream> { cluster.unix.stream(&format!("n1:{port}")).await };
    let watched = async |path: Path| match path {
        Path::Ours => Ok::<_, anyhow::Error>(Some(Watchers::start(&cluster).await?)),
        _ => Ok(None),
    };
    let throughput = rounds(&BOTH, n, async |path| {
        let watchers = watched(path).await?;
        let speed = download(connect().await?, VOLUME).await?;
        end(watchers)?;
        Ok(speed)
    })
    .await;
    let rate = rounds(&BOTH, n, async |path| {
        let watchers = watched(path).await?;
        let rate = kept_get_rate(&connect, time).await?;
        end(watchers)?;
        Ok(rate)
    })
    .await;
    Ok(Figures::from([
        ("watching_throughput", throughput.figure("MB/s")),
        ("watching_rate_32", rate.figure("1/s")),
    ]))
}

/// Those who watch, until it is dropped.
struct Watchers {
    terminal: TempDir,
    scrapes: Arc<AtomicUsize>,
    events: Arc<AtomicUsize>,
    tasks: [JoinHandle<()>; 2],
}

impl Watchers {
    async fn start(cluster: &Cluster) -> anyhow::Result<Self> {
        let terminal = TempDir::new("tmux")?;
        let top = format!(
            "exec {} --config {} top",
            binary("master-agent").display(),
            cluster.path().join("master.yaml").display()
        );
        tmux(&terminal, &["new-session", "-d", "-x", "140", "-y", "40", &top])?;
        let (scrapes, events) = (Arc::<AtomicUsize>::default(), Arc::<AtomicUsize>::default());
        let page = open_page(cluster).await?;
        let tasks = [
            tokio::spawn(scrape(cluster.admin, scrapes.clone())),
            tokio::spawn(follow(page, events.clone())),
        ];
        let watchers = Self { terminal, scrapes, events, tasks };
        // Their first requests are not part of the measurement.
        while !watchers.screen()?.contains(&format!("of {NODES} nodes")) {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        Ok(watchers)
    }

    fn screen(&self) -> anyhow::Result<String> {
        tmux(&self.terminal, &["capture-pane", "-p"])
    }
}

/// They must have been there to the end.
fn end(watchers: Option<Watchers>) -> anyhow::Result<()> {
    let Some(watchers) = watchers else { return Ok(()) };
    ensure!(watchers.screen()?.contains(&format!("of {NODES} nodes")), "top has ended");
    ensure!(watchers.scrapes.load(Ordering::Relaxed) > 0, "nothing was scraped");
    ensure!(watchers.events.load(Ordering::Relaxed) > 0, "the page was told nothing");
    ensure!(watchers.tasks.iter().all(|task| !task.is_finished()), "somebody stopped watching");
    Ok(())
}

impl Drop for Watchers {
    fn drop(&mut self) {
        self.tasks.iter().for_each(JoinHandle::abort);
        let _ = tmux(&self.terminal, &["kill-server"]);
    }
}

fn tmux(directory: &TempDir, args: &[&str]) -> anyhow::Result<String> {
    let mut command = Command::new("tmux");
    command.arg("-f").arg("/dev/null").arg("-S").arg(directory.path().join("socket")).args(args);
    let output = command.env("TERM", "xterm-256color").env_remove("TMUX").output().context("tmux")?;
    ensure!(output.status.success(), "tmux {args:?}: {}", String::from_utf8_lossy(&output.stderr));
    Ok(String::from_utf8(output.stdout)?)
}

async fn scrape(admin: SocketAddr, scrapes: Arc<AtomicUsize>) {
    let first = Instant::now() + Duration::from_millis(300);
    let mut second = tokio::time::interval_at(first, Duration::from_secs(1));
    loop {
        second.tick().await;
        match http_get(admin, "/metrics").await {
            Ok(_) => drop(scrapes.fetch_add(1, Ordering::Relaxed)),
            Err(error) => eprintln!("scrape: {error:#}"),
        }
    }
}

/// Opens the stream of events that the page follows, as a browser that has logged in.
async fn open_page(cluster: &Cluster) -> anyhow::Result<TcpStream> {
    let admin = cluster.admin;
    let url = cluster.command(&["page"])?;
    let login = url.trim().strip_prefix(&format!("http://{admin}")).context("no login")?;
    let ask = async |path: &str, cookie: &str| -> anyhow::Result<TcpStream> {
        let mut socket = TcpStream::connect(admin).await?;
        let request = format!("GET {path} HTTP/1.1\r\nHost: {admin}\r\n{cookie}\r\n");
        socket.write_all(request.as_bytes()).await?;
        Ok(socket)
    };
    let mut head = String::new();
    ask(login, "Connection: close\r\n").await?.read_to_string(&mut head).await?;
    let cookie = head.lines().find_map(|line| line.strip_prefix("set-cookie: ")?.split(';').next());
    ask("/page/events", &format!("Cookie: {}\r\n", cookie.context("no session")?)).await
}

async fn follow(mut page: TcpStream, events: Arc<AtomicUsize>) {
    let mut buffer = vec![0; 256 << 10];
    while page.read(&mut buffer).await.is_ok_and(|n| n > 0) {
        events.fetch_add(1, Ordering::Relaxed);
    }
}
