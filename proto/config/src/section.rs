//! The tree of a configuration as its readers see it: values that know their location, and sections of named fields.

use std::{
    cell::RefCell,
    fmt::Display,
    fs, io,
    net::SocketAddr,
    ops::RangeInclusive,
    path::{Path, PathBuf},
    time::Duration,
};

use super::{
    context::{Context, Listener},
    description::{Field, FieldKind, Shape, Written},
    tree::{ANY, Entry, Kind, Location, Node},
};
use crate::secret_file;

/// A type with one way of being written in a configuration.
pub trait Value: Sized {
    /// How the value is written, for descriptions.
    const SHAPE: Shape;

    /// Reads the value; `None` if the node can't be read as this type, which has then been reported.
    fn read(at: &At<'_>) -> Option<Self>;
}

/// An alternative of [`Section::one_of`]: its field and its reader.
pub type Alternative<T> = (&'static str, fn(&At<'_>) -> Option<T>);

/// What the fields of a section mean: the name of each, and whole sentences.
pub type Meanings = &'static [(&'static str, &'static str)];

/// One node of the tree, and its location.
pub struct At<'a> {
    context: &'a Context<'a>,
    pub(super) node: &'a Node,
    /// The location of the field's name, for values that have one.
    name_location: Option<Location>,
    field: String,
}

impl<'a> At<'a> {
    /// The whole document.
    pub(super) fn root(context: &'a Context<'a>, node: &'a Node) -> Self {
        Self { context, node, name_location: None, field: String::new() }
    }

    /// Reports that this value is wrong.
    pub fn error(&self, message: impl Into<String>) {
        self.context.report(self.node.location, &self.field, message.into());
    }

    /// Reports the text of this value and what is wrong with it.
    pub fn complain<T>(&self, text: &str, message: &str) -> Option<T> {
        let shown: String = text.chars().take(80).collect();
        self.error(format!("{shown:?}: {message}"));
        None
    }

    /// The line of this value, counted from 1.
    pub fn line(&self) -> usize {
        self.node.location.line
    }

    /// The directory that relative paths are relative to.
    pub fn base_dir(&self) -> &Path {
        self.context.source.base_dir
    }

    /// Reads this value as a `T`.
    pub fn read<T: Value>(&self) -> Option<T> {
        self.describe(T::SHAPE);
        T::read(self)
    }

    /// States how this value is written, for descriptions.
    fn describe(&self, shape: Shape) {
        self.context.record(&self.field, |field| field.kind = FieldKind::Value(shape));
    }

    /// The scalar's text, with quotes and escapes resolved. Anything else is reported and gives `None`.
    pub fn text(&self) -> Option<&'a str> {
        self.scalar("a text").map(|(text, _)| text)
    }

    /// The scalar's text, and whether it is written without quotes. Anything else is reported as not `expected` and
    /// gives `None`.
    pub(super) fn scalar(&self, expected: &str) -> Option<(&'a str, bool)> {
        match &self.node.kind {
            Kind::Scalar { .. } if self.node.is_null() => self.no_value(),
            Kind::Scalar { text, plain } => return Some((text, *plain)),
            Kind::List(_) => self.error(format!("expected {expected}, found a list")),
            Kind::Map(_) => self.error(format!("expected {expected}, found a section")),
            Kind::Bad | Kind::Any => {}
        }
        None
    }

    fn no_value(&self) {
        let location = self.name_location.unwrap_or(self.node.location);
        self.context.report(location, &self.field, "has no value: give it one, or remove it".into());
    }

    /// Reads this value as a section, and reports the fields that `read` did not ask for.
    pub fn section<T>(&self, read: impl FnOnce(&Section<'a>) -> Option<T>) -> Option<T> {
        match &self.node.kind {
            Kind::Map(entries) => {
                let location = self.name_location.unwrap_or(self.node.location);
                let section = Section::new(self.context, location, self.field.clone(), entries);
                let value = read(&section);
                section.report_unknown();
                return value;
            }
            Kind::Scalar { .. } if self.node.is_null() => self.no_value(),
            Kind::Scalar { .. } => self.error("expected a section of fields, found a single value"),
            Kind::List(_) => self.error("expected a section of fields, found a list"),
            Kind::Any => {
                self.context.record(&self.field, |field| field.kind = FieldKind::Section);
                return read(&Section::new(self.context, self.node.location, self.field.clone(), &[]));
            }
            Kind::Bad => {}
        }
        None
    }

    /// The elements of this list. Anything else is reported and has none.
    pub fn items(&self) -> Vec<At<'a>> {
        match &self.node.kind {
            Kind::List(items) => {
                let item = |(i, node)| {
                    let field = format!("{}[{i}]", self.field);
                    At { context: self.context, node, name_location: None, field }
                };
                return items.iter().enumerate().map(item).collect();
            }
            Kind::Scalar { .. } if self.node.is_null() => self.no_value(),
            Kind::Scalar { .. } => self.error("expected a list, found a single value"),
            Kind::Map(_) => self.error("expected a list, found a section"),
            Kind::Any => {
                self.context.record(&self.field, |field| field.kind = FieldKind::List);
                let field = format!("{}[]", self.field);
                self.context.record(&field, |_| {});
                return vec![At { context: self.context, node: &ANY, name_location: None, field }];
            }
            Kind::Bad => {}
        }
        Vec::new()
    }

    /// Whether this is a list without elements.
    pub fn is_empty_list(&self) -> bool {
        matches!(&self.node.kind, Kind::List(items) if items.is_empty())
    }

    /// A path. A relative one is resolved against the file's directory.
    pub(super) fn path(&self) -> Option<PathBuf> {
        self.describe(PathBuf::SHAPE);
        let text = self.text()?;
        if text.is_empty() || text.contains('\0') {
            self.error("is not a path");
            return None;
        }
        Some(self.base_dir().join(text))
    }

    /// A file that must be readable.
    pub fn file(&self) -> Option<PathBuf> {
        let path = self.path()?;
        self.check_file(&path, false);
        Some(path)
    }

    /// A file with secrets that [`secret_file::read_given`] accepts.
    pub fn private_file(&self) -> Option<PathBuf> {
        let path = self.path()?;
        self.check_file(&path, true);
        Some(path)
    }

    fn check_file(&self, path: &Path, private: bool) {
        if !self.context.source.check_files {
            return;
        }
        if let Err(message) = file_is_readable(path) {
            return self.error(format!("{} {message}", path.display()));
        }
        if let (true, Err(error)) = (private, secret_file::check_given(path)) {
            self.error(error.to_string());
        }
    }
}

