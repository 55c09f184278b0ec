//! The description of a configuration, and how it is recorded while its readers run.

use std::{cell::RefCell, fmt, time::Duration};

/// How a single value is written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Shape {
    Boolean,
    Integer,
    Number,
    /// A TCP port from 0 to 65535.
    Port,
    /// TCP ports: a port, a range of ports, or a list of both.
    Ports,
    /// One of these words.
    Words(&'static [&'static str]),
    /// Text in a form that `name` states, such as `ADDRESS:PORT`. The pattern is a regular expression for a JSON Schema,
    /// which may accept more than the reader does.
    Text {
        name: &'static str,
        pattern: Option<&'static str>,
    },
}

impl Shape {
    /// Text in a form that no pattern states.
    pub const fn text(name: &'static str) -> Self {
        Self::Text { name, pattern: None }
    }
}

/// The kind of value that a field holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FieldKind {
    Value(Shape),
    /// A section of the fields in [`Field::fields`].
    Section,
    /// A section with exactly one of the fields in [`Field::fields`].
    Choice,
    /// A list, whose element is the only one of [`Field::fields`].
    List,
}

/// A field of a configuration.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Field {
    /// Its name in its section. The element of a list is called `[]`.
    pub name: String,
    /// What it means, in whole sentences.
    pub about: &'static str,
    pub kind: FieldKind,
    /// The value of an absent field, as its reader would read it. An absent section with a default is read as an empty one.
    pub default: Option<String>,
    /// The least and the greatest value.
    pub range: Option<(String, String)>,
    pub required: bool,
    pub fields: Vec<Field>,
}

impl Field {
    fn new(name: &str) -> Self {
        Self {
            name: name.to_owned(),
            about: "",
            kind: FieldKind::Value(Shape::text("text")),
            default: None,
            range: None,
            required: false,
            fields: Vec::new(),
        }
    }
}

/// Collects fields by their path, in the order in which they are first named.
#[derive(Default)]
pub(super) struct Recorder(RefCell<Vec<(String, Field)>>);

impl Recorder {
    /// Changes what is known of a field. Several calls for one field add to each other.
    pub(super) fn record(&self, path: &str, change: impl FnOnce(&mut Field)) {
        let mut fields = self.0.borrow_mut();
        if let Some((_, field)) = fields.iter_mut().find(|(other, _)| other == path) {
            return change(field);
        }
        let mut field = Field::new(path);
        change(&mut field);
        fields.push((path.to_owned(), field));
    }

    pub(super) fn into_fields(self) -> Vec<Field> {
        children(&self.0.into_inner(), "")
    }
}

fn children(all: &[(String, Field)], parent: &str) -> Vec<Field> {
    let child = |(path, field): &(String, Field)| {
        let name = name_in(path, parent)?.to_owned();
        Some(Field { name, fields: children(all, path), ..field.clone() })
    };
    all.iter().filter_map(child).collect()
}

/// The name of the field `path` if it belongs to `parent` itself, rather than to a section of it.
fn name_in<'p>(path: &'p str, parent: &str) -> Option<&'p str> {
    let rest = path.strip_prefix(parent)?;
    if rest == "[]" {
        return Some(rest);
    }
    let name = if parent.is_empty() { rest } else { rest.strip_prefix('.')? };
    (!name.is_empty() && !name.contains(['.', '['])).then_some(name)
}

/// Shows a duration in the greatest unit that needs no fraction, as an operator would write it.
pub(super) struct Written(pub Duration);

impl fmt::Display for Written {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let millis = self.0.as_millis();
        let units = [(3_600_000, "h"), (60_000, "m"), (1000, "s")];
        match units.into_iter().find(|(unit, _)| millis > 0 && millis.is_multiple_of(*unit)) {
            Some((unit, name)) => write!(f, "{}{name}", millis / unit),
            None if millis == 0 => f.write_str("0s"),
            None => write!(f, "{millis}ms"),
        }
    }
}
