//! Unix sockets to listen on.

use std::{
    io::{self, ErrorKind},
    os::unix::fs::{FileTypeExt, PermissionsExt},
    path::Path,
};

use tokio::net::{UnixListener, UnixSocket};

use super::socket::BACKLOG;

/// Binds a Unix socket that never exists with other rights than it is to have: made under another name, then
/// renamed. A socket nobody listens on is replaced. Without `owner` and `group` these are the process's.
pub fn bind(path: &Path, mode: u32, owner: Option<u32>, group: Option<u32>) -> io::Result<UnixListener> {
    match std::fs::symlink_metadata(path) {
        Ok(metadata) if !metadata.file_type().is_socket() => {
            return Err(io::Error::other("a file that is no socket is there"));
        }
        Ok(_) if std::os::unix::net::UnixStream::connect(path).is_ok() => {
            return Err(io::Error::other("another process does"));
        }
        Ok(_) => {}
        Err(e) if e.kind() == ErrorKind::NotFound => {}
        Err(e) => return Err(e),
    }
    if let Some(directory) = path.parent() {
        std::fs::create_dir_all(directory)?;
    }
    let temporary = path.with_file_name(format!(".{}", std::process::id()));
    let _ = std::fs::remove_file(&temporary);
    let socket = UnixSocket::new_stream()?;
    socket.bind(&temporary)?;
    let listener = socket.listen(BACKLOG)?;
    let finish = || {
        std::fs::set_permissions(&temporary, std::fs::Permissions::from_mode(mode))?;
        std::os::unix::fs::chown(&temporary, owner, group)?;
        std::fs::rename(&temporary, path)
    };
    finish().inspect_err(|_| {
        let _ = std::fs::remove_file(&temporary);
    })?;
    Ok(listener)
}
