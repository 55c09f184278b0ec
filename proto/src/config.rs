//! Strict YAML configuration: every error at once, each with its place.
//!
//! A file is parsed into a tree of nodes that know where they stand, and an agent's reader walks it section by
//! section ([`Section`]), giving each field's type, default and bounds. A reader never stops at the first
//! mistake: whatever can't be read is reported and replaced by its default or by nothing, and the caller gets
//! either the whole configuration or all [`Errors`]. A field that no reader asked for is an error.
//!
//! Nothing here opens a socket. Files that the configuration names are looked at only by [`load`], so that a
//! sample can be checked where its files don't exist.

use std::{
    cell::{Cell, RefCell},
    fmt, fs, io,
    net::{IpAddr, SocketAddr},
    ops::RangeInclusive,
    path::{Path, PathBuf},
    time::Duration,
};

mod tree;
mod value;

use tree::{Entry, Kind, Node, Place};
pub use value::{Mode, Ports, Value};

use crate::{io::telemetry::LogFormat, secret_file};

/// One mistake and where it is. Shown as `FILE:LINE:COLUMN: FIELD: MESSAGE`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Error {
    /// The file, as the user named it.
    pub origin: String,
    /// Counted from 1; 0 where the error concerns the whole file.
    pub line: usize,
    /// In characters, counted from 1; 0 where the error concerns the whole file.
    pub column: usize,
    /// For instance `http_connect.tls.listen` or `nodes[2].name`; empty at the top.
    pub field: String,
    pub message: String,
}

/// All that is wrong with a configuration, in the order of the file; at least one. Shown one per line.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Errors(Vec<Error>);

/// Where a configuration's text came from, and how far it is to be checked.
#[derive(Clone, Copy, Debug)]
pub struct Source<'a> {
    /// The file's name as shown in errors.
    pub origin: &'a str,
    /// What relative paths in the text are relative to.
    pub base_dir: &'a Path,
    /// Whether the files that the text names must exist and be readable.
    pub check_files: bool,
}

/// Larger files are refused. Room for the inventory of tens of thousands of nodes.
const MAX_FILE: u64 = 64 << 20;

/// Further errors of one file are only counted.
const MAX_ERRORS: usize = 100;

/// Reads a configuration from its text. `read` gets the top-level section; it returns `None` only where it has
/// reported why.
pub fn parse<T>(
    text: &str,
    source: Source<'_>,
    read: impl FnOnce(&Section<'_>) -> Option<T>,
) -> Result<T, Errors> {
    let context =
        Context { source, errors: RefCell::default(), dropped: Cell::new(0), listeners: RefCell::default() };
    let tree = tree::parse(text, &|place, message| context.report(place, "", message));
    let value = tree.and_then(|node| {
        let root = At { context: &context, node: &node, name_place: None, field: String::new() };
        root.section(read)
    });
    context.finish(value)
}

/// Reads a configuration from a file, with relative paths relative to the file's directory, and checks the
/// files that it names.
pub fn load<T>(path: &Path, read: impl FnOnce(&Section<'_>) -> Option<T>) -> Result<T, Errors> {
    load_with(path, true, read)
}

/// As [`load`], without looking at the files that the configuration names: for commands that don't need them.
pub fn load_alone<T>(path: &Path, read: impl FnOnce(&Section<'_>) -> Option<T>) -> Result<T, Errors> {
    load_with(path, false, read)
}

fn load_with<T>(
    path: &Path,
    check_files: bool,
    read: impl FnOnce(&Section<'_>) -> Option<T>,
) -> Result<T, Errors> {
    let origin = path.display().to_string();
    let text = read_text(path).map_err(|message| Errors::whole_file(&origin, message))?;
    let base_dir = path.parent().unwrap_or(Path::new(""));
    parse(&text, Source { origin: &origin, base_dir, check_files }, read)
}

fn read_text(path: &Path) -> Result<String, String> {
    let unreadable = |error: std::io::Error| format!("can't be read: {error}");
    let metadata = fs::metadata(path).map_err(unreadable)?;
    if !metadata.is_file() {
        return Err("is not a file".into());
    }
    if metadata.len() > MAX_FILE {
        return Err(format!("is larger than {} MiB", MAX_FILE >> 20));
    }
    String::from_utf8(fs::read(path).map_err(unreadable)?).map_err(|_| "is not UTF-8 text".into())
}

impl Errors {
    /// An error that has no line, for instance an unreadable file.
    pub fn whole_file(origin: &str, message: impl Into<String>) -> Self {
        let (field, message) = (String::new(), message.into());
        Self(vec![Error { origin: origin.to_owned(), line: 0, column: 0, field, message }])
    }

    /// These errors followed by those of another file.
    pub fn and(mut self, other: Self) -> Self {
        self.0.extend(other.0);
        self
    }

    pub fn iter(&self) -> std::slice::Iter<'_, Error> {
        self.0.iter()
    }
}

impl std::error::Error for Errors {}

impl fmt::Display for Errors {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (i, error) in self.0.iter().enumerate() {
            let separator = if i == 0 { "" } else { "\n" };
            write!(f, "{separator}{error}")?;
        }
        Ok(())
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.origin)?;
        if self.line > 0 {
            write!(f, ":{}:{}", self.line, self.column)?;
        }
        if !self.field.is_empty() {
            write!(f, ": {}", self.field)?;
        }
        write!(f, ": {}", self.message)
    }
}

struct Context<'a> {
    source: Source<'a>,
    errors: RefCell<Vec<Error>>,
    dropped: Cell<usize>,
    listeners: RefCell<Vec<(Listener, String)>>,
}

