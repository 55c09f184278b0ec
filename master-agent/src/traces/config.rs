//! The `traces` section of the configuration.

use std::{
    collections::HashMap,
    fs,
    path::{Path, PathBuf},
    time::Duration,
};

use anyhow::{Context, bail};
use hyper::{
    Uri,
    header::{HeaderName, HeaderValue},
};
use proto_config::{Meanings, Section, secret_file};
use proto_net::tls::ClientTls;

use crate::fields::{WAIT, secs, verified_or_loopback};

/// The largest headers file.
const MAX_HEADERS_FILE: u64 = 64 * 1024;

#[derive(Clone, Debug, PartialEq)]
pub struct TracesConfig {
    /// Where spans are posted (OTLP over HTTP, binary protobuf).
    pub endpoint: Uri,
    pub tls: ClientTls,
    /// A file with lines `NAME: VALUE`, which every request has as headers, for instance an authorization.
    pub headers_file: Option<PathBuf>,
    /// The share of traces that is sent, from 0 to 1.
    pub sample_ratio: f64,
    pub service_name: String,
    /// How long a request to the collector may take.
    pub timeout: Duration,
    /// Spans that may wait to be sent; further ones are lost.
    pub queue: usize,
}

impl Eq for TracesConfig {}

const FIELDS: Meanings = &[
    (
        "endpoint",
        "Where spans are posted (OTLP over HTTP): https://HOST:4318/v1/traces, or http:// on loopback only.",
    ),
    ("ca", "The CA of the collector's certificate. By default, the CAs of the system."),
    ("cert", "A client certificate for the collector. It needs key."),
    ("key", "The key of cert, with mode 0600 or 0640."),
    (
        "headers_file",
        "A file with one header per line (NAME: VALUE), sent with every request, for example an \
         authorization. Its mode is 0600 or 0640.",
    ),
    ("sample_ratio", "The share of traces that is sent, from 0 to 1."),
    ("service_name", "The name of this agent in traces."),
    ("timeout", "Time for one request to the collector."),
    ("queue", "Spans that wait to be sent. Further ones are lost."),
];

impl TracesConfig {
    pub fn read(s: &Section<'_>) -> Option<Self> {
        s.document(FIELDS);
        let (cert, key) = (s.file("cert"), s.private_file("key"));
        if cert.is_some() != key.is_some() {
            s.section_error("cert and key go together: give both or none");
        }
        let sample_ratio = s.or("sample_ratio", 1.0);
        if !(0.0..=1.0).contains(&sample_ratio) {
            s.error("sample_ratio", "must be from 0 to 1");
        }
        let headers_file = s.private_file("headers_file");
        if let (Some(path), Some(at)) = (&headers_file, s.at("headers_file"))
            && path.is_file()
            && let Err(error) = read_headers(path)
        {
            at.error(format!("{error:#}"));
        }
        Some(Self {
            tls: ClientTls { ca: s.file("ca"), identity: cert.zip(key) },
            headers_file,
            sample_ratio,
            service_name: s.or("service_name", "master-agent".to_owned()),
            timeout: s.duration("timeout", secs(10), WAIT),
            queue: s.number("queue", 4096, 1..=1_000_000),
            endpoint: endpoint(s)?,
        })
    }

    pub fn headers(&self) -> anyhow::Result<HashMap<String, String>> {
        self.headers_file.as_deref().map_or_else(|| Ok(HashMap::new()), read_headers)
    }
}

fn endpoint(s: &Section<'_>) -> Option<Uri> {
    let at = s.required_at("endpoint")?;
    let text = at.text()?;
    let uri = text.parse::<Uri>().ok().filter(|uri| uri.host().is_some() && uri.query().is_none());
    let Some(uri) = uri.filter(|uri| uri.path().len() > 1) else {
        at.error(format!("{text:?}: expected https://HOST:4318/v1/traces"));
        return None;
    };
    verified_or_loopback(&at, uri)
}

/// Reads a headers file. The values are secrets, so errors never show them.
pub(super) fn read_headers(path: &Path) -> anyhow::Result<HashMap<String, String>> {
    let name = path.display();
    let size = fs::metadata(path).with_context(|| format!("can't read {name}"))?.len();
    if size > MAX_HEADERS_FILE {
        bail!("{name} is larger than {MAX_HEADERS_FILE} bytes");
    }
    let text = secret_file::read_given(path)?;
    let lines =
        text.lines().enumerate().filter(|(_, line)| !line.trim().is_empty() && !line.starts_with('#'));
    lines
        .map(|(at, line)| {
            let (key, value) = line
                .split_once(':')
                .filter(|(key, value)| {
                    HeaderName::try_from(*key).is_ok() && HeaderValue::from_str(value.trim()).is_ok()
                })
                .with_context(|| format!("{name} line {}: expected NAME: VALUE", at + 1))?;
            Ok((key.to_owned(), value.trim().to_owned()))
        })
        .collect()
}
