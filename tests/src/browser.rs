//! A web browser: Debian's chromium, without a screen.

use std::{net::SocketAddr, path::Path, process::Stdio};

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
