//! Figures that tests measure in passing. They decide nothing, and `tests/run.sh` shows them at its end.

use std::io::Write;

/// Prints a line, and keeps it in the file that `TEST_FIGURES` names.
pub fn note(line: &str) {
    println!("{line}");
    let Some(file) = std::env::var_os("TEST_FIGURES") else { return };
    let file = std::fs::OpenOptions::new().create(true).append(true).open(file);
    let _ = file.and_then(|mut file| writeln!(file, "{line}"));
}
