//! The sockets that systemd keeps for a service (`FileDescriptorStoreMax=`), or listens on for it (`Sockets=`). They stay open
//! while the service is restarted, so callers wait in their queues and are not refused.

use std::{
    env, io,
    os::{
        fd::{AsFd, OwnedFd},
        unix::net::UnixDatagram,
    },
    path::PathBuf,
};

use listenfd::ListenFd;
use percent_encoding::{AsciiSet, CONTROLS, percent_decode_str, utf8_percent_encode};
use sd_notify::NotifyState;

use super::{
    descriptors,
    listeners::{Address, Inherited, Listeners},
};

/// What systemd does not permit in a name, and what would not be decoded right.
const ENCODED: &AsciiSet = &CONTROLS.add(b' ').add(b':').add(b'%');

/// Takes the sockets with which systemd has started this process. To be called once, before others open descriptors.
pub fn take() -> Inherited {
    if env::var_os("LISTEN_PID").is_none() {
        return Inherited::new();
    }
    let names = env::var("LISTEN_FDNAMES").unwrap_or_default();
    let mut names = names.split(':');
    let mut given = ListenFd::from_env();
    let sockets = (0..given.len()).filter_map(|index| socket(&mut given, index, names.next()?));
    let sockets: Inherited = sockets.collect();
    tracing::debug!(count = sockets.len(), "listening on sockets that systemd has kept");
    sockets
}

/// A socket and its address. That of a Unix socket is its name in the store, since the kernel knows the name under which it
/// was made; systemd's own (`Sockets=`) have another name, and were made in their place.
fn socket(given: &mut ListenFd, index: usize, name: &str) -> Option<(Address, OwnedFd)> {
    if let Ok(Some(listener)) = given.take_tcp_listener(index) {
        return Some((Address::Tcp(listener.local_addr().ok()?), listener.into()));
    }
    let listener = given.take_unix_listener(index).ok()??;
    let path = match path(name) {
        Some(path) => path,
        None => listener.local_addr().ok()?.as_pathname()?.to_owned(),
    };
    Some((Address::Unix(path), listener.into()))
}

/// Has systemd keep the sockets in use, if the unit permits that, and forget those that are not in use any more.
pub fn keep(listeners: &Listeners, unused: &[Address]) {
    let kept = listeners.handles().and_then(|handles| {
        unused.iter().try_for_each(forget)?;
        handles.iter().try_for_each(|(address, socket)| {
            // Otherwise a former socket of the same name would stay beside it.
            forget(address)?;
            // systemd would drop a socket that it finds ready to be read.
            let state = format!("FDSTORE=1\nFDPOLL=0\nFDNAME={}\n", name(address));
            send(&state, socket)
        })
    });
    if let Err(error) = kept {
        tracing::debug!(%error, "systemd keeps no sockets");
    }
}

fn forget(address: &Address) -> io::Result<()> {
    sd_notify::notify(&[
        NotifyState::Custom("FDSTOREREMOVE=1"),
        NotifyState::Custom(&format!("FDNAME={}", name(address))),
    ])
}

fn send(state: &str, socket: &OwnedFd) -> io::Result<()> {
    let Some(path) = env::var_os("NOTIFY_SOCKET") else { return Ok(()) };
    let systemd = UnixDatagram::unbound()?;
    systemd.connect(path)?;
    descriptors::send(&systemd, state.as_bytes(), &[socket.as_fd()])
}

/// The name of a socket in the store.
fn name(address: &Address) -> String {
    utf8_percent_encode(&address.to_string(), ENCODED).to_string()
}

/// The path of a Unix socket by its name.
fn path(name: &str) -> Option<PathBuf> {
    let path = percent_decode_str(name).decode_utf8().ok()?;
    path.starts_with('/').then(|| PathBuf::from(path.into_owned()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_has_no_characters_that_systemd_refuses_and_says_the_path() {
        let tcp = Address::Tcp("[::1]:22".parse().unwrap());
        assert_eq!((name(&tcp).as_str(), path(&name(&tcp))), ("[%3A%3A1]%3A22", None));
        for (path_of, expected) in [
            ("/run/agent/admin.sock", "/run/agent/admin.sock"),
            ("/run/a b/ü:%.sock", "/run/a%20b/%C3%BC%3A%25.sock"),
        ] {
            let name = name(&Address::Unix(PathBuf::from(path_of)));
            assert_eq!((name.as_str(), path(&name)), (expected, Some(PathBuf::from(path_of))));
        }
        assert_eq!(path("agent.socket"), None);
    }
}
