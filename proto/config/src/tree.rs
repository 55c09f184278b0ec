//! YAML text to a tree in which every node knows its place. Only the part of YAML that a configuration needs:
//! one document of mappings, lists and scalars. Anchors, aliases and tags are errors, so no document is larger
//! in memory than in its file; duplicate keys and deep nesting are errors too.

use std::collections::HashMap;

use granit_parser::{Event, Parser, ScalarStyle, Span, StrInput};

/// A line and a column, counted from 1.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Place {
    pub line: usize,
    pub column: usize,
}

pub(super) struct Node {
    pub place: Place,
    pub kind: Kind,
}

pub(super) enum Kind {
    /// `plain` is false for what stood in quotes or in a block.
    Scalar {
        text: String,
        plain: bool,
    },
    List(Vec<Node>),
    Map(Vec<Entry>),
    /// Nothing that can be read, and already reported.
    Bad,
}

pub(super) struct Entry {
    pub key: String,
    pub place: Place,
    pub value: Node,
}

/// Deeper than any configuration, and shallow enough to read by recursion.
const MAX_DEPTH: usize = 32;

/// Builds the tree, handing every complaint to `report`. `None` where the text is not YAML at all, which has
/// been reported then. An empty document is an empty mapping.
pub(super) fn parse(text: &str, report: &dyn Fn(Place, String)) -> Option<Node> {
    let mut builder = Builder { parser: Parser::new_from_str(text), report };
    let mut root = None;
    loop {
        let (event, place) = builder.next()?;
        match event {
            Event::StreamEnd => break,
            Event::DocumentStart(..) if root.is_some() => {
                report(place, "a second document begins here; only one is read".into());
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
            | _) => root = Some(builder.node(node, place, 0)?),
        }
    }
    let root = root.filter(|node| !node.is_null());
    Some(root.unwrap_or(Node { place: Place { line: 1, column: 1 }, kind: Kind::Map(Vec::new()) }))
}

impl Node {
    /// Whether this is YAML's null, written or left out.
    pub(super) fn is_null(&self) -> bool {
        match &self.kind {
            Kind::Scalar { text, plain } => {
                *plain && matches!(text.as_str(), "" | "~" | "null" | "Null" | "NULL")
            }
            Kind::List(_) | Kind::Map(_) | Kind::Bad => false,
        }
    }
}

struct Builder<'a> {
    parser: Parser<'a, StrInput<'a>>,
    report: &'a dyn Fn(Place, String),
}

impl<'a> Builder<'a> {
    fn next(&mut self) -> Option<(Event<'a>, Place)> {
        loop {
            match self.parser.next_event()? {
                Ok((Event::Comment(..), _)) => {}
                Ok((event, span)) => return Some((event, place(&span))),
                Err(error) => {
                    let at = error.marker();
                    (self.report)(
                        Place { line: at.line(), column: at.col() + 1 },
                        format!("not YAML: {}", error.info()),
                    );
                    return None;
                }
            }
        }
    }

    fn node(&mut self, event: Event<'a>, place: Place, depth: usize) -> Option<Node> {
        if depth > MAX_DEPTH {
            (self.report)(place, format!("nested more than {MAX_DEPTH} deep"));
            return None;
        }
        let (kind, anchor, tag) = match event {
            Event::Scalar(text, style, anchor, tag) => {
                (Kind::Scalar { text: text.into_owned(), plain: style == ScalarStyle::Plain }, anchor, tag)
            }
            Event::SequenceStart(_, anchor, tag) => (self.list(depth)?, anchor, tag),
            Event::MappingStart(_, anchor, tag) => (self.map(depth)?, anchor, tag),
            Event::Alias(_) | Event::UnresolvedAlias(_) => {
                (self.report)(place, "aliases are not supported: write the value out".into());
                return Some(Node { place, kind: Kind::Bad });
            }
            Event::StreamStart
            | Event::StreamEnd
            | Event::DocumentStart(..)
            | Event::DocumentEnd
            | Event::Anchor(..)
            | Event::SequenceEnd
            | Event::MappingEnd
            | _ => {
                (self.report)(place, "not YAML: expected a value".into());
                return None;
            }
        };
        if anchor != 0 {
            (self.report)(place, "anchors are not supported: write the value out where it is needed".into());
        }
        if let Some(tag) = tag {
            (self.report)(place, format!("tags such as {:?} are not supported", tag.original()));
        }
        Some(Node { place, kind })
    }

    fn list(&mut self, depth: usize) -> Option<Kind> {
        let mut items = Vec::new();
        loop {
            let (event, place) = self.next()?;
            if event == Event::SequenceEnd {
                return Some(Kind::List(items));
            }
            items.push(self.node(event, place, depth + 1)?);
        }
    }

    fn map(&mut self, depth: usize) -> Option<Kind> {
        let mut entries = Vec::new();
        let mut first_lines = HashMap::new();
        loop {
            let (event, place) = self.next()?;
            if event == Event::MappingEnd {
                return Some(Kind::Map(entries));
            }
            let key = self.node(event, place, depth + 1)?;
            let (event, value_place) = self.next()?;
            let value = self.node(event, value_place, depth + 1)?;
            match key.kind {
                Kind::Scalar { text, .. } => {
                    if let Some(line) = first_lines.get(&text) {
                        (self.report)(place, format!("{text:?} is given twice, first on line {line}"));
                    } else {
                        first_lines.insert(text.clone(), place.line);
                        entries.push(Entry { key: text, place, value });
                    }
                }
                Kind::List(_) | Kind::Map(_) => (self.report)(place, "a field's name must be a word".into()),
                Kind::Bad => {}
            }
        }
    }
}

fn place(span: &Span) -> Place {
    Place { line: span.start.line(), column: span.start.col() + 1 }
}
