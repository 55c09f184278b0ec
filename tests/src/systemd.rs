//! A systemd of its own, with the units of `deploy/systemd`, in the network of this process.

use std::{
    io::{BufRead, BufReader},
    path::{Path, PathBuf},
    process::{Child, ChildStdin, Command, Stdio},
};

use anyhow::{Context, bail};

use crate::{
    cluster::binary,
    process::{TempDir, note_process},
};

/// The users of the agents, which have their names.
const USERS: [(&str, u32); 2] = [("master-agent", 64001), ("node-agent", 64002)];

/// PID 1 of namespaces. It ends with this, and everything in there ends with it.
pub struct Systemd {
    runner: Child,
    stdin: Option<ChildStdin>,
    pid: String,
    dir: TempDir,
}

impl Systemd {
    /// Starts it with both units and files for the agents, each with its path in there.
    pub fn start(files: &[(PathBuf, &str)]) -> anyhow::Result<Self> {
        let (dir, here) = (TempDir::new("systemd")?, Path::new(env!("CARGO_MANIFEST_DIR")));
        let mut command = Command::new("python3");
        command.arg(here.join("data/units/systemd.py")).arg("run").arg(dir.path()).arg("--stdin");
        for (user, id) in USERS {
            let unit = here.join(format!("../deploy/systemd/{user}.service"));
            command.arg("--unit").arg(unit).arg("--user").arg(format!("{user}:{id}"));
            command.arg("--copy").arg(format!("{}:/usr/bin/{user}:755", binary(user).display()));
        }
        for (file, path) in files {
            command.arg("--copy").arg(format!("{}:{path}:600", file.display()));
        }
        let mut runner = command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn()?;
        note_process(runner.id());
        let (stdin, stdout) = (runner.stdin.take(), runner.stdout.take().context("no output")?);
        let mut line = String::new();
        BufReader::new(stdout).read_line(&mut line)?;
        let pid = line.trim().to_owned();
        let systemd = Self { runner, stdin, pid, dir };
        if systemd.pid.is_empty() {
            bail!("systemd does not start; see {}", systemd.dir.path().display());
        }
        for (user, _) in USERS {
            systemd.run(&["chown", "-R", &format!("{user}:{user}"), &format!("/etc/{user}")])?;
        }
        Ok(systemd)
    }

    /// A path in there, as it is seen from here.
    pub fn path(&self, path: &str) -> PathBuf {
        PathBuf::from(format!("/proc/{}/root{path}", self.pid))
    }

    /// Runs a command in there to its end, and returns what it prints.
    pub fn run(&self, command: &[&str]) -> anyhow::Result<String> {
        let output = Command::new("nsenter")
            .args(["-t", &self.pid, "-m", "-p", "-u", "-i", "--"])
            .args(command)
            .output()?;
        if !output.status.success() {
            let said = String::from_utf8_lossy(&output.stderr);
            bail!("{command:?}: {said}\n{}", self.journal());
        }
        Ok(String::from_utf8(output.stdout)?)
    }

    /// Runs `systemctl` with an agent's unit.
    pub fn systemctl(&self, verb: &str, agent: &str) -> anyhow::Result<()> {
        self.run(&["systemctl", verb, agent]).map(drop)
    }

    /// A property of an agent's unit.
    pub fn property(&self, agent: &str, name: &str) -> String {
        self.run(&["systemctl", "show", "-P", name, agent]).unwrap_or_default().trim().to_owned()
    }

    /// The number of processes of an agent, also of those that have been replaced.
    pub fn processes(&self, agent: &str) -> usize {
        let path = self.path(&format!("/sys/fs/cgroup/system.slice/{agent}.service/cgroup.procs"));
        std::fs::read_to_string(path).unwrap_or_default().lines().count()
    }

    /// What both agents and systemd have logged.
    pub fn journal(&self) -> String {
        let command =
            ["-t", &self.pid, "-m", "-p", "-u", "-i", "--", "journalctl", "--no-pager", "-n", "200"];
        let output = Command::new("nsenter").args(command).output();
        output.map(|output| String::from_utf8_lossy(&output.stdout).into_owned()).unwrap_or_default()
    }
}

impl Drop for Systemd {
    fn drop(&mut self) {
        drop(self.stdin.take());
        // It unmounts what it has mounted.
        for _ in 0..200 {
            if !matches!(self.runner.try_wait(), Ok(None)) {
                return;
            }
            std::thread::sleep(std::time::Duration::from_millis(50));
        }
        let _ = self.runner.kill();
        let _ = self.runner.wait();
    }
}
