//! Structured logs on standard error, as text or JSON.

use tracing_subscriber::EnvFilter;

pub use proto_config::LogFormat;

const QUIET: &str = "russh=error,russh::server::encrypted=warn,hyper=warn,rustls=warn,kube_client=error";

/// Starts logging for the process. `level` is a word such as `info`, or a filter such as `info,master_agent=debug`, which
/// may also name the libraries that are quiet by default. Most warnings of russh are about what any peer may send as often
/// as it likes, so only those that say why a certificate was refused are logged.
pub fn init(format: LogFormat, level: &str) {
    let filter = EnvFilter::builder()
        .parse(format!("{QUIET},{level}"))
        .unwrap_or_else(|_| EnvFilter::new(format!("{QUIET},info")));
    let builder = tracing_subscriber::fmt().with_env_filter(filter).with_writer(std::io::stderr);
    let started = match format {
        LogFormat::Text => builder.with_ansi(false).try_init(),
        // The module's name would be a second field `target`.
        LogFormat::Json => builder
            .json()
            .with_target(false)
            .flatten_event(true)
            .with_current_span(true)
            .with_span_list(false)
            .try_init(),
    };
    if started.is_err() {
        tracing::debug!("logging had been started before");
    }
}
