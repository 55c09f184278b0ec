//! Starts child processes, watches and measures them, and ends them by pid.

use std::{
    collections::BTreeSet,
    fs::File,
    io::Write,
    net::{Ipv4Addr, Ipv6Addr, SocketAddr},
    path::{Path, PathBuf},
    process::{Child, ChildStderr, Command, Stdio},
    sync::{Mutex, PoisonError},
    time::{Duration, Instant},
};

use anyhow::{Context, bail};
use socket2::{Domain, Socket, Type};

use crate::kubelet_port;

/// Far longer than a process takes to log what has happened.
const SAID: Duration = Duration::from_secs(20);

/// A process that ends with its owner. Its output goes to a file.
#[derive(Debug)]
pub struct Process {
    /// `None` for a process that another one has started.
    child: Option<Child>,
    pid: u32,
    pub name: String,
    pub log: PathBuf,
}

impl Process {
    /// Starts `command`, with its output appended to `log`.
    pub fn start(name: &str, command: &mut Command, log: &Path) -> anyhow::Result<Self> {
        let output = File::options().create(true).append(true).open(log)?;
        Self::spawn(name, command.stdout(output.try_clone()?).stderr(output), log)
    }

    /// Starts `command` with its standard error in a pipe, which nobody reads unless the caller does.
    pub fn start_unread(
        name: &str,
        command: &mut Command,
        log: &Path,
    ) -> anyhow::Result<(Self, ChildStderr)> {
        let output = File::options().create(true).append(true).open(log)?;
        let mut process = Self::spawn(name, command.stdout(output).stderr(Stdio::piped()), log)?;
        let pipe = process.child.as_mut().and_then(|child| child.stderr.take()).context("no pipe")?;
        Ok((process, pipe))
    }

    fn spawn(name: &str, command: &mut Command, log: &Path) -> anyhow::Result<Self> {
        let spawned = command.stdin(Stdio::null()).spawn();
        let child = spawned.with_context(|| format!("can't start {name}: {command:?}"))?;
        note_process(child.id());
        Ok(Self { pid: child.id(), child: Some(child), name: name.to_owned(), log: log.to_owned() })
    }

    /// A process that this one has started, with the same output.
    pub fn adopt(&self, pid: u32) -> Self {
        note_process(pid);
        Self { child: None, pid, name: self.name.clone(), log: self.log.clone() }
    }

    pub fn pid(&self) -> u32 {
        self.pid
    }

    pub fn log_text(&self) -> String {
        std::fs::read_to_string(&self.log).unwrap_or_default()
    }

    /// Waits until one line of its log has all these words, and gives the log. An agent writes what it logs a moment
    /// later.
    pub async fn says(&self, words: &[&str]) -> String {
        let deadline = Instant::now() + SAID;
        loop {
            let log = self.log_text();
            if log.lines().any(|line| words.iter().all(|word| line.contains(word))) {
                return log;
            }
            assert!(Instant::now() < deadline, "{} does not say {words:?}:\n{log}", self.name);
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    }

    /// Sends a signal, named as kill(1) does.
    pub fn signal(&self, name: &str) {
        let _ = Command::new("kill").args(["-s", name, &self.pid().to_string()]).output();
    }

    /// Ends it at once, as a power cut would.
    pub fn kill(&mut self) {
        match &mut self.child {
            Some(child) => {
                let _ = child.kill();
                let _ = child.wait();
            }
            None => {
                self.signal("KILL");
                let _ = self.wait(SAID);
            }
        }
    }

    /// Waits for it to end by itself; gives its exit code, if this process has started it.
    pub fn wait(&mut self, timeout: Duration) -> anyhow::Result<Option<i32>> {
        let deadline = Instant::now() + timeout;
        loop {
            match &mut self.child {
                Some(child) => {
                    if let Some(status) = child.try_wait()? {
                        return Ok(status.code());
                    }
                }
                None if !is_alive(self.pid) => return Ok(None),
                None => {}
            }
            if Instant::now() > deadline {
                bail!("{} did not end within {timeout:?}:\n{}", self.name, self.log_text());
            }
            std::thread::sleep(Duration::from_millis(20));
        }
    }

    pub fn is_running(&mut self) -> bool {
        match &mut self.child {
            Some(child) => matches!(child.try_wait(), Ok(None)),
            None => is_alive(self.pid),
        }
    }

    pub fn usage(&self) -> Usage {
        Usage::of(self.pid())
    }

    /// User and system time of the threads that it has, in seconds. It is finer than that of [`Usage`], which is in
    /// hundredths.
    pub fn cpu_of_threads(&self) -> f64 {
        let threads = std::fs::read_dir(format!("/proc/{}/task", self.pid())).into_iter().flatten().flatten();
        threads.filter_map(|thread| cpu_of_task(&thread.path())).sum()
    }
}

/// Notes something that this test process has started, in the file that `TEST_STARTED` names. `tests/run.sh` ends what
/// is left of it if this process is killed.
pub fn note_started(what: &str) {
    let Some(file) = std::env::var_os("TEST_STARTED") else { return };
    let file = File::options().create(true).append(true).open(file);
    let _ = file.and_then(|mut file| file.write_all(format!("{what}\n").as_bytes()));
}

/// Whether a process is there and has not ended. The one that has started it may not have asked for its status.
fn is_alive(pid: u32) -> bool {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    stat.rsplit_once(')').is_some_and(|(_, rest)| !rest.trim_start().starts_with('Z'))
}

/// The time of its start tells the process from a later one with the same number.
pub fn note_process(pid: u32) {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    let behind_name = stat.rsplit_once(')').map_or("", |(_, rest)| rest);
    if let Some(started) = behind_name.split_whitespace().nth(19) {
        note_started(&format!("process {pid} {started}"));
    }
}

/// User and system time of a thread by its directory in /proc, in seconds.
pub fn cpu_of_task(directory: &Path) -> Option<f64> {
    let text = std::fs::read_to_string(directory.join("schedstat")).ok()?;
    Some(text.split_whitespace().next()?.parse::<f64>().ok()? / 1e9)
}

/// What a command prints, on either output; nothing if it can't be run.
pub fn output_of(command: &mut Command) -> String {
    let Ok(output) = command.output() else { return String::new() };
    String::from_utf8_lossy(&[output.stdout, output.stderr].concat()).into_owned()
}

impl Drop for Process {
    fn drop(&mut self) {
        self.kill();
    }
}

/// The resources that a process uses, with its descendants.
#[derive(Clone, Copy, Debug, Default)]
pub struct Usage {
    /// Resident memory, bytes.
    pub memory: u64,
    pub descriptors: u64,
    /// User and system time, seconds.
    pub cpu: f64,
}

impl Usage {
    /// Reads /proc for a process and those that descend from it.
    pub fn of(pid: u32) -> Self {
        let mut sum = Self::one(pid).unwrap_or_default();
        for child in children(pid) {
            let usage = Self::of(child);
            sum.memory += usage.memory;
            sum.descriptors += usage.descriptors;
            sum.cpu += usage.cpu;
        }
        sum
    }

