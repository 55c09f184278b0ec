//! The section `log` of both agents' configurations.

use std::fmt;

use serde::{Deserialize, Serialize};

use super::{
    description::Shape,
    section::{At, Meanings, Section, Value},
};

/// How log records are written.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum LogFormat {
    #[default]
    Text,
    Json,
}

/// What an agent logs, and how.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Log {
    pub format: LogFormat,
    /// A word such as `info`, or a filter such as `info,proto=debug`.
    pub level: String,
}

const FIELDS: Meanings = &[
    ("format", "How log records are written."),
    ("level", "A level (error, warn, info, debug, trace), or a filter such as info,proto=debug."),
];

impl Log {
    pub fn read(section: &Section<'_>) -> Self {
        section.document(FIELDS);
        let level = section.or("level", "info".to_owned());
        if let Err(error) = tracing_subscriber::EnvFilter::builder().parse(&level) {
            section.error("level", format!("is no log level or filter: {error}"));
        }
        Self { format: section.or("format", LogFormat::Text), level }
    }
}

impl fmt::Display for LogFormat {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Text => "text",
            Self::Json => "json",
        })
    }
}

impl Value for LogFormat {
    const SHAPE: Shape = Shape::Words(&["text", "json"]);

    fn read(at: &At<'_>) -> Option<Self> {
        match at.scalar("text or json")? {
            ("text", _) => Some(Self::Text),
            ("json", _) => Some(Self::Json),
            (text, _) => at.complain(text, "expected text or json"),
        }
    }
}
