//! The `front_end.audit` section of the configuration.

use std::{path::PathBuf, time::Duration};

use proto_config::{Meanings, Section};

/// The `audit` section.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct AuditConfig {
    /// The file of the log. `None` means standard output.
    pub file: Option<PathBuf>,
    /// The maximum size of the file. A file that would become larger is renamed to `FILE.1`.
    pub max_bytes: u64,
    /// The number of renamed files that are kept.
    pub keep: usize,
    /// The maximum number of waiting lines, including those of requests in progress.
    pub queue: usize,
    /// The same maximum for unauthenticated callers.
    pub unauthenticated_queue: usize,
    /// How long a request may wait for room in its queue.
    pub wait: Duration,
    pub on_full: OnFull,
}

/// The treatment of a request whose line has no room.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum OnFull {
    /// The request is answered 503.
    Refuse,
    /// The request is served, and its line is lost.
    Drop,
}

const FIELDS: Meanings = &[
    ("file", "The file of the log. By default, standard output."),
    ("max_megabytes", "A larger file is renamed to FILE.1."),
    ("keep", "Renamed files that are kept."),
    ("queue", "Lines that wait to be written, those of requests in progress included."),
    ("strangers_queue", "The same for unauthenticated callers."),
    ("wait", "How long a request waits while the queue is full."),
    (
        "on_full",
        "What happens to a request that finds the queue full after wait: refuse answers 503, drop serves it unrecorded.",
    ),
];

impl AuditConfig {
    pub fn read(section: &Section<'_>) -> Self {
        section.document(FIELDS);
        let millis = Duration::from_millis;
        let on_full = section.word("on_full", &["refuse", "drop"]);
        section.states_default("on_full", "refuse");
        Self {
            file: section.optional("file"),
            max_bytes: (section.number("max_megabytes", 100, 1..=100_000) as u64) << 20,
            keep: section.number("keep", 10, 1..=1000),
            queue: section.number("queue", 4096, 1..=1_000_000),
            unauthenticated_queue: section.number("strangers_queue", 1024, 1..=1_000_000),
            wait: section.duration("wait", millis(100), Duration::ZERO..=millis(5000)),
            on_full: if on_full == Some("drop") { OnFull::Drop } else { OnFull::Refuse },
        }
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use proto_config::{Source, parse};

    use super::*;

    #[test]
    fn every_field_is_read_and_bounded() {
        let read = |text: &str| {
            let source = Source { origin: "test", base_dir: Path::new("/var"), check_files: false };
            parse(text, source, |section| section.section("audit", |s| Some(AuditConfig::read(s))))
        };
        let defaults = read("audit: {}").unwrap();
        assert_eq!((defaults.file, defaults.max_bytes, defaults.keep), (None, 100 << 20, 10));
        assert_eq!(
            (defaults.queue, defaults.unauthenticated_queue, defaults.on_full),
            (4096, 1024, OnFull::Refuse)
        );
        let all = "audit: {file: audit.log, max_megabytes: 1, keep: 2, queue: 3, strangers_queue: 4, wait: 0s, on_full: drop}";
        let expected = AuditConfig {
            file: Some("/var/audit.log".into()),
            max_bytes: 1 << 20,
            keep: 2,
            queue: 3,
            unauthenticated_queue: 4,
            wait: Duration::ZERO,
            on_full: OnFull::Drop,
        };
        assert_eq!(read(all).unwrap(), expected);
        for wrong in [
            "{on_full: wait}",
            "{strangers_queue: 0}",
            "{keep: 0}",
            "{queue: 0}",
            "{wait: 1m}",
            "{files: x}",
            "{max_megabytes: 0}",
        ] {
            read(&format!("audit: {wrong}")).unwrap_err();
        }
    }
}
