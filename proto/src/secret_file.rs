//! Files that hold secrets, and files that must never be seen half-written.

use std::{
    fs::{File, OpenOptions},
    io::{self, Read, Write},
    os::unix::fs::{OpenOptionsExt, PermissionsExt},
    path::{Path, PathBuf},
};

/// Creates `path` with mode 0600; fails with `AlreadyExists` if it is there, so that of two processes one wins.
pub fn write_new(path: &Path, bytes: &[u8]) -> io::Result<()> {
    let temporary = write_beside(path, bytes)?;
    let linked = std::fs::hard_link(&temporary, path);
    let _ = std::fs::remove_file(&temporary);
    linked
}

/// Replaces `path` at once by a file with mode 0600.
pub fn replace(path: &Path, bytes: &[u8]) -> io::Result<()> {
    let temporary = write_beside(path, bytes)?;
    std::fs::rename(&temporary, path).inspect_err(|_| {
        let _ = std::fs::remove_file(&temporary);
    })
}

/// Reads a secret; refuses a file that others than its owner can read.
pub fn read(path: &Path) -> io::Result<String> {
    let mut file = File::open(path).map_err(|e| named(path, e))?;
    if file.metadata()?.permissions().mode() & 0o077 != 0 {
        return Err(io::Error::new(
            io::ErrorKind::PermissionDenied,
            format!("{path} can be read by others than its owner: chmod 600 {path}", path = path.display()),
        ));
    }
    let mut text = String::new();
    file.read_to_string(&mut text).map_err(|e| named(path, e))?;
    Ok(text)
}

/// Creates a directory that only its owner can enter, unless it is there.
pub fn create_directory(path: &Path) -> io::Result<()> {
    if path.is_dir() {
        return Ok(());
    }
    let mut builder = std::fs::DirBuilder::new();
    std::os::unix::fs::DirBuilderExt::mode(builder.recursive(true), 0o700)
        .create(path)
        .map_err(|e| named(path, e))
}

fn write_beside(path: &Path, bytes: &[u8]) -> io::Result<PathBuf> {
    let mut name = path.as_os_str().to_owned();
    name.push(format!(".{:016x}", rand::random::<u64>()));
    let temporary = PathBuf::from(name);
    let mut file = OpenOptions::new()
        .write(true)
        .create_new(true)
        .mode(0o600)
        .open(&temporary)
        .map_err(|e| named(&temporary, e))?;
    let written = file.write_all(bytes).and_then(|()| file.sync_all());
    if let Err(e) = written {
        let _ = std::fs::remove_file(&temporary);
        return Err(named(&temporary, e));
    }
    Ok(temporary)
}

fn named(path: &Path, error: io::Error) -> io::Error {
    io::Error::new(error.kind(), format!("{}: {error}", path.display()))
}

#[cfg(test)]
mod tests {
    use super::*;

    struct TempDir(PathBuf);

    impl TempDir {
        fn new() -> Self {
            let path = std::env::temp_dir().join(format!("proto-test-{:016x}", rand::random::<u64>()));
            create_directory(&path).unwrap();
            Self(path)
        }
    }

    impl Drop for TempDir {
        fn drop(&mut self) {
            let _ = std::fs::remove_dir_all(&self.0);
        }
    }

    fn mode(path: &Path) -> u32 {
        std::fs::metadata(path).unwrap().permissions().mode() & 0o777
    }

    #[test]
    fn files_are_for_their_owner_only() {
        let dir = TempDir::new();
        assert_eq!(mode(&dir.0), 0o700);
        let path = dir.0.join("key");
        write_new(&path, b"one").unwrap();
        assert_eq!((mode(&path), read(&path).unwrap().as_str()), (0o600, "one"));
        assert_eq!(write_new(&path, b"two").unwrap_err().kind(), io::ErrorKind::AlreadyExists);
        assert_eq!(read(&path).unwrap(), "one");
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o644)).unwrap();
        let error = read(&path).unwrap_err().to_string();
        assert!(error.contains(&format!("chmod 600 {}", path.display())), "{error}");
        replace(&path, b"three").unwrap();
        assert_eq!((mode(&path), read(&path).unwrap().as_str()), (0o600, "three"));
        assert_eq!(std::fs::read_dir(&dir.0).unwrap().count(), 1, "no temporary file is left");
    }

    #[test]
    fn of_many_writers_one_makes_the_file() {
        let dir = TempDir::new();
        let path = dir.0.join("key");
        let made = std::thread::scope(|scope| {
            let path = &path;
            let tasks: Vec<_> =
                (0..8u8).map(|i| scope.spawn(move || write_new(path, &[b'0' + i; 4096]).is_ok())).collect();
            tasks.into_iter().map(|t| t.join().unwrap()).filter(|made| *made).count()
        });
        assert_eq!(made, 1);
        let text = read(&path).unwrap();
        assert!(text.len() == 4096 && text.bytes().all(|b| b == text.as_bytes()[0]));
    }

    #[test]
    fn errors_name_the_file() {
        let dir = TempDir::new();
        let path = dir.0.join("none/key");
        assert!(read(&path).unwrap_err().to_string().contains("none/key"));
        assert!(replace(&path, b"").unwrap_err().to_string().contains("none/key"));
    }
}
