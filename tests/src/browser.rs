//! Drives Debian's chromium without a screen.

use std::{
    net::SocketAddr,
    path::{Path, PathBuf},
    process::Stdio,
};

use crate::person::{Outcome, finish};

/// Opens `url`, and prints the DOM once the page has been loaded and its scripts have run; nothing where it can't be
/// loaded. `directory` is for this browser's profile.
pub async fn dump_dom(directory: &Path, socks5: Option<SocketAddr>, url: &str) -> anyhow::Result<Outcome> {
    let mut command = tokio::process::Command::new("chromium");
    command
        .args(["--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run"])
        .args(["--disable-background-networking", "--disable-component-update", "--disable-sync"])
        // Loopback would be asked for directly.
        .arg("--proxy-bypass-list=<-loopback>")
        .arg(
            socks5.map_or("--no-proxy-server".to_owned(), |proxy| format!("--proxy-server=socks5://{proxy}")),
        )
        .arg(format!("--user-data-dir={}", directory.join("profile").display()))
        .args(["--timeout=30000", "--dump-dom", url])
        .env("HOME", directory);
    command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped()).kill_on_drop(true);
    finish(command, b"").await
}

/// Runs `tests/browser/page.py`, which drives it.
pub async fn drive(args: &[&str]) -> anyhow::Result<Outcome> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("..");
    // Where tests/run.sh has put it.
    let python = std::env::var_os("BROWSER_PYTHON").map(PathBuf::from);
    let python = python.unwrap_or_else(|| root.join("target/tools/browser/bin/python"));
    let mut command = tokio::process::Command::new(python);
    command.arg(root.join("tests/browser/page.py")).args(args);
    command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped()).kill_on_drop(true);
    finish(command, b"").await
}

/// Where pictures of pages go.
pub fn screenshots() -> anyhow::Result<PathBuf> {
    let target = std::env::var_os("CARGO_TARGET_DIR").map(PathBuf::from);
    let target = target.unwrap_or_else(|| Path::new(env!("CARGO_MANIFEST_DIR")).join("../target"));
    let directory = target.join("page-screenshots");
    std::fs::create_dir_all(&directory)?;
    Ok(directory)
}
