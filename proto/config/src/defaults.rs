//! Writes a described configuration as a commented YAML file with every field and its default.

use super::description::{Field, FieldKind, Shape};

/// The longest line of prose, without its indentation.
const WIDTH: usize = 100;

const HEADER: &str = "\
# Every field and its default. A field that has no default is commented out, and so is a section that may be absent:
# remove the # that stands directly before it.
";

/// The text of a configuration that sets every field to its default. What has no default is commented out, with `#`
/// directly before the field; `# ` begins prose. Removing the `#` of a commented section enables the section and leaves
/// what is optional inside it commented.
pub fn defaults(fields: &[Field]) -> String {
    let mut text = HEADER.to_owned();
    for field in fields {
        text.push('\n');
        for line in lines(field) {
            text.push_str(&line);
            text.push('\n');
        }
    }
    text
}

fn lines(field: &Field) -> Vec<String> {
    let mut lines = prose(field);
    let body = body(field);
    if is_enabled(field) {
        lines.extend(body);
    } else {
        lines.extend(body.into_iter().map(|line| format!("#{line}")));
    }
    lines
}

/// Whether the field is set in the file. A section without a field that is set has no value, and so it is not set either.
fn is_enabled(field: &Field) -> bool {
    match field.kind {
        FieldKind::Value(_) | FieldKind::List => field.default.is_some(),
        FieldKind::Section => field.default.is_some() && field.fields.iter().any(is_enabled),
        FieldKind::Choice => false,
    }
}

/// The field and all that is in it.
fn body(field: &Field) -> Vec<String> {
    let name = &field.name;
    let indented = |lines: Vec<String>| lines.into_iter().map(|line| format!("  {line}"));
    match field.kind {
        FieldKind::Value(shape) => vec![format!("{name}: {}", value(field, shape))],
        FieldKind::Section | FieldKind::Choice => {
            let mut all = vec![format!("{name}:")];
            all.extend(field.fields.iter().flat_map(|inner| indented(lines(inner))));
            all
        }
        FieldKind::List => match (&field.default, field.fields.as_slice()) {
            (Some(default), _) => vec![format!("{name}: {default}")],
            (None, [element]) => list(name, element),
            (None, _) => vec![format!("{name}: []")],
        },
    }
}

fn list(name: &str, element: &Field) -> Vec<String> {
    let item = |inner: Vec<String>| {
        std::iter::once("  -".to_owned()).chain(inner.into_iter().map(|line| format!("    {line}")))
    };
    match element.kind {
        FieldKind::Value(shape) => vec![format!("{name}: [{}]", placeholder(shape))],
        FieldKind::Section => {
            let inner = element.fields.iter().flat_map(lines).collect();
            std::iter::once(format!("{name}:")).chain(item(inner)).collect()
        }
        FieldKind::Choice => {
            let mut all = vec![format!("{name}:")];
            for alternative in &element.fields {
                let mut inner = prose(alternative);
                inner.extend(body(alternative));
                all.extend(item(inner));
            }
            all
        }
        FieldKind::List => vec![format!("{name}: []")],
    }
}

/// The meaning of a field and what values it takes, as comments.
fn prose(field: &Field) -> Vec<String> {
    let mut text = field.about.to_owned();
    let mut add = |sentence: String| {
        if !text.is_empty() {
            text.push(' ');
        }
        text.push_str(&sentence);
    };
    if field.required {
        add("Required.".to_owned());
    }
    if let FieldKind::Value(Shape::Words(words)) = field.kind {
        add(format!("One of {}.", words.join(", ")));
    }
    if let Some((least, greatest)) = &field.range {
        add(format!("From {least} to {greatest}."));
    }
    wrapped(&text).into_iter().map(|line| format!("# {line}")).collect()
}

fn wrapped(text: &str) -> Vec<String> {
    let mut lines: Vec<String> = Vec::new();
    for word in text.split_whitespace() {
        match lines.last_mut() {
            Some(line) if line.len() + 1 + word.len() <= WIDTH => {
                line.push(' ');
                line.push_str(word);
            }
            Some(_) | None => lines.push(word.to_owned()),
        }
    }
    lines
}

fn value(field: &Field, shape: Shape) -> String {
    match &field.default {
        Some(default) => scalar(default, shape),
        None => placeholder(shape),
    }
}

/// A value as YAML has it.
fn scalar(text: &str, shape: Shape) -> String {
    match shape {
        Shape::Boolean | Shape::Integer | Shape::Port | Shape::Ports | Shape::Words(_) => text.to_owned(),
        Shape::Number if text.contains('.') => text.to_owned(),
        Shape::Number => format!("{text}.0"),
        Shape::Text { .. } => quoted(text),
    }
}

/// Quotes a text that YAML would take for anything else.
pub(super) fn quoted(text: &str) -> String {
    let plain = |c: char| c.is_ascii_alphanumeric() || matches!(c, '_' | '.' | '/' | ':' | '-');
    let is_word =
        text.starts_with(|c: char| c.is_ascii_alphanumeric() || c == '/') && text.chars().all(plain);
    let is_other =
        text.parse::<f64>().is_ok() || matches!(text, "true" | "false" | "null") || text.ends_with(':');
    if is_word && !is_other { text.to_owned() } else { format!("{text:?}") }
}

fn placeholder(shape: Shape) -> String {
    match shape {
        Shape::Boolean => "true".to_owned(),
        Shape::Integer | Shape::Port | Shape::Ports => "1".to_owned(),
        Shape::Number => "1.0".to_owned(),
        Shape::Words(words) => words.first().copied().unwrap_or_default().to_owned(),
        Shape::Text { name, .. } => format!("{name:?}"),
    }
}
