//! A person who uses the stock ssh, sftp and scp, and recognises a node by the master's host CA.

use std::{
    path::{Path, PathBuf},
    process::{Command, Stdio},
    time::Duration,
};

use anyhow::Context;
use tokio::io::AsyncWriteExt;

use crate::{cluster::Cluster, openssh, process::Process};

/// How long a client may take for anything.
const PATIENCE: Duration = Duration::from_secs(120);

/// A key pair, perhaps with a certificate, and a configuration in which `node` is the first node of a cluster.
pub struct Person {
    pub directory: PathBuf,
}

/// The exit code and output of a client.
#[derive(Debug)]
pub struct Outcome {
    pub code: Option<i32>,
    pub stdout: Vec<u8>,
    pub stderr: String,
}

impl Person {
    /// A person with a key of which nobody has heard. `name` is the login, and the directory below the
    /// cluster's. `config` precedes the lines that they need anyway.
    pub fn stranger(cluster: &Cluster, name: &str, config: &str) -> anyhow::Result<Self> {
        let directory = cluster.path().join(format!("person-{name}"));
        std::fs::create_dir_all(&directory)?;
        openssh::keygen(&directory.join("key"))?;
        let host_ca = std::fs::read_to_string(cluster.path().join("master/host_ca.pub"))?;
        let at = directory.display();
        std::fs::write(directory.join("known_hosts"), format!("@cert-authority * {host_ca}"))?;
        std::fs::write(
            directory.join("config"),
            format!(
                "{config}\nHost node\n    HostName 127.0.0.1\n    Port {}\n    User {name}\nHost *\n    \
                 UserKnownHostsFile {at}/known_hosts\n    GlobalKnownHostsFile none\n    StrictHostKeyChecking yes\n    \
                 IdentityFile {at}/key\n    IdentitiesOnly yes\n    IdentityAgent none\n    BatchMode yes\n",
                cluster.nodes[0].port
            ),
        )?;
        Ok(Self { directory })
    }

    /// A person whose key `master-agent sign-user` has certified.
    pub fn certified(cluster: &Cluster, name: &str, config: &str) -> anyhow::Result<Self> {
        let person = Self::stranger(cluster, name, config)?;
        let key = person.key().with_extension("pub");
        let certificate =
            cluster.command(&["sign-user", name, "--key", key.to_str().context("a path in UTF-8")?])?;
        std::fs::write(person.directory.join("key-cert.pub"), certificate)?;
        Ok(person)
    }

    pub fn key(&self) -> PathBuf {
        self.directory.join("key")
    }

    /// Has the key certified by ssh-keygen, with these further arguments.
    pub fn sign(&self, ca: &Path, args: &[&str]) -> anyhow::Result<()> {
        let mut command = Command::new("ssh-keygen");
        command.arg("-q").arg("-s").arg(ca).args(args).arg(self.key().with_extension("pub"));
        openssh::run(&mut command)
    }

    /// Starts a client that stays, with its output in `NAME.log`.
    pub fn start(&self, name: &str, args: &[&str]) -> anyhow::Result<Process> {
        let mut command = Command::new("ssh");
        command.arg("-F").arg(self.directory.join("config")).args(args);
        Process::start(name, &mut command, &self.directory.join(format!("{name}.log")))
    }

    /// A client yet to be started, with pipes.
    pub fn client(&self, program: &str, args: &[&str]) -> tokio::process::Command {
        let mut command = tokio::process::Command::new(program);
        command.arg("-F").arg(self.directory.join("config")).args(args);
        command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped()).kill_on_drop(true);
        command
    }

    /// Runs ssh to its end, with `input` on its standard input.
    pub async fn ssh(&self, args: &[&str], input: &[u8]) -> anyhow::Result<Outcome> {
        finish(self.client("ssh", args), input).await
    }
}

/// Runs a client to its end, with `input` on its standard input.
pub async fn finish(mut command: tokio::process::Command, input: &[u8]) -> anyhow::Result<Outcome> {
    let mut child = command.spawn()?;
    let mut stdin = child.stdin.take().context("no standard input")?;
    let feed = async {
        // A client that ends early is not this side's failure.
        let _ = stdin.write_all(input).await;
        drop(stdin);
    };
    let both = async { tokio::join!(feed, child.wait_with_output()).1 };
    let output =
        tokio::time::timeout(PATIENCE, both).await.with_context(|| format!("{command:?} does not end"))??;
    Ok(Outcome {
        code: output.status.code(),
        stdout: output.stdout,
        stderr: String::from_utf8_lossy(&output.stderr).into_owned(),
    })
}
