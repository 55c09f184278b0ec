//! The structured logs of an agent on standard error, as text or JSON. A thread of its own writes them
//! (`log_writer.rs`), so that whoever reads them can't hold up the agent.

use std::{
    backtrace::{Backtrace, BacktraceStatus},
    fmt::{Display, Write as _},
    fs::File,
    io,
    os::fd::AsFd,
    panic::{self, PanicHookInfo},
    thread,
    time::{Duration, SystemTime},
};

use prometheus_client::{metrics::counter::Counter, registry::Registry};
use serde_json::{Map, Value};
use tracing::{Dispatch, Level};
use tracing_subscriber::{EnvFilter, util::SubscriberInitExt};

pub use proto_config::LogFormat;

use super::log_writer::{Bounds, LogQueue};

const QUIET: &str = "russh=error,russh::server::encrypted=warn,hyper=warn,rustls=warn,kube_client=error";
/// The lines that wait while nobody reads the log: those of some seconds on a busy agent.
const BOUNDS: Bounds = Bounds { bytes: 2 << 20, lines: 16_384 };
/// How long the end of the process waits for the log to be written.
const FLUSH_TIMEOUT: Duration = Duration::from_secs(1);

/// The log of the process. When this is dropped, it waits for a short time until all lines are written, so `main` holds
/// it to the end.
#[must_use]
pub struct Logs(LogQueue);

/// Counts the lines that are missing in the log.
#[derive(Clone, Debug, Default)]
pub struct LinesLost(Counter);

impl Logs {
    /// Starts logging for the process. `level` is a word such as `info`, or a filter such as `info,master_agent=debug`,
    /// which may also name the libraries that are quiet by default. Most warnings of russh are about what any peer may
    /// send as often as it likes, so only those that say why a certificate was refused are logged.
    pub fn start(format: LogFormat, level: &str) -> io::Result<Self> {
        // With a copy of the descriptor, a write that blocks holds no lock of the standard library.
        let output = File::from(io::stderr().as_fd().try_clone_to_owned()?);
        let queue = LogQueue::start(output, BOUNDS, move |lines| lost_line(format, lines))?;
        log_panics(format, queue.clone());
        if dispatch(format, level, queue.clone()).try_init().is_err() {
            tracing::debug!("logging had been started before");
        }
        Ok(Self(queue))
    }

    /// Prints a line that is not a record of the log, such as the error that ends the process.
    pub fn print(&self, text: impl Display) {
        self.0.append(format!("{text}\n").as_bytes(), true);
    }

    pub fn lines_lost(&self) -> LinesLost {
        LinesLost(self.0.lost())
    }
}

impl Drop for Logs {
    fn drop(&mut self) {
        self.0.flush(FLUSH_TIMEOUT);
    }
}

impl LinesLost {
    pub fn register(&self, r: &mut Registry) {
        r.register("log_lines_lost", "Log lines that could not be written", self.0.clone());
    }
}

fn dispatch(format: LogFormat, level: &str, queue: LogQueue) -> Dispatch {
    let filter = EnvFilter::builder()
        .parse(format!("{QUIET},{level}"))
        .unwrap_or_else(|_| EnvFilter::new(format!("{QUIET},info")));
    let builder = tracing_subscriber::fmt().with_env_filter(filter).with_writer(queue);
    match format {
        LogFormat::Text => Dispatch::new(builder.with_ansi(false).finish()),
        // The module's name would be a second field `target`.
        LogFormat::Json => Dispatch::new(
            builder
                .json()
                .with_target(false)
                .flatten_event(true)
                .with_current_span(true)
                .with_span_list(false)
                .finish(),
        ),
    }
}

/// Logs panics, whatever the filter is. The standard library's hook would wait for the reader of the log without end.
fn log_panics(format: LogFormat, queue: LogQueue) {
    let direct = panic::take_hook();
    panic::set_hook(Box::new(move |info| {
        if queue.is_writer() {
            return direct(info);
        }
        queue.append(panic_line(format, info).as_bytes(), true);
        // The process may be about to abort.
        queue.flush(FLUSH_TIMEOUT);
    }));
}

fn panic_line(format: LogFormat, info: &PanicHookInfo<'_>) -> String {
    let thread = thread::current();
    let name = thread.name().unwrap_or("unnamed");
    let mut fields: Vec<(&str, Value)> = vec![("thread", name.into()), ("panic", info.to_string().into())];
    let backtrace = Backtrace::capture();
    if backtrace.status() == BacktraceStatus::Captured {
        fields.push(("backtrace", backtrace.to_string().into()));
    }
    line(format, Level::ERROR, "thread panicked", &fields)
}

fn lost_line(format: LogFormat, lines: u64) -> String {
    line(format, Level::WARN, "log lines lost", &[("lines", lines.into())])
}

/// Formats a line in the same way as the subscriber, but without it: the thread that writes must not append lines, and a
/// panic may have happened inside the subscriber.
fn line(format: LogFormat, level: Level, message: &str, fields: &[(&str, Value)]) -> String {
    let time = humantime::format_rfc3339_micros(SystemTime::now()).to_string();
    match format {
        LogFormat::Text => {
            let mut line = format!("{time} {:>5} {}: {message}", level.as_str(), module_path!());
            for (name, value) in fields {
                // Writing to a string does not fail.
                let _ = match value.as_str() {
                    Some(text) => write!(line, " {name}={text:?}"),
                    None => write!(line, " {name}={value}"),
                };
            }
            line + "\n"
        }
        LogFormat::Json => {
            let head: [(&str, Value); 3] =
                [("timestamp", time.into()), ("level", level.as_str().into()), ("message", message.into())];
            let all = head.iter().chain(fields).map(|(name, value)| ((*name).to_owned(), value.clone()));
            format!("{}\n", Value::Object(all.collect::<Map<String, Value>>()))
        }
    }
}

#[cfg(test)]
mod tests {
    use tracing::dispatcher;

    use super::*;
    use crate::log_writer::tests::{Pipe, ROOMY, start};

    const LONG: Duration = Duration::from_secs(60);

    #[test]
    fn lines_of_its_own_look_like_those_of_events() {
        let panic = "a \"b\"\n\u{1b}c";
        let fields: [(&str, Value); 2] = [("lines", 5.into()), ("panic", panic.into())];
        let without_time = |line: &str| line.split_once(' ').unwrap().1.to_owned();
        let members = |line: &str| {
            let mut members: Map<String, Value> = serde_json::from_str(line).unwrap();
            let time = members.remove("timestamp").unwrap();
            assert_eq!(time.as_str().unwrap().len(), "2026-01-01T00:00:00.000000Z".len());
            members
        };
        for format in [LogFormat::Text, LogFormat::Json] {
            let pipe = Pipe::default();
            let queue = start(&pipe, ROOMY);
            dispatcher::with_default(&dispatch(format, "info", queue.clone()), || {
                tracing::warn!(target: "proto_net::telemetry", lines = 5, panic, "log lines lost");
            });
            assert!(queue.flush(LONG));
            let own = line(format, Level::WARN, "log lines lost", &fields);
            let of_event = pipe.text();
            match format {
                LogFormat::Text => assert_eq!(without_time(&own), without_time(&of_event)),
                LogFormat::Json => assert_eq!(members(&own), members(&of_event)),
            }
        }
    }
}
