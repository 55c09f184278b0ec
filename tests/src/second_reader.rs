//! HTTP/1.1 requests as Python's `http.server` reads them. The agents and the stub kube-apiserver are built on one
//! parser, which cannot judge itself.

use std::{
    io::Write,
    path::Path,
    process::{Command, Stdio},
};

use anyhow::{Context, ensure};
use base64::{Engine, prelude::BASE64_STANDARD};
use serde::Deserialize;

/// A request; all but `error` is missing where it is none.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(default)]
pub struct Request {
    pub method: String,
    pub target: String,
    /// By name and value; names are in lower case.
    pub headers: Vec<(String, String)>,
    /// Whether it has arrived to its end.
    pub whole: bool,
    pub error: Option<String>,
}

impl Request {
    pub fn header(&self, name: &str) -> Option<&str> {
        self.headers.iter().find(|(found, _)| found == name).map(|(_, value)| value.as_str())
    }
}

/// The requests in each of these streams, up to the first that is an upgrade, a CONNECT, not whole or none at all.
pub fn read<S: AsRef<[u8]>>(streams: impl IntoIterator<Item = S>) -> anyhow::Result<Vec<Vec<Request>>> {
    let streams: Vec<String> = streams.into_iter().map(|bytes| BASE64_STANDARD.encode(bytes)).collect();
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("data/readers/http1.py");
    let mut reader = Command::new("python3")
        .arg(script)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .context("can't run python3")?;
    reader.stdin.take().context("no standard input")?.write_all(&serde_json::to_vec(&streams)?)?;
    let output = reader.wait_with_output()?;
    ensure!(output.status.success(), "the second reader failed");
    Ok(serde_json::from_slice(&output.stdout)?)
}