#[derive(Clone, PartialEq, Eq)]
enum Listener {
    Tcp(SocketAddr),
    Unix(PathBuf),
}

impl Context<'_> {
    fn report(&self, place: Place, field: &str, message: String) {
        let mut errors = self.errors.borrow_mut();
        if errors.len() >= MAX_ERRORS {
            self.dropped.set(self.dropped.get() + 1);
            return;
        }
        errors.push(Error {
            origin: self.source.origin.to_owned(),
            line: place.line,
            column: place.column,
            field: field.to_owned(),
            message,
        });
    }

    fn finish<T>(self, value: Option<T>) -> Result<T, Errors> {
        let origin = self.source.origin;
        let mut errors = self.errors.into_inner();
        errors.sort_by_key(|error| (error.line, error.column));
        match value {
            Some(value) if errors.is_empty() => Ok(value),
            None if errors.is_empty() => Err(Errors::whole_file(origin, "can't be read as a configuration")),
            Some(_) | None => {
                let mut errors = Errors(errors);
                if self.dropped.get() > 0 {
                    let more = format!("and {} more errors", self.dropped.get());
                    errors = errors.and(Errors::whole_file(origin, more));
                }
                Err(errors)
            }
        }
    }

    fn claim(&self, listener: Listener, place: Place, field: &str) {
        let mut listeners = self.listeners.borrow_mut();
        if let Some((_, other)) = listeners.iter().find(|(other, _)| other.clashes(&listener)) {
            let message = format!("the same address as {other}: two listeners can't share one");
            self.report(place, field, message);
        }
        listeners.push((listener, field.to_owned()));
    }
}

impl Listener {
    fn clashes(&self, other: &Self) -> bool {
        match (self, other) {
            (Self::Tcp(a), Self::Tcp(b)) => {
                // `[::]` takes IPv4 connections too. Port 0 is a free port of the system's choice.
                let covers = |a: IpAddr, b: IpAddr| a.is_unspecified() && (a.is_ipv6() || b.is_ipv4());
                let (x, y) = (a.ip().to_canonical(), b.ip().to_canonical());
                a.port() != 0 && a.port() == b.port() && (x == y || covers(x, y) || covers(y, x))
            }
            (Self::Unix(a), Self::Unix(b)) => a == b,
            (Self::Tcp(_), Self::Unix(_)) | (Self::Unix(_), Self::Tcp(_)) => false,
        }
    }
}

/// One node of the tree and where it stands.
pub struct At<'a> {
    context: &'a Context<'a>,
    node: &'a Node,
    /// Where the field's name stands, for values that have one.
    name_place: Option<Place>,
    field: String,
}

