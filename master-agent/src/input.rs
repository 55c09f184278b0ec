//! Input of commands.

use std::path::Path;

use anyhow::Context;

/// Reads a file, or standard input for "-".
pub fn read_text(path: &Path) -> anyhow::Result<String> {
    if path == Path::new("-") {
        return std::io::read_to_string(std::io::stdin()).context("can't read standard input");
    }
    std::fs::read_to_string(path).with_context(|| format!("can't read {}", path.display()))
}