    fn one(pid: u32) -> Option<Self> {
        let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
        let fields: Vec<&str> = stat.rsplit_once(')')?.1.split_whitespace().collect();
        let ticks: f64 = fields.get(11..15)?.iter().filter_map(|f| f.parse::<f64>().ok()).sum();
        let pages: u64 = std::fs::read_to_string(format!("/proc/{pid}/statm"))
            .ok()?
            .split_whitespace()
            .nth(1)?
            .parse()
            .ok()?;
        let descriptors = std::fs::read_dir(format!("/proc/{pid}/fd")).map_or(0, |d| d.count() as u64);
        Some(Self { memory: pages * 4096, descriptors, cpu: ticks / 100.0 })
    }
}

fn children(pid: u32) -> Vec<u32> {
    let tasks = std::fs::read_dir(format!("/proc/{pid}/task")).into_iter().flatten().flatten();
    tasks
        .filter_map(|task| std::fs::read_to_string(task.path().join("children")).ok())
        .flat_map(|text| text.split_whitespace().filter_map(|p| p.parse().ok()).collect::<Vec<_>>())
        .collect()
}

/// A directory that is removed with its owner, unless KEEP_TEST_OUTPUT is set.
#[derive(Debug)]
pub struct TempDir(PathBuf);

impl TempDir {
    pub fn new(name: &str) -> anyhow::Result<Self> {
        let unique = format!("{name}-{}-{:08x}", std::process::id(), rand::random::<u32>());
        let path = std::env::temp_dir().join(unique);
        std::fs::create_dir_all(&path)?;
        Ok(Self(path))
    }

    pub fn path(&self) -> &Path {
        &self.0
    }
}

impl Drop for TempDir {
    fn drop(&mut self) {
        if std::env::var_os("KEEP_TEST_OUTPUT").is_none() {
            let _ = std::fs::remove_dir_all(&self.0);
        }
    }
}

/// Asks `done` every few milliseconds until it gives something.
pub async fn eventually<T>(what: &str, timeout: Duration, mut done: impl AsyncFnMut() -> Option<T>) -> T {
    let deadline = Instant::now() + timeout;
    loop {
        if let Some(value) = done().await {
            return value;
        }
        assert!(Instant::now() < deadline, "not within {timeout:?}: {what}");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

/// Listens at an address where a listener of this process has just been closed. A process that another test starts has
/// a copy of that listener from its fork to its exec, so the address can be taken for a moment.
pub async fn listen_again(address: std::net::SocketAddr) -> std::io::Result<tokio::net::TcpListener> {
    for _ in 0..500 {
        match tokio::net::TcpListener::bind(address).await {
            Err(error) if error.kind() == std::io::ErrorKind::AddrInUse => {
                tokio::time::sleep(Duration::from_millis(10)).await;
            }
            bound => return bound,
        }
    }
    tokio::net::TcpListener::bind(address).await
}

/// A TCP port of loopback that was free a moment ago, and that this process has not been given before.
pub fn free_port() -> u16 {
    static GIVEN: Mutex<BTreeSet<u16>> = Mutex::new(BTreeSet::new());
    // The port is below the ephemeral range, so that no outgoing connection takes it meanwhile.
    loop {
        let port = rand::random_range(10_000..32_000);
        // A port that has been given is not even tried: it is somebody's, who may be about to listen on it again.
        if port != kubelet_port::PORT
            && GIVEN.lock().unwrap_or_else(PoisonError::into_inner).insert(port)
            && is_free(SocketAddr::from((Ipv4Addr::LOCALHOST, port)))
            && is_free(SocketAddr::from((Ipv6Addr::LOCALHOST, port)))
        {
            return port;
        }
    }
}

/// Whether nobody listens on an address. The socket that finds out does not listen itself: a process that another test
/// is starting may hold a copy of it for a moment, and a listening copy would keep the address from its next owner.
fn is_free(address: SocketAddr) -> bool {
    let Ok(socket) = Socket::new(Domain::for_address(address), Type::STREAM, None) else { return false };
    socket.set_reuse_address(true).is_ok() && socket.bind(&address.into()).is_ok()
}