impl<'a> At<'a> {
    /// Reports that this value is wrong.
    pub fn error(&self, message: impl Into<String>) {
        self.context.report(self.node.place, &self.field, message.into());
    }

    /// The line this value stands on, counted from 1.
    pub fn line(&self) -> usize {
        self.node.place.line
    }

    /// What relative paths are relative to.
    pub fn base_dir(&self) -> &Path {
        self.context.source.base_dir
    }

    /// The scalar's text, quotes and escapes resolved; `None` (reported) for anything else.
    pub fn text(&self) -> Option<&'a str> {
        self.scalar("a text").map(|(text, _)| text)
    }

    /// The scalar's text, and whether it stood without quotes. `None` (reported as not `expected`) for
    /// anything else.
    fn scalar(&self, expected: &str) -> Option<(&'a str, bool)> {
        match &self.node.kind {
            Kind::Scalar { .. } if self.node.is_null() => self.no_value(),
            Kind::Scalar { text, plain } => return Some((text, *plain)),
            Kind::List(_) => self.error(format!("expected {expected}, found a list")),
            Kind::Map(_) => self.error(format!("expected {expected}, found a section")),
            Kind::Bad => {}
        }
        None
    }

    fn no_value(&self) {
        let place = self.name_place.unwrap_or(self.node.place);
        self.context.report(place, &self.field, "has no value: give it one, or remove it".into());
    }

    /// Reads this value as a section; afterwards its fields that `read` did not ask for are reported.
    pub fn section<T>(&self, read: impl FnOnce(&Section<'a>) -> Option<T>) -> Option<T> {
        match &self.node.kind {
            Kind::Map(entries) => {
                let place = self.name_place.unwrap_or(self.node.place);
                let (context, field) = (self.context, self.field.clone());
                let section = Section { context, place, field, entries, known: RefCell::default() };
                let value = read(&section);
                section.report_unknown();
                return value;
            }
            Kind::Scalar { .. } if self.node.is_null() => self.no_value(),
            Kind::Scalar { .. } => self.error("expected a section of fields, found a single value"),
            Kind::List(_) => self.error("expected a section of fields, found a list"),
            Kind::Bad => {}
        }
        None
    }

    /// The elements of this list; empty (reported) for anything else.
    pub fn items(&self) -> Vec<At<'a>> {
        match &self.node.kind {
            Kind::List(items) => {
                let item = |(i, node)| {
                    let field = format!("{}[{i}]", self.field);
                    At { context: self.context, node, name_place: None, field }
                };
                return items.iter().enumerate().map(item).collect();
            }
            Kind::Scalar { .. } if self.node.is_null() => self.no_value(),
            Kind::Scalar { .. } => self.error("expected a list, found a single value"),
            Kind::Map(_) => self.error("expected a list, found a section"),
            Kind::Bad => {}
        }
        Vec::new()
    }

    /// Whether this is a list without elements.
    pub fn is_empty_list(&self) -> bool {
        matches!(&self.node.kind, Kind::List(items) if items.is_empty())
    }

    /// A path; a relative one is relative to the file's directory.
    fn path(&self) -> Option<PathBuf> {
        let text = self.text()?;
        if text.is_empty() || text.contains('\0') {
            self.error("is not a path");
            return None;
        }
        Some(self.base_dir().join(text))
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

/// `metadata` before `open`, since opening a FIFO would wait for its writer.
fn file_is_readable(path: &Path) -> Result<(), String> {
    let unreadable = |error: std::io::Error| format!("can't be read: {error}");
    let metadata = fs::metadata(path).map_err(unreadable)?;
    if !metadata.is_file() {
        return Err("is not a file".into());
    }
    fs::File::open(path).map(drop).map_err(unreadable)
}

/// A mapping of field names to values. Each method names a field; those never named are unknown.
pub struct Section<'a> {
    context: &'a Context<'a>,
    place: Place,
    field: String,
    entries: &'a [Entry],
    known: RefCell<Vec<&'static str>>,
}

