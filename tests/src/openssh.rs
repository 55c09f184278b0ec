//! Runs the real OpenSSH, server and clients, with keys and configuration of its own.

use std::{
    path::{Path, PathBuf},
    process::Command,
    sync::{Mutex, PoisonError},
    time::{Duration, Instant},
};

use anyhow::{Context, bail};

use crate::process::Process;

/// Makes an ed25519 key pair `PATH`, `PATH.pub`.
pub fn keygen(path: &Path) -> anyhow::Result<()> {
    run(Command::new("ssh-keygen").args(["-q", "-t", "ed25519", "-N", "", "-C", "test", "-f"]).arg(path))
}

/// Runs a command to its end; its output is in the error if it fails.
pub fn run(command: &mut Command) -> anyhow::Result<()> {
    let output = command.output().with_context(|| format!("can't run {command:?}"))?;
    if !output.status.success() {
        bail!(
            "{command:?}: {}{}",
            String::from_utf8_lossy(&output.stdout),
            String::from_utf8_lossy(&output.stderr)
        );
    }
    Ok(())
}

/// Makes the system account that masters log in as, unless it is there.
pub fn create_account(name: &str) -> anyhow::Result<()> {
    // Two tests that both find no account must not both try to make it.
    static ONE_AT_A_TIME: Mutex<()> = Mutex::new(());
    let _one = ONE_AT_A_TIME.lock().unwrap_or_else(PoisonError::into_inner);
    if Command::new("id").arg(name).output()?.status.success() {
        return Ok(());
    }
    run(Command::new("useradd").args([
        "--system",
        "--password",
        "*",
        "--no-create-home",
        "--shell",
        "/usr/sbin/nologin",
        name,
    ]))
}

/// Starts sshd in the foreground on a loopback port. `config` follows the lines that a test needs anyway.
pub fn sshd(directory: &Path, port: u16, config: &str) -> anyhow::Result<Process> {
    std::fs::create_dir_all("/run/sshd")?;
    let file = directory.join("sshd_config");
    std::fs::write(
        &file,
        format!(
            "Port {port}\nListenAddress 127.0.0.1\nPidFile none\nUsePAM no\nStrictModes no\nMaxStartups 100:30:200\n{config}\n"
        ),
    )?;
    let sshd = PathBuf::from("/usr/sbin/sshd");
    let process = Process::start(
        "sshd",
        Command::new(sshd).args(["-D", "-e", "-f"]).arg(&file),
        &directory.join("sshd.log"),
    )?;
    wait_for_port(port)?;
    Ok(process)
}

/// Waits until something listens on a loopback port.
pub fn wait_for_port(port: u16) -> anyhow::Result<()> {
    let deadline = Instant::now() + Duration::from_secs(10);
    while std::net::TcpStream::connect(("127.0.0.1", port)).is_err() {
        if Instant::now() > deadline {
            bail!("nothing listens on port {port}");
        }
        std::thread::sleep(Duration::from_millis(20));
    }
    Ok(())
}
