//! Parses YAML into a tree in which every node knows its location. It accepts only the part of YAML that a configuration
//! needs: one document of mappings, lists and scalars. Anchors, aliases and tags are errors, so that a small file can't
//! become a large tree; duplicate keys and deep nesting are errors, too.

use std::collections::HashMap;

use granit_parser::{Event, Parser, ScalarStyle, Span, StrInput};

/// A line and a column, counted from 1.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Location {
    pub line: usize,
    pub column: usize,
}

pub(super) struct Node {
    pub location: Location,
    pub kind: Kind,
}

pub(super) enum Kind {
    /// `plain` is false for text in quotes or in a block.
    Scalar {
        text: String,
        plain: bool,
    },
    List(Vec<Node>),
    Map(Vec<Entry>),
    /// A value that can't be read, which has been reported.
    Bad,
    /// Stands for every value while a configuration is described.
    Any,
}

/// The value of every field of a configuration that is described.
pub(super) static ANY: Node = Node { location: Location { line: 1, column: 1 }, kind: Kind::Any };

pub(super) struct Entry {
    pub key: String,
    pub location: Location,
    pub value: Node,
}

/// The deepest nesting: deeper than any configuration, and shallow enough to be read by recursion.
const MAX_DEPTH: usize = 32;

/// Builds the tree and hands every mistake to `report`. `None` means that the text is not YAML, which has been reported.
/// An empty document is an empty mapping.
pub(super) fn parse(text: &str, report: &dyn Fn(Location, String)) -> Option<Node> {
    let mut builder = Builder { parser: Parser::new_from_str(text), report };
    let mut root = None;
    loop {
        let (event, location) = builder.next()?;
        match event {
            Event::StreamEnd => break,
            Event::DocumentStart(..) if root.is_some() => {
                report(location, "a second document begins here; only one is read".into());
                return None;
            }
            Event::StreamStart | Event::DocumentStart(..) | Event::DocumentEnd => {}
            node @ (Event::Scalar(..)
            | Event::SequenceStart(..)
            | Event::SequenceEnd
            | Event::MappingStart(..)
            | Event::MappingEnd
            | Event::Alias(_)
            | Event::UnresolvedAlias(_)
            | Event::Anchor(..)
            | _) => root = Some(builder.node(node, location, 0)?),
        }
    }
    let root = root.filter(|node| !node.is_null());
    Some(root.unwrap_or(Node { location: Location { line: 1, column: 1 }, kind: Kind::Map(Vec::new()) }))
}

impl Node {
    /// Whether this is YAML's null, whether written or left out.
    pub(super) fn is_null(&self) -> bool {
        match &self.kind {
            Kind::Scalar { text, plain } => {
                *plain && matches!(text.as_str(), "" | "~" | "null" | "Null" | "NULL")
            }
            Kind::List(_) | Kind::Map(_) | Kind::Bad | Kind::Any => false,
        }
    }
}

struct Builder<'a> {
    parser: Parser<'a, StrInput<'a>>,
    report: &'a dyn Fn(Location, String),
}

impl<'a> Builder<'a> {
    fn next(&mut self) -> Option<(Event<'a>, Location)> {
        loop {
            match self.parser.next_event()? {
                Ok((Event::Comment(..), _)) => {}
                Ok((event, span)) => return Some((event, location(&span))),
                Err(error) => {
                    let at = error.marker();
                    (self.report)(
                        Location { line: at.line(), column: at.col() + 1 },
                        format!("not YAML: {}", error.info()),
                    );
                    return None;
                }
            }
        }
    }

    fn node(&mut self, event: Event<'a>, location: Location, depth: usize) -> Option<Node> {
        if depth > MAX_DEPTH {
            (self.report)(location, format!("nested more than {MAX_DEPTH} deep"));
            return None;
        }
        let (kind, anchor, tag) = match event {
            Event::Scalar(text, style, anchor, tag) => {
                (Kind::Scalar { text: text.into_owned(), plain: style == ScalarStyle::Plain }, anchor, tag)
            }
            Event::SequenceStart(_, anchor, tag) => (self.list(depth)?, anchor, tag),
            Event::MappingStart(_, anchor, tag) => (self.map(depth)?, anchor, tag),
            Event::Alias(_) | Event::UnresolvedAlias(_) => {
                (self.report)(location, "aliases are not supported: write the value out".into());
                return Some(Node { location, kind: Kind::Bad });
            }
            Event::StreamStart
            | Event::StreamEnd
            | Event::DocumentStart(..)
            | Event::DocumentEnd
            | Event::Anchor(..)
            | Event::SequenceEnd
            | Event::MappingEnd
            | _ => {
                (self.report)(location, "not YAML: expected a value".into());
                return None;
            }
        };
        if anchor != 0 {
            (self.report)(
                location,
                "anchors are not supported: write the value out where it is needed".into(),
            );
        }
        if let Some(tag) = tag {
            (self.report)(location, format!("tags such as {:?} are not supported", tag.original()));
        }
        Some(Node { location, kind })
    }

    fn list(&mut self, depth: usize) -> Option<Kind> {
        let mut items = Vec::new();
        loop {
            let (event, location) = self.next()?;
            if event == Event::SequenceEnd {
                return Some(Kind::List(items));
            }
            items.push(self.node(event, location, depth + 1)?);
        }
    }

    fn map(&mut self, depth: usize) -> Option<Kind> {
        let mut entries = Vec::new();
        let mut first_lines = HashMap::new();
        loop {
            let (event, location) = self.next()?;
            if event == Event::MappingEnd {
                return Some(Kind::Map(entries));
            }
            let key = self.node(event, location, depth + 1)?;
            let (event, value_location) = self.next()?;
            let value = self.node(event, value_location, depth + 1)?;
            match key.kind {
                Kind::Scalar { text, .. } => {
                    if let Some(line) = first_lines.get(&text) {
                        (self.report)(location, format!("{text:?} is given twice, first on line {line}"));
                    } else {
                        first_lines.insert(text.clone(), location.line);
                        entries.push(Entry { key: text, location, value });
                    }
                }
                Kind::List(_) | Kind::Map(_) => {
                    (self.report)(location, "a field's name must be a word".into())
                }
                Kind::Bad | Kind::Any => {}
            }
        }
    }
}

fn location(span: &Span) -> Location {
    Location { line: span.start.line(), column: span.start.col() + 1 }
}
