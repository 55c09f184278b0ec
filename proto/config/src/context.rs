//! The state that the readers of one configuration share: its source, its mistakes and its listeners.

use std::{
    cell::{Cell, RefCell},
    net::{IpAddr, SocketAddr},
    path::{Path, PathBuf},
};

use super::{
    description::{Field, Recorder},
    error::{Error, Errors},
    tree::Location,
};

/// Where a configuration's text came from, and how far it is to be checked.
#[derive(Clone, Copy, Debug)]
pub struct Source<'a> {
    /// The file's name as shown in errors.
    pub origin: &'a str,
    /// The directory that relative paths in the text are relative to.
    pub base_dir: &'a Path,
    /// Whether the files that the text names must exist and be readable.
    pub check_files: bool,
}

/// The most errors that are kept for one file. Further ones are only counted.
const MAX_ERRORS: usize = 100;

/// The source of the text, and what reading it has found so far.
pub(super) struct Context<'a> {
    pub source: Source<'a>,
    errors: RefCell<Vec<Error>>,
    dropped: Cell<usize>,
    listeners: RefCell<Vec<(Listener, String)>>,
    /// Where the fields are described; `None` while a configuration is read.
    recorder: Option<Recorder>,
}

/// An address that something listens on.
#[derive(Clone, PartialEq, Eq)]
pub(super) enum Listener {
    Tcp(SocketAddr),
    Unix(PathBuf),
}

impl<'a> Context<'a> {
    pub(super) fn new(source: Source<'a>) -> Self {
        Self {
            source,
            errors: RefCell::default(),
            dropped: Cell::new(0),
            listeners: RefCell::default(),
            recorder: None,
        }
    }

    /// The context of a configuration that is described rather than read. Nothing in it is a mistake.
    pub(super) fn describing() -> Self {
        let source = Source { origin: "", base_dir: Path::new(""), check_files: false };
        Self { recorder: Some(Recorder::default()), ..Self::new(source) }
    }

    pub(super) fn is_describing(&self) -> bool {
        self.recorder.is_some()
    }

    /// Describes a field, unless a configuration is read.
    pub(super) fn record(&self, path: &str, change: impl FnOnce(&mut Field)) {
        if let Some(recorder) = &self.recorder {
            recorder.record(path, change);
        }
    }

    pub(super) fn into_fields(self) -> Vec<Field> {
        self.recorder.map(Recorder::into_fields).unwrap_or_default()
    }

    pub(super) fn report(&self, location: Location, field: &str, message: String) {
        if self.is_describing() {
            return;
        }
        let mut errors = self.errors.borrow_mut();
        if errors.len() >= MAX_ERRORS {
            self.dropped.set(self.dropped.get() + 1);
            return;
        }
        errors.push(Error {
            origin: self.source.origin.to_owned(),
            line: location.line,
            column: location.column,
            field: field.to_owned(),
            message,
        });
    }

    pub(super) fn finish<T>(self, value: Option<T>) -> Result<T, Errors> {
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

    pub(super) fn claim(&self, listener: Listener, location: Location, field: &str) {
        let mut listeners = self.listeners.borrow_mut();
        if let Some((_, other)) = listeners.iter().find(|(other, _)| other.clashes(&listener)) {
            let message = format!("the same address as {other}: two listeners can't share one");
            self.report(location, field, message);
        }
        listeners.push((listener, field.to_owned()));
    }
}

impl Listener {
    pub(super) fn clashes(&self, other: &Self) -> bool {
        match (self, other) {
            (Self::Tcp(a), Self::Tcp(b)) => {
                // `[::]` accepts IPv4 connections, too. For port 0 the system chooses a free port.
                let covers = |a: IpAddr, b: IpAddr| a.is_unspecified() && (a.is_ipv6() || b.is_ipv4());
                let (x, y) = (a.ip().to_canonical(), b.ip().to_canonical());
                a.port() != 0 && a.port() == b.port() && (x == y || covers(x, y) || covers(y, x))
            }
            (Self::Unix(a), Self::Unix(b)) => a == b,
            (Self::Tcp(_), Self::Unix(_)) | (Self::Unix(_), Self::Tcp(_)) => false,
        }
    }
}
