//! Files that hold secrets, and files that must never be seen half-written.
//!
//! The checks look at the open file and not at its name, so that nobody can replace the file between the check and the
//! read.

use std::{
    fs::{DirBuilder, File, Metadata, OpenOptions},
    io::{self, Read, Write},
    os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt},
    path::{Path, PathBuf},
};

use zeroize::Zeroizing;

/// The permission bits that a file must not have. They close it to all but its owner.
#[derive(Clone, Copy)]
enum Closed {
    /// A secret that the agent has made: nobody else may do anything with it.
    Secret = 0o077,
    /// A secret that somebody else gave the agent (a Secret volume of Kubernetes with an `fsGroup`, Debian's
    /// `ssl-cert`): its group may read it.
    GivenSecret = 0o027,
    /// Not a secret: anybody may read it, and nobody else may change it.
    Public = 0o022,
}

/// Creates `path` with mode 0600. Fails with `AlreadyExists` if the file exists, so that one of two processes wins.
pub fn write_new(path: &Path, bytes: &[u8]) -> io::Result<()> {
    publish(&write_beside(path, bytes)?, path)
}

/// Gives a complete file in the same directory the name `path`. Fails with `AlreadyExists` if there is such a file. The
/// former name is gone in either case.
pub fn publish(temporary: &Path, path: &Path) -> io::Result<()> {
    let linked = std::fs::hard_link(temporary, path);
    let _ = std::fs::remove_file(temporary);
    linked?;
    sync_directory(path)
}

/// Removes a file for good: a loss of power does not bring it back.
pub fn remove(path: &Path) -> io::Result<()> {
    std::fs::remove_file(path).map_err(|e| named(path, e))?;
    sync_directory(path)
}

/// Replaces `path` atomically by a file with mode 0600.
pub fn replace(path: &Path, bytes: &[u8]) -> io::Result<()> {
    let temporary = write_beside(path, bytes)?;
    std::fs::rename(&temporary, path).inspect_err(|_| {
        let _ = std::fs::remove_file(&temporary);
    })?;
    sync_directory(path)
}

/// Reads a secret that the agent has made. Like the other functions here, it refuses a file that belongs to neither root
/// nor the user that this process runs as.
pub fn read(path: &Path) -> io::Result<Zeroizing<String>> {
    read_closed(path, Closed::Secret)
}

/// Reads a secret that the configuration names. Its group may read it, too.
pub fn read_given(path: &Path) -> io::Result<Zeroizing<String>> {
    read_closed(path, Closed::GivenSecret)
}

/// Reads a file that decides whom the agent trusts: anybody may read it.
pub fn read_public(path: &Path) -> io::Result<String> {
    read_closed(path, Closed::Public).map(|mut text| std::mem::take(&mut *text))
}

/// Whether [`read`] would refuse the file.
pub fn check(path: &Path) -> io::Result<()> {
    open(path, Closed::Secret).map(drop)
}

/// Whether [`read_given`] would refuse the file.
pub fn check_given(path: &Path) -> io::Result<()> {
    open(path, Closed::GivenSecret).map(drop)
}

/// Creates a directory that only its owner can enter, or checks it if it exists.
pub fn create_directory(path: &Path) -> io::Result<()> {
    match check_directory(path) {
        Err(e) if e.kind() == io::ErrorKind::NotFound => {
            DirBuilder::new().recursive(true).mode(0o700).create(path).map_err(|e| named(path, e))
        }
        checked => checked,
    }
}

/// Refuses a directory whose files somebody else could replace.
pub fn check_directory(path: &Path) -> io::Result<()> {
    let found = std::fs::metadata(path).map_err(|e| named(path, e))?;
    let shown = path.display();
    if !found.is_dir() {
        return Err(io::Error::new(io::ErrorKind::NotADirectory, format!("{shown} is not a directory")));
    }
    let user = rustix::process::geteuid().as_raw();
    if found.uid() != user {
        return Err(denied(format!(
            "{shown} belongs to uid {owner}, and this process runs as uid {user}: run it as its owner, or `chown -R {user} {shown}`, or name a directory that does not exist yet",
            owner = found.uid(),
        )));
    }
    let mode = found.mode() & 0o7777;
    if mode & 0o022 != 0 {
        return Err(denied(format!(
            "{shown} has mode {mode:04o}, so others than its owner can replace what is in it: chmod 700 {shown}"
        )));
    }
    Ok(())
}

