//! The file that sets every field to its default.

use std::{path::Path, time::Duration};

use crate::{Section, Source, defaults, defaults::quoted, describe, parse};

fn read(s: &Section<'_>) -> Option<bool> {
    s.document(&[
        ("wait", "How long it waits."),
        ("mode", "The mode."),
        ("share", "The share."),
        ("file", "The file."),
        ("tuning", "The tuning."),
        ("server", "The server."),
        ("numbers", "The numbers."),
    ]);
    let wait = s.duration("wait", Duration::from_secs(5), Duration::ZERO..=Duration::from_secs(60));
    s.or("mode", crate::Mode(0o660));
    s.or("share", 1.0f64);
    s.file("file");
    s.section_or_default("tuning", |s| {
        s.document(&[("fast", "Whether it is fast.")]);
        s.or("fast", false)
    });
    s.section("server", |s| {
        s.document(&[("name", "Its name.")]);
        s.required::<String>("name")
    });
    s.list::<usize>("numbers");
    Some(wait == Duration::from_secs(5))
}

#[test]
fn every_field_is_shown_and_what_is_optional_is_commented() {
    let expected = "\
# Every field and its default. A field that has no default is commented out, and so is a section that may be absent:
# remove the # that stands directly before it.

# How long it waits. From 0s to 1m.
wait: 5s

# The mode.
mode: \"0660\"

# The share.
share: 1.0

# The file.
#file: \"path\"

# The tuning.
tuning:
  # Whether it is fast.
  fast: false

# The server.
#server:
#  # Its name. Required.
#  #name: \"text\"

# The numbers.
#numbers: [1]
";
    assert_eq!(defaults(&describe(read)), expected);
}

#[test]
fn the_file_is_read_as_the_defaults() {
    let text = defaults(&describe(read));
    let source = Source { origin: "defaults", base_dir: Path::new("/base"), check_files: false };
    assert_eq!(parse(&text, source, read).map_err(|errors| errors.to_string()), Ok(true));
}

#[test]
fn texts_are_quoted_where_yaml_would_read_something_else() {
    for (text, expected) in [
        ("127.0.0.1:9070", "127.0.0.1:9070"),
        ("/run/a.sock", "/run/a.sock"),
        ("[::]:22", "\"[::]:22\""),
        ("0660", "\"0660\""),
        ("true", "\"true\""),
        ("", "\"\""),
        ("a b", "\"a b\""),
    ] {
        assert_eq!(quoted(text), expected);
    }
}