/// Asks for the metadata before it opens the file, since opening a FIFO would wait for its writer.
fn file_is_readable(path: &Path) -> Result<(), String> {
    let unreadable = |error: std::io::Error| format!("can't be read: {error}");
    let metadata = fs::metadata(path).map_err(unreadable)?;
    if !metadata.is_file() {
        return Err("is not a file".into());
    }
    fs::File::open(path).map(drop).map_err(unreadable)
}

/// A mapping of field names to values. Each method names a field; fields that no method has named are unknown.
pub struct Section<'a> {
    context: &'a Context<'a>,
    location: Location,
    field: String,
    entries: &'a [Entry],
    known: RefCell<Vec<&'static str>>,
    /// What its fields mean; empty unless the configuration is described.
    meanings: RefCell<Vec<(&'static str, &'static str)>>,
}

impl<'a> Section<'a> {
    fn new(context: &'a Context<'a>, location: Location, field: String, entries: &'a [Entry]) -> Self {
        Self { context, location, field, entries, known: RefCell::default(), meanings: RefCell::default() }
    }

    /// States what fields mean, for descriptions. This comes before they are read.
    pub fn document(&self, meanings: Meanings) {
        if self.context.is_describing() {
            self.meanings.borrow_mut().extend(meanings);
        }
    }

    /// States that a field is required, where the reader itself reports that it is missing.
    pub fn states_required(&self, name: &str) {
        self.record(name, |field| field.required = true);
    }

    /// States the value of a field that is absent, where the reader itself supplies it.
    pub fn states_default(&self, name: &str, default: impl Display) {
        self.record(name, |field| field.default = Some(default.to_string()));
    }

    fn record(&self, name: &str, change: impl FnOnce(&mut Field)) {
        if self.context.is_describing() {
            self.context.record(&self.path_of(name), change);
        }
    }

    fn states_range(&self, name: &str, least: impl Display, greatest: impl Display) {
        self.record(name, |field| field.range = Some((least.to_string(), greatest.to_string())));
    }

