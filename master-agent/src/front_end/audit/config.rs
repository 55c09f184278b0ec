//! The `front_end.audit` section of the configuration.

use std::{path::PathBuf, time::Duration};

use proto_config::Section;

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct AuditConfig {
    /// Standard output if `None`.
    pub file: Option<PathBuf>,
    /// A file that would grow beyond these bytes is renamed to `FILE.1`.
    pub max_bytes: u64,
    /// How many renamed files are kept.
    pub keep: usize,
    /// Lines that may wait to be written, including those of requests under way.
    pub queue: usize,
    /// The same for callers who have not authenticated.
    pub unauthenticated_queue: usize,
    /// How long a request may wait for room in its queue.
    pub wait: Duration,
    pub on_full: OnFull,
}

/// What becomes of a request whose line has no room.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum OnFull {
    /// The request is answered 503.
    Refuse,
    /// The request is served, and its line is lost.
    Drop,
}

impl AuditConfig {
    pub fn read(section: &Section<'_>) -> Self {
        let millis = Duration::from_millis;
        Self {
            file: section.optional("file"),
            max_bytes: (section.number("max_megabytes", 100, 1..=100_000) as u64) << 20,
            keep: section.number("keep", 10, 1..=1000),
            queue: section.number("queue", 4096, 1..=1_000_000),
            unauthenticated_queue: section.number("strangers_queue", 1024, 1..=1_000_000),
            wait: section.duration("wait", millis(100), Duration::ZERO..=millis(5000)),
            on_full: match section.or("on_full", "refuse".to_owned()).as_str() {
                "refuse" => OnFull::Refuse,
                "drop" => OnFull::Drop,
                _ => {
                    section.error("on_full", "expected refuse or drop");
                    OnFull::Refuse
                }
            },
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