fn read_closed(path: &Path, closed: Closed) -> io::Result<Zeroizing<String>> {
    let mut text = Zeroizing::new(String::new());
    open(path, closed)?.read_to_string(&mut text).map_err(|e| named(path, e))?;
    Ok(text)
}

/// Follows symbolic links, which Secret volumes consist of, and checks the file that they lead to.
fn open(path: &Path, closed: Closed) -> io::Result<File> {
    // Without O_NONBLOCK, opening a FIFO would wait for its writer.
    let file = OpenOptions::new().read(true).custom_flags(libc::O_NONBLOCK).open(path);
    let file = file.map_err(|e| named(path, e))?;
    let metadata = file.metadata().map_err(|e| named(path, e))?;
    refuse_open(path, &metadata, closed)?;
    Ok(file)
}

fn refuse_open(path: &Path, metadata: &Metadata, closed: Closed) -> io::Result<()> {
    let shown = path.display();
    if !metadata.is_file() {
        return Err(io::Error::new(io::ErrorKind::InvalidInput, format!("{shown} is not a file")));
    }
    let (owner, user) = (metadata.uid(), rustix::process::geteuid().as_raw());
    if owner != 0 && owner != user {
        return Err(denied(format!(
            "{shown} belongs to uid {owner}, and this process runs as uid {user}: run it as its owner, or `chown {user} {shown}`"
        )));
    }
    let mode = metadata.mode() & 0o7777;
    if mode & closed as u32 == 0 {
        return Ok(());
    }
    Err(denied(match closed {
        Closed::Secret | Closed::GivenSecret => {
            format!("{shown} holds secrets and has mode {mode:04o}, open to others: chmod 600 {shown}")
        }
        Closed::Public => {
            format!("{shown} has mode {mode:04o}, so others than its owner can change it: chmod 644 {shown}")
        }
    }))
}

