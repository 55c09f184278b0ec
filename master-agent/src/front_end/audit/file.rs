//! The output of the audit log: standard output, or a file with mode 0600 that is rotated by size.

use std::{
    fs::{self, File, OpenOptions},
    io::{self, Write},
    os::unix::fs::{FileTypeExt, MetadataExt, OpenOptionsExt, PermissionsExt},
    path::{Path, PathBuf},
};

/// The destination of the lines.
pub(super) struct Output {
    sink: Sink,
    /// Whether the last line was written only in part.
    torn: bool,
}

enum Sink {
    Stream(Box<dyn Write + Send>),
    File(LogFile),
}

struct LogFile {
    path: PathBuf,
    max_bytes: u64,
    keep: usize,
    /// The open file. It is `None` after an error, and the next write opens the file again.
    open: Option<OpenFile>,
}

struct OpenFile {
    file: File,
    size: u64,
    /// Device and inode.
    id: (u64, u64),
    is_regular: bool,
}

impl Output {
    pub(super) fn stream(stream: impl Write + Send + 'static) -> Self {
        Self { sink: Sink::Stream(Box::new(stream)), torn: false }
    }

    /// Opens the file at once, so that an unusable path is an error at the start.
    pub(super) fn file(path: PathBuf, max_bytes: u64, keep: usize) -> io::Result<Self> {
        let open = Some(OpenFile::open(&path)?);
        Ok(Self { sink: Sink::File(LogFile { path, max_bytes, keep, open }), torn: false })
    }

    /// Writes whole lines. Calls `lost` with the number of lines that could not be written, and the reason.
    pub(super) fn write(&mut self, lines: impl Iterator<Item = String>, lost: &mut dyn FnMut(u64, &str)) {
        let mut chunk = Vec::new();
        for line in lines {
            if let Sink::File(log) = &self.sink
                && log.is_full(chunk.len() as u64, line.len() as u64)
            {
                self.put(&mut chunk, lost);
                if let Sink::File(log) = &mut self.sink {
                    log.rotate();
                }
            }
            chunk.extend_from_slice(line.as_bytes());
        }
        self.put(&mut chunk, lost);
    }

    fn put(&mut self, chunk: &mut Vec<u8>, lost: &mut dyn FnMut(u64, &str)) {
        if chunk.is_empty() {
            return;
        }
        if self.torn {
            chunk.insert(0, b'\n');
        }
        let mut written = 0;
        let result = match &mut self.sink {
            Sink::Stream(stream) => write_all(stream, chunk, &mut written),
            Sink::File(log) => log.append(chunk, &mut written),
        };
        if let Err(error) = result {
            let left = chunk.get(written..).unwrap_or_default();
            let lines = left.iter().filter(|b| **b == b'\n').count() - usize::from(self.torn && written == 0);
            lost(lines as u64, &error.to_string());
            self.torn = chunk.get(..written).and_then(<[u8]>::last).map_or(self.torn, |last| *last != b'\n');
        } else {
            self.torn = false;
        }
        chunk.clear();
    }
}

impl LogFile {
    /// Whether a line of `line` bytes after `waiting` bytes would make the file too large.
    fn is_full(&self, waiting: u64, line: u64) -> bool {
        let regular = self.open.as_ref().filter(|open| open.is_regular);
        regular.is_some_and(|open| {
            let size = open.size + waiting;
            size > 0 && size + line > self.max_bytes
        })
    }

    fn append(&mut self, chunk: &[u8], written: &mut usize) -> io::Result<()> {
        self.forget_if_replaced();
        let mut open = match self.open.take() {
            Some(open) => open,
            None => OpenFile::open(&self.path)?,
        };
        let result = write_all(&mut open.file, chunk, written);
        open.size += *written as u64;
        self.open = result.is_ok().then_some(open);
        result
    }

    /// Closes the file if somebody else has moved it away.
    fn forget_if_replaced(&mut self) {
        let there = fs::metadata(&self.path).ok().map(|metadata| (metadata.dev(), metadata.ino()));
        self.open = self.open.take().filter(|open| there == Some(open.id));
    }

    /// Rotates the files. If that fails, the file stays in use until it has grown by the maximum size again.
    fn rotate(&mut self) {
        self.forget_if_replaced();
        if self.open.is_none() {
            return;
        }
        let numbered = |number: usize| {
            let mut path = self.path.clone().into_os_string();
            path.push(format!(".{number}"));
            PathBuf::from(path)
        };
        let moved = (1..self.keep).rev().try_for_each(|number| {
            match fs::rename(numbered(number), numbered(number + 1)) {
                Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
                result => result,
            }
        });
        match moved.and_then(|()| fs::rename(&self.path, numbered(1))) {
            Ok(()) => self.open = OpenFile::open(&self.path).ok(),
            Err(error) => {
                tracing::error!(%error, file = %self.path.display(), "can't rotate the audit log");
                if let Some(open) = &mut self.open {
                    open.size = 0;
                }
            }
        }
    }
}

impl OpenFile {
    fn open(path: &Path) -> io::Result<Self> {
        // Opening a FIFO would wait for its reader.
        if fs::metadata(path).is_ok_and(|metadata| metadata.file_type().is_fifo()) {
            return Err(io::Error::new(io::ErrorKind::InvalidInput, "is a FIFO"));
        }
        let file = OpenOptions::new().append(true).create(true).mode(0o600).open(path)?;
        let metadata = file.metadata()?;
        let is_regular = metadata.is_file();
        if is_regular && metadata.permissions().mode() & 0o077 != 0 {
            file.set_permissions(fs::Permissions::from_mode(0o600))?;
        }
        Ok(Self { file, size: metadata.len(), id: (metadata.dev(), metadata.ino()), is_regular })
    }
}

/// Writes all bytes, as `Write::write_all` does, and also counts the written bytes in `written`.
fn write_all(out: &mut impl Write, bytes: &[u8], written: &mut usize) -> io::Result<()> {
    while let Some(rest) = bytes.get(*written..).filter(|rest| !rest.is_empty()) {
        match out.write(rest) {
            Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
            Ok(more) => *written += more,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    out.flush()
}