    /// The field, if it is present.
    pub fn at(&self, name: &'static str) -> Option<At<'a>> {
        if self.context.is_describing() {
            return Some(self.described(name));
        }
        self.known.borrow_mut().push(name);
        let entry = self.entries.iter().find(|entry| entry.key == name)?;
        let (context, node) = (self.context, &entry.value);
        Some(At { context, node, name_location: Some(entry.location), field: self.path_of(name) })
    }

    /// Records the field, whose value then stands for every value.
    fn described(&self, name: &'static str) -> At<'a> {
        let about = self.meanings.borrow().iter().find(|(field, _)| *field == name).map(|(_, about)| *about);
        let field = self.path_of(name);
        self.context.record(&field, |field| field.about = about.unwrap_or(field.about));
        At { context: self.context, node: &ANY, name_location: None, field }
    }

    /// Reports a mistake: at the field if it is present, otherwise at the section that should have it.
    pub fn error(&self, name: &str, message: impl Into<String>) {
        let entry = self.entries.iter().find(|entry| entry.key == name);
        let location = entry.map_or(self.location, |entry| entry.value.location);
        self.context.report(location, &self.path_of(name), message.into());
    }

    /// Reports a mistake in the section as a whole.
    pub fn section_error(&self, message: impl Into<String>) {
        self.context.report(self.location, &self.field, message.into());
    }

    fn path_of(&self, name: &str) -> String {
        if self.field.is_empty() { name.to_owned() } else { format!("{}.{name}", self.field) }
    }

    /// A field that must be present.
    pub fn required<T: Value>(&self, name: &'static str) -> Option<T> {
        self.required_at(name).and_then(|at| at.read())
    }

    /// A field that must be present, for values that are not read through [`Value`].
    pub fn required_at(&self, name: &'static str) -> Option<At<'a>> {
        let at = self.at(name);
        self.states_required(name);
        if at.is_none() {
            self.error(name, "is required");
        }
        at
    }

    pub fn optional<T: Value>(&self, name: &'static str) -> Option<T> {
        self.at(name).and_then(|at| at.read())
    }

    /// The field's value, or `default` if the field is absent, or wrong, which is reported.
    pub fn or<T: Value + Display>(&self, name: &'static str, default: T) -> T {
        let given = self.optional(name);
        self.states_default(name, &default);
        given.unwrap_or(default)
    }

    /// One of `words`; `None` if the field is absent, or has another value, which is reported.
    pub fn word(&self, name: &'static str, words: &'static [&'static str]) -> Option<&'static str> {
        let at = self.at(name)?;
        at.describe(Shape::Words(words));
        let text = at.text()?;
        let word = words.iter().copied().find(|word| *word == text);
        if word.is_none() {
            at.error(format!("expected {}", words.join(" or ")));
        }
        word
    }

    /// A whole number within `range`.
    pub fn number(&self, name: &'static str, default: usize, range: RangeInclusive<usize>) -> usize {
        let given = self.optional(name);
        self.states_default(name, default);
        self.states_range(name, range.start(), range.end());
        let Some(number) = given else { return default };
        if !range.contains(&number) {
            self.error(name, format!("{number} is not in the range {} to {}", range.start(), range.end()));
        }
        number
    }

    /// A duration within `range`.
    pub fn duration(
        &self,
        name: &'static str,
        default: Duration,
        range: RangeInclusive<Duration>,
    ) -> Duration {
        let given = self.optional(name);
        self.states_default(name, Written(default));
        self.states_range(name, Written(*range.start()), Written(*range.end()));
        let Some(duration) = given else { return default };
        if !range.contains(&duration) {
            let show = humantime::format_duration;
            let (least, most) = (show(*range.start()), show(*range.end()));
            self.error(name, format!("{} is not in the range {least} to {most}", show(duration)));
        }
        duration
    }

    /// A list of values, which is empty if the field is absent.
    pub fn list<T: Value>(&self, name: &'static str) -> Vec<T> {
        self.items(name).iter().filter_map(At::read).collect()
    }

    /// The elements of a list; none if the field is absent.
    pub fn items(&self, name: &'static str) -> Vec<At<'a>> {
        self.at(name).map(|at| at.items()).unwrap_or_default()
    }

    /// A section that may be absent.
    pub fn section<T>(&self, name: &'static str, read: impl FnOnce(&Section<'a>) -> Option<T>) -> Option<T> {
        self.at(name).and_then(|at| at.section(read))
    }

    /// Reads the only one of the alternatives that is present. `Err` has how many are, if it is not one.
    pub fn one_of<T>(&self, alternatives: &[Alternative<T>]) -> Result<Option<T>, usize> {
        if self.context.is_describing() {
            self.context.record(&self.field, |field| field.kind = FieldKind::Choice);
            for &(name, read) in alternatives {
                drop(read(&self.described(name)));
            }
            return Ok(None);
        }
        let given: Vec<_> =
            alternatives.iter().filter_map(|&(name, read)| Some((self.at(name)?, read))).collect();
        match given.as_slice() {
            [(at, read)] => Ok(read(at)),
            several => Err(several.len()),
        }
    }

    /// A section whose fields all have defaults. An absent section is read as an empty one.
    pub fn section_or_default<T>(&self, name: &'static str, read: impl Fn(&Section<'_>) -> T) -> T {
        let given = self.section(name, |section| Some(read(section)));
        self.states_default(name, "{}");
        given.unwrap_or_else(|| read(&Section::new(self.context, self.location, self.path_of(name), &[])))
    }

    /// An address to listen on, which must differ from every other listener of this configuration.
    pub fn listen(&self, name: &'static str, default: SocketAddr) -> SocketAddr {
        let address = self.or(name, default);
        self.claim(name, Listener::Tcp(address));
        address
    }

    /// An address to listen on as [`Section::listen`] takes it, if the field is present.
    pub fn optional_listen(&self, name: &'static str) -> Option<SocketAddr> {
        let address = self.optional(name)?;
        self.claim(name, Listener::Tcp(address));
        Some(address)
    }

    /// An address to listen on without authentication: only a loopback address, unless the section has
    /// `allow_remote: true`.
    pub fn listen_local(&self, name: &'static str, default: SocketAddr) -> SocketAddr {
        let address = self.listen(name, default);
        if !self.or("allow_remote", false) && !address.ip().to_canonical().is_loopback() {
            let message =
                "has no authentication, so it must be a loopback address; allow_remote: true lifts this";
            self.error(name, format!("{address} {message}"));
        }
        address
    }

    /// The path of a Unix socket to listen on, which must differ from every other one. `sun_path` in unix(7) has room for
    /// 107 bytes, and the socket is first made under a longer name in the same directory.
    pub fn listen_unix(&self, name: &'static str, default: &str) -> PathBuf {
        let path = self.path_or(name, default);
        if path.as_os_str().len() > 98 {
            self.error(name, "is longer than the 98 bytes that a Unix socket's path may have here");
        }
        self.claim(name, Listener::Unix(path.clone()));
        path
    }

    fn path_or(&self, name: &'static str, default: &str) -> PathBuf {
        let given = self.at(name).and_then(|at| at.path());
        self.states_default(name, default);
        given.unwrap_or_else(|| PathBuf::from(default))
    }

    fn claim(&self, name: &str, listener: Listener) {
        let entry = self.entries.iter().find(|entry| entry.key == name);
        let location = entry.map_or(self.location, |entry| entry.value.location);
        self.context.claim(listener, location, &self.path_of(name));
    }

    /// A directory that belongs to the agent and need not exist yet.
    pub fn directory(&self, name: &'static str, default: &str) -> PathBuf {
        let path = self.path_or(name, default);
        if self.context.source.check_files
            && let Err(error) = secret_file::check_directory(&path)
            && error.kind() != io::ErrorKind::NotFound
        {
            self.error(name, error.to_string());
        }
        path
    }

    /// A file that must be readable, if the field is present.
    pub fn file(&self, name: &'static str) -> Option<PathBuf> {
        self.at(name)?.file()
    }

    /// A file that must be readable.
    pub fn required_file(&self, name: &'static str) -> Option<PathBuf> {
        self.required_at(name)?;
        self.file(name)
    }

    /// A file that [`Section::private_file`] accepts, in a field that must be present.
    pub fn required_private_file(&self, name: &'static str) -> Option<PathBuf> {
        self.required_at(name)?;
        self.private_file(name)
    }

    /// A file with secrets that [`secret_file::read_given`] accepts, if the field is present.
    pub fn private_file(&self, name: &'static str) -> Option<PathBuf> {
        self.at(name)?.private_file()
    }

    fn report_unknown(&self) {
        let known = self.known.borrow();
        for entry in self.entries.iter().filter(|entry| !known.contains(&entry.key.as_str())) {
            let key: String = entry.key.chars().take(80).collect();
            let message = match nearest(&key, &known) {
                Some(name) => format!("unknown field; did you mean {name}?"),
                None => format!("unknown field; known here: {}", distinct(&known)),
            };
            self.context.report(entry.location, &self.path_of(&key), message);
        }
    }
}

fn distinct(names: &[&str]) -> String {
    let mut names = names.to_vec();
    names.sort_unstable();
    names.dedup();
    names.join(", ")
}

/// The known name that `key` is most likely a misspelling of.
pub(super) fn nearest<'a>(key: &str, known: &[&'a str]) -> Option<&'a str> {
    let plain = |s: &str| s.to_ascii_lowercase().replace(['-', '_', ' '], "");
    let key = plain(key);
    let close = |name: &&'a str| (strsim::levenshtein(&key, &plain(name)), *name);
    known.iter().map(close).filter(|(edits, name)| *edits <= name.len() / 3).min().map(|(_, name)| name)
}
