//! The standard output of the commands.

use std::{
    fmt::Display,
    io::{self, ErrorKind, Write},
    process,
};

/// Prints text. A failure ends the process: quietly if the reader has left, as `head` does once it has enough, and with
/// an error otherwise.
pub fn print(text: impl Display) {
    let mut out = io::stdout().lock();
    let Err(error) = write!(out, "{text}").and_then(|()| out.flush()) else { return };
    if error.kind() == ErrorKind::BrokenPipe {
        process::exit(0);
    }
    eprintln!("error: can't write to standard output: {error}");
    process::exit(1);
}

/// Prints a line.
pub fn print_line(text: impl Display) {
    print(format_args!("{text}\n"));
}
