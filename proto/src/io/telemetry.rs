//! Structured logs on standard error, as text or JSON.

use serde::{Deserialize, Serialize};
use tracing_subscriber::EnvFilter;

/// How log records are written.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum LogFormat {
    #[default]
    Text,
    Json,
}

/// Starts logging for the process. `level` is a word such as `info`, or a filter such as
/// `info,master_agent=debug`; the libraries below (russh above all) stay at `warn` unless named.
pub fn init(format: LogFormat, level: &str) {
    let filter = EnvFilter::builder()
        .parse(format!("{level},russh=warn,hyper=warn,rustls=warn"))
        .unwrap_or_else(|_| EnvFilter::new("info,russh=warn"));
    let builder = tracing_subscriber::fmt().with_env_filter(filter).with_writer(std::io::stderr);
    let started = match format {
        LogFormat::Text => builder.with_ansi(false).try_init(),
        LogFormat::Json => builder.json().flatten_event(true).with_current_span(true).with_span_list(false).try_init(),
    };
    if started.is_err() {
        tracing::debug!("logging had been started before");
    }
}