impl<'a> Section<'a> {
    /// The field, if it is there.
    pub fn at(&self, name: &'static str) -> Option<At<'a>> {
        self.known.borrow_mut().push(name);
        let entry = self.entries.iter().find(|entry| entry.key == name)?;
        let (context, node) = (self.context, &entry.value);
        Some(At { context, node, name_place: Some(entry.place), field: self.path_of(name) })
    }

    /// Reports a mistake: at the field if it is there, else at the section that should have it.
    pub fn error(&self, name: &str, message: impl Into<String>) {
        let entry = self.entries.iter().find(|entry| entry.key == name);
        let place = entry.map_or(self.place, |entry| entry.value.place);
        self.context.report(place, &self.path_of(name), message.into());
    }

    /// Reports a mistake of the section as a whole.
    pub fn section_error(&self, message: impl Into<String>) {
        self.context.report(self.place, &self.field, message.into());
    }

    fn path_of(&self, name: &str) -> String {
        if self.field.is_empty() { name.to_owned() } else { format!("{}.{name}", self.field) }
    }

    /// A field that must be there.
    pub fn required<T: Value>(&self, name: &'static str) -> Option<T> {
        self.required_at(name).and_then(|at| T::read(&at))
    }

    /// A field that must be there, to be read by other means than [`Value`].
    pub fn required_at(&self, name: &'static str) -> Option<At<'a>> {
        let at = self.at(name);
        if at.is_none() {
            self.error(name, "is required");
        }
        at
    }

    pub fn optional<T: Value>(&self, name: &'static str) -> Option<T> {
        self.at(name).and_then(|at| T::read(&at))
    }

    /// The field's value, or `default` where it is absent (or wrong and reported).
    pub fn or<T: Value>(&self, name: &'static str, default: T) -> T {
        self.optional(name).unwrap_or(default)
    }

    /// A whole number within `range`.
    pub fn number(&self, name: &'static str, default: usize, range: RangeInclusive<usize>) -> usize {
        let Some(number) = self.optional(name) else { return default };
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
        let Some(duration) = self.optional(name) else { return default };
        if !range.contains(&duration) {
            let show = humantime::format_duration;
            let (least, most) = (show(*range.start()), show(*range.end()));
            self.error(name, format!("{} is not in the range {least} to {most}", show(duration)));
        }
        duration
    }

    /// A list of values, empty where absent.
    pub fn list<T: Value>(&self, name: &'static str) -> Vec<T> {
        self.items(name).iter().filter_map(T::read).collect()
    }

    /// A list's elements, none where absent.
    pub fn items(&self, name: &'static str) -> Vec<At<'a>> {
        self.at(name).map(|at| at.items()).unwrap_or_default()
    }

    /// A section that may be absent.
    pub fn section<T>(&self, name: &'static str, read: impl FnOnce(&Section<'a>) -> Option<T>) -> Option<T> {
        self.at(name).and_then(|at| at.section(read))
    }

    /// A section whose fields all have defaults: one that is absent is read as an empty one.
    pub fn section_or_default<T>(&self, name: &'static str, read: impl Fn(&Section<'_>) -> T) -> T {
        self.section(name, |section| Some(read(section))).unwrap_or_else(|| {
            let (context, place, field) = (self.context, self.place, self.path_of(name));
            read(&Section { context, place, field, entries: &[], known: RefCell::default() })
        })
    }

    /// An address to listen on, different from every other listener of this configuration. Required without a
    /// default.
    pub fn listen(&self, name: &'static str, default: Option<SocketAddr>) -> Option<SocketAddr> {
        let address = match default {
            Some(default) => Some(self.or(name, default)),
            None => self.required(name),
        }?;
        self.claim(name, Listener::Tcp(address));
        Some(address)
    }

    /// As [`Section::listen`], for an interface without authentication: only loopback addresses, unless the
    /// section has `allow_remote: true`.
    pub fn listen_local(&self, name: &'static str, default: SocketAddr) -> SocketAddr {
        let address = self.listen(name, Some(default)).unwrap_or(default);
        if !self.or("allow_remote", false) && !address.ip().to_canonical().is_loopback() {
            let message =
                "has no authentication, so it must be a loopback address; allow_remote: true lifts this";
            self.error(name, format!("{address} {message}"));
        }
        address
    }

    /// The path of a Unix socket to listen on, different from every other one. `sun_path` in unix(7) has room for
    /// 107 bytes, and the socket is first made under another name beside it.
    pub fn listen_unix(&self, name: &'static str, default: &str) -> PathBuf {
        let path = self.at(name).and_then(|at| at.path()).unwrap_or_else(|| PathBuf::from(default));
        if path.as_os_str().len() > 98 {
            self.error(name, "is longer than the 98 bytes that a Unix socket's path may have here");
        }
        self.claim(name, Listener::Unix(path.clone()));
        path
    }

    fn claim(&self, name: &str, listener: Listener) {
        let entry = self.entries.iter().find(|entry| entry.key == name);
        let place = entry.map_or(self.place, |entry| entry.value.place);
        self.context.claim(listener, place, &self.path_of(name));
    }

    /// A directory of the agent's own, which need not exist yet.
    pub fn directory(&self, name: &'static str, default: &str) -> PathBuf {
        let path = self.at(name).and_then(|at| at.path()).unwrap_or_else(|| PathBuf::from(default));
        if self.context.source.check_files
            && let Err(error) = secret_file::check_directory(&path)
            && error.kind() != io::ErrorKind::NotFound
        {
            self.error(name, error.to_string());
        }
        path
    }

    /// A file that must be readable, if the field is there.
    pub fn file(&self, name: &'static str) -> Option<PathBuf> {
        let at = self.at(name)?;
        let path = at.path()?;
        at.check_file(&path, false);
        Some(path)
    }

    /// A file that must be readable.
    pub fn required_file(&self, name: &'static str) -> Option<PathBuf> {
        self.required_at(name)?;
        self.file(name)
    }

    /// A private key's file, as [`Section::private_file`].
    pub fn required_private_file(&self, name: &'static str) -> Option<PathBuf> {
        self.required_at(name)?;
        self.private_file(name)
    }

    /// A file with secrets that [`secret_file::read_given`] takes, if the field is there.
    pub fn private_file(&self, name: &'static str) -> Option<PathBuf> {
        let at = self.at(name)?;
        let path = at.path()?;
        at.check_file(&path, true);
        Some(path)
    }

    fn report_unknown(&self) {
        let known = self.known.borrow();
        for entry in self.entries.iter().filter(|entry| !known.contains(&entry.key.as_str())) {
            let key: String = entry.key.chars().take(80).collect();
            let message = match nearest(&key, &known) {
                Some(name) => format!("unknown field; did you mean {name}?"),
                None => format!("unknown field; known here: {}", distinct(&known)),
            };
            self.context.report(entry.place, &self.path_of(&key), message);
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
fn nearest<'a>(key: &str, known: &[&'a str]) -> Option<&'a str> {
    let plain = |s: &str| s.to_ascii_lowercase().replace(['-', '_', ' '], "");
    let key = plain(key);
    let close = |name: &&'a str| (edits(&key, &plain(name)), *name);
    known.iter().map(close).filter(|(edits, name)| *edits <= name.len() / 3).min().map(|(_, name)| name)
}

/// Levenshtein distance.
fn edits(a: &str, b: &str) -> usize {
    let mut row: Vec<usize> = (0..=b.chars().count()).collect();
    for (i, x) in a.chars().enumerate() {
        let mut left = i + 1;
        let mut next = vec![left];
        for (y, above) in b.chars().zip(row.windows(2)) {
            if let [diagonal, above] = *above {
                left = (left + 1).min(above + 1).min(diagonal + usize::from(x != y));
            }
            next.push(left);
        }
        row = next;
    }
    row.last().copied().unwrap_or_default()
}

/// How an agent logs, in the words of both agents' configurations.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Log {
    pub format: LogFormat,
    /// A word such as `info`, or a filter such as `info,proto=debug`.
    pub level: String,
}

impl Log {
    pub fn read(section: &Section<'_>) -> Self {
        let level = section.or("level", "info".to_owned());
        if let Err(error) = tracing_subscriber::EnvFilter::builder().parse(&level) {
            section.error("level", format!("is no log level or filter: {error}"));
        }
        Self { format: section.or("format", LogFormat::Text), level }
    }
}

#[cfg(test)]
mod tests;
