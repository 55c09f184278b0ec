//! Strict YAML configuration: all errors are reported at once, each with its line and column.
//!
//! A file is parsed into a tree of nodes that know their location, and an agent's reader walks it section by section
//! ([`Section`]) with each field's type, default and bounds. A reader does not stop at the first mistake: what can't be
//! read is reported and replaced by its default, and the caller gets either the whole configuration or all [`Errors`]. A
//! field that no reader asks for is an error.
//!
//! Only [`load`] looks at the files that the configuration names, so that a sample can be checked where its files don't
//! exist. [`describe`] runs the same readers to learn which fields there are. [`secret_file`] reads and writes files that
//! hold secrets.

use std::{fs, path::Path};

mod context;
mod defaults;
mod description;
mod error;
mod log;
pub mod secret_file;
mod section;
mod tree;
mod value;

use context::Context;
pub use context::Source;
pub use defaults::defaults;
pub use description::{Field, FieldKind, Shape};
pub use error::{Error, Errors};
pub use log::{Log, LogFormat};
pub use section::{Alternative, At, Meanings, Section, Value};
pub use value::{Mode, Ports};

/// The largest file that is read, in bytes: room for the inventory of tens of thousands of nodes.
const MAX_FILE: u64 = 64 << 20;

/// Reads a configuration from its text. `read` gets the top-level section, and returns `None` only if it has reported
/// why.
pub fn parse<T>(
    text: &str,
    source: Source<'_>,
    read: impl FnOnce(&Section<'_>) -> Option<T>,
) -> Result<T, Errors> {
    let context = Context::new(source);
    let tree = tree::parse(text, &|location, message| context.report(location, "", message));
    let value = tree.and_then(|node| At::root(&context, &node).section(read));
    context.finish(value)
}

/// Describes the fields of a configuration by running its reader against a value that stands for every value: each field is
/// present, each list has one element, and each alternative of a choice is taken. A reader must ask for every field before
/// it gives up on a missing one.
pub fn describe<T>(read: impl FnOnce(&Section<'_>) -> Option<T>) -> Vec<Field> {
    let context = Context::describing();
    drop(At::root(&context, &tree::ANY).section(read));
    context.into_fields()
}

/// Reads a configuration from a file and checks the files that it names. Relative paths are relative to the file's
/// directory.
pub fn load<T>(path: &Path, read: impl FnOnce(&Section<'_>) -> Option<T>) -> Result<T, Errors> {
    load_with(path, true, read)
}

/// Reads a configuration as [`load`] does, without looking at the files that it names: for commands that don't need
/// them.
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

#[cfg(test)]
mod tests;