fn denied(message: String) -> io::Error {
    io::Error::new(io::ErrorKind::PermissionDenied, message)
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

/// Makes the name of a file last: without this, a loss of power could bring back the file that it has replaced, such as a
/// list of what is revoked.
fn sync_directory(path: &Path) -> io::Result<()> {
    let directory = path.parent().filter(|directory| !directory.as_os_str().is_empty());
    File::open(directory.unwrap_or(Path::new(".")))?.sync_all()
}

fn named(path: &Path, error: io::Error) -> io::Error {
    io::Error::new(error.kind(), format!("{}: {error}", path.display()))
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::{PermissionsExt, chown, symlink};

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

    fn set_mode(path: &Path, mode: u32) {
        std::fs::set_permissions(path, std::fs::Permissions::from_mode(mode)).unwrap();
    }

    #[test]
    fn files_are_for_their_owner_only() {
        let dir = TempDir::new();
        assert_eq!(mode(&dir.0), 0o700);
        let path = dir.0.join("key");
        write_new(&path, b"one").unwrap();
        assert_eq!((mode(&path), read(&path).unwrap().as_str()), (0o600, "one"));
        assert_eq!(write_new(&path, b"two").unwrap_err().kind(), io::ErrorKind::AlreadyExists);
        assert_eq!(read(&path).unwrap().as_str(), "one");
        replace(&path, b"three").unwrap();
        assert_eq!((mode(&path), read(&path).unwrap().as_str()), (0o600, "three"));
        assert_eq!(std::fs::read_dir(&dir.0).unwrap().count(), 1, "no temporary file is left");
    }

    #[test]
    fn modes_that_are_refused() {
        let dir = TempDir::new();
        let path = dir.0.join("key");
        write_new(&path, b"x").unwrap();
        // Read as the agent's own secret, as one that it was given, and as a public file.
        for (mode, good) in [
            (0o600, [true, true, true]),
            (0o400, [true, true, true]),
            (0o640, [false, true, true]),
            (0o440, [false, true, true]),
            (0o644, [false, false, true]),
            (0o604, [false, false, true]),
            (0o660, [false, false, false]),
            (0o620, [false, false, false]),
            (0o602, [false, false, false]),
            (0o666, [false, false, false]),
        ] {
            set_mode(&path, mode);
            let errors = [read(&path).err(), read_given(&path).err(), read_public(&path).err()];
            assert_eq!(errors.each_ref().map(Option::is_none), good, "{mode:o}");
            assert_eq!([check(&path).is_ok(), check_given(&path).is_ok()], good[..2], "{mode:o}");
            for error in errors.into_iter().flatten() {
                let text = error.to_string();
                assert_eq!(error.kind(), io::ErrorKind::PermissionDenied);
                assert!(text.contains(&format!("mode {mode:04o}")) && text.contains("chmod 6"), "{text}");
            }
        }
    }

    #[test]
    fn what_belongs_to_another_user_is_refused() {
        let dir = TempDir::new();
        let path = dir.0.join("key");
        write_new(&path, b"x").unwrap();
        // Only root can give a file away.
        if chown(&path, Some(65534), None).is_err() {
            return;
        }
        for error in [read(&path).map(drop), read_given(&path).map(drop), read_public(&path).map(drop)] {
            let text = error.unwrap_err().to_string();
            assert!(
                text.contains("uid 65534") && text.contains(&format!("chown 0 {}", path.display())),
                "{text}"
            );
        }
        chown(&dir.0, Some(65534), None).unwrap();
        for error in [check_directory(&dir.0), create_directory(&dir.0)] {
            let text = error.unwrap_err().to_string();
            assert!(
                text.contains("uid 65534") && text.contains(&format!("chown -R 0 {}", dir.0.display())),
                "{text}"
            );
        }
    }

    #[test]
    fn a_directory_is_its_owners_to_change() {
        let dir = TempDir::new();
        for (mode, good) in
            [(0o700, true), (0o755, true), (0o770, false), (0o777, false), (0o702, false), (0o1777, false)]
        {
            set_mode(&dir.0, mode);
            let checked = create_directory(&dir.0).map_err(|e| e.to_string());
            match good {
                true => assert_eq!(checked, Ok(()), "{mode:o}"),
                false => {
                    let error = checked.unwrap_err();
                    assert!(error.contains(&format!("chmod 700 {}", dir.0.display())), "{error}");
                }
            }
        }
        let file = dir.0.join("file");
        write_new(&file, b"").unwrap();
        assert!(create_directory(&file).unwrap_err().to_string().contains("is not a directory"));
    }

    #[test]
    fn a_link_counts_as_the_file_that_it_leads_to() {
        let dir = TempDir::new();
        let (file, link) = (dir.0.join("..data"), dir.0.join("tls.key"));
        write_new(&file, b"x").unwrap();
        symlink("..data", &link).unwrap();
        set_mode(&file, 0o440);
        assert_eq!(read_given(&link).unwrap().as_str(), "x");
        set_mode(&file, 0o444);
        assert!(read_given(&link).is_err());
        std::fs::remove_file(&file).unwrap();
        assert_eq!(read_given(&link).unwrap_err().kind(), io::ErrorKind::NotFound);
    }

    #[test]
    fn what_is_no_file_is_refused_and_not_waited_for() {
        let dir = TempDir::new();
        let fifo = dir.0.join("fifo");
        assert!(std::process::Command::new("mkfifo").arg(&fifo).status().unwrap().success());
        set_mode(&fifo, 0o600);
        for path in [&fifo, &dir.0] {
            assert!(read(path).unwrap_err().to_string().contains("is not a file"));
        }
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
