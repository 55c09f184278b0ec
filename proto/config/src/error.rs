//! The mistakes in a configuration, each with its location.

use std::fmt;

/// One mistake and its location, shown as `FILE:LINE:COLUMN: FIELD: MESSAGE`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Error {
    /// The file, as the user named it.
    pub origin: String,
    /// Counted from 1; 0 if the error concerns the whole file.
    pub line: usize,
    /// In characters, counted from 1; 0 if the error concerns the whole file.
    pub column: usize,
    /// For instance `http_connect.tls.listen` or `nodes[2].name`; empty at the top.
    pub field: String,
    pub message: String,
}

/// All mistakes in a configuration, at least one, in the order of the file. They are shown one per line.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Errors(pub(super) Vec<Error>);

impl Errors {
    /// An error without a line, for instance because the file can't be read.
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
