//! Unix sockets: binding them with the right owner and mode.

use std::{
    fs::{DirBuilder, Permissions},
    io::{self, ErrorKind},
    os::unix::fs::{DirBuilderExt, FileTypeExt, MetadataExt, PermissionsExt},
    path::{Path, PathBuf},
};

use rustix::process::{getegid, geteuid};
use tokio::net::{UnixListener, UnixSocket};

use super::socket::BACKLOG;

const FOREIGN_OWNER: &str = "the owner and group can't be set: without root, the owner can only be the process's \
    own user and the group one that it is in; under systemd the drop-in socket-group.conf permits that (deploy/systemd)";

/// Binds a Unix socket. It is made under another name and then renamed, so that it never exists under its own with other
/// permissions than these. A socket that nobody listens on is replaced. Without `owner` and `group`, the socket belongs to
/// those of the process.
///
/// A directory that does not exist is made. Others cannot list it, and can reach the socket in it only if the socket's
/// mode lets others connect.
pub fn bind(path: &Path, mode: u32, owner: Option<u32>, group: Option<u32>) -> io::Result<UnixListener> {
    refuse_taken(path)?;
    let (listener, temporary) = bind_beside(path, mode, owner, group)?;
    std::fs::rename(&temporary, path).inspect_err(|_| {
        let _ = std::fs::remove_file(&temporary);
    })?;
    Ok(listener)
}

/// Refuses a path at which another process listens, or something else is.
fn refuse_taken(path: &Path) -> io::Result<()> {
    match std::fs::symlink_metadata(path) {
        Ok(metadata) if !metadata.file_type().is_socket() => {
            Err(io::Error::other("a file that is no socket is there"))
        }
        Ok(_) if std::os::unix::net::UnixStream::connect(path).is_ok() => {
            Err(io::Error::other("another process does"))
        }
        Ok(_) => Ok(()),
        Err(e) if e.kind() == ErrorKind::NotFound => Ok(()),
        Err(e) => Err(e),
    }
}

/// Binds a socket that is to take the place of another one at `path`, under the name that is returned.
pub(super) fn bind_beside(
    path: &Path,
    mode: u32,
    owner: Option<u32>,
    group: Option<u32>,
) -> io::Result<(UnixListener, PathBuf)> {
    if let Some(directory) = path.parent() {
        create_directory(directory, if mode & 0o077 == 0 { 0o700 } else { 0o711 })?;
    }
    let name = path.file_name().unwrap_or_default().to_string_lossy();
    let temporary = path.with_file_name(format!(".{name}.{}", std::process::id()));
    let _ = std::fs::remove_file(&temporary);
    let socket = UnixSocket::new_stream()?;
    socket.bind(&temporary)?;
    let listener = socket.listen(BACKLOG)?;
    set_access(&temporary, mode, owner, group).inspect_err(|_| {
        let _ = std::fs::remove_file(&temporary);
    })?;
    Ok((listener, temporary))
}

/// Sets who may connect to a socket.
pub(super) fn set_access(path: &Path, mode: u32, owner: Option<u32>, group: Option<u32>) -> io::Result<()> {
    std::fs::set_permissions(path, Permissions::from_mode(mode))?;
    if owner.is_none() && group.is_none() {
        return Ok(());
    }
    std::os::unix::fs::chown(path, owner, group).map_err(|e| {
        if e.kind() == ErrorKind::PermissionDenied { io::Error::new(e.kind(), FOREIGN_OWNER) } else { e }
    })
}

/// Whether a socket's file is there.
pub(super) fn is_socket(path: &Path) -> bool {
    std::fs::symlink_metadata(path).is_ok_and(|metadata| metadata.file_type().is_socket())
}

/// Whether a file belongs to whom a new one would belong.
pub(super) fn belongs_to(path: &Path, owner: Option<u32>, group: Option<u32>) -> bool {
    let owner = owner.unwrap_or_else(|| geteuid().as_raw());
    let group = group.unwrap_or_else(|| getegid().as_raw());
    std::fs::symlink_metadata(path).is_ok_and(|found| (found.uid(), found.gid()) == (owner, group))
}

/// Creates a directory with this mode, whatever the umask is. A directory that exists keeps its own.
fn create_directory(path: &Path, mode: u32) -> io::Result<()> {
    if path.as_os_str().is_empty() || path.is_dir() {
        return Ok(());
    }
    if let Some(parent) = path.parent() {
        std::fs::create_dir_all(parent)?;
    }
    match DirBuilder::new().mode(mode).create(path) {
        Ok(()) => std::fs::set_permissions(path, Permissions::from_mode(mode)),
        // Somebody else made the directory in the meantime.
        Err(e) if e.kind() == ErrorKind::AlreadyExists => Ok(()),
        Err(e) => Err(e),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn mode(path: &Path) -> u32 {
        std::fs::metadata(path).unwrap().permissions().mode() & 0o7777
    }

    #[tokio::test]
    async fn a_directory_is_as_open_as_the_socket_that_it_is_made_for() {
        let root = std::env::temp_dir().join(format!("unix-bind-{}", std::process::id()));
        for (name, socket, directory) in
            [("own", 0o600, 0o700), ("group", 0o660, 0o711), ("all", 0o666, 0o711)]
        {
            let path = root.join("run").join(name).join("test.sock");
            let _listener = bind(&path, socket, None, None).unwrap();
            assert_eq!((mode(&path), mode(path.parent().unwrap())), (socket, directory), "{name}");
        }
        // A directory that exists keeps its mode.
        let directory = root.join("run/own");
        std::fs::set_permissions(&directory, Permissions::from_mode(0o755)).unwrap();
        let _listener = bind(&directory.join("other.sock"), 0o600, None, None).unwrap();
        assert_eq!(mode(&directory), 0o755);
        std::fs::remove_dir_all(root).unwrap();
    }
}
