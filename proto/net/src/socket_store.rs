//! The sockets that systemd keeps for a service (`FileDescriptorStoreMax=`), or listens on for it (`Sockets=`). They stay open
//! while the service is restarted, so callers wait in their queues and are not refused.
//!
//! Sockets are recognised by the addresses that they are bound to. So it does not matter who has made them.

use std::{
    env, io,
    os::{
        fd::{AsFd, OwnedFd},
        unix::net::UnixDatagram,
    },
};

use listenfd::ListenFd;
use sd_notify::NotifyState;

use super::{
    descriptors,
    listeners::{Address, Inherited, Listeners},
};

/// Takes the sockets with which systemd has started this process. To be called once, before others open descriptors.
pub fn take() -> Inherited {
    if env::var_os("LISTEN_PID").is_none() {
        return Inherited::new();
    }
    let mut given = ListenFd::from_env();
    let sockets = (0..given.len()).filter_map(|index| socket(&mut given, index));
    let sockets: Inherited = sockets.collect();
    tracing::debug!(count = sockets.len(), "listening on sockets that systemd has kept");
    sockets
}

fn socket(given: &mut ListenFd, index: usize) -> Option<(Address, OwnedFd)> {
    if let Ok(Some(listener)) = given.take_tcp_listener(index) {
        return Some((Address::Tcp(listener.local_addr().ok()?), listener.into()));
    }
    let listener = given.take_unix_listener(index).ok()??;
    let path = listener.local_addr().ok()?.as_pathname()?.to_owned();
    Some((Address::Unix(path), listener.into()))
}

/// Has systemd keep the sockets in use, if the unit permits that, and forget those that are not in use any more.
pub fn keep(listeners: &Listeners, unused: &[Address]) {
    let forgotten = unused.iter().try_for_each(forget);
    let kept = forgotten.and_then(|()| listeners.handles()).and_then(|handles| {
        handles.iter().try_for_each(|(address, socket)| {
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

/// The name of a socket, in the characters that systemd permits.
fn name(address: &Address) -> String {
    let permitted = |c: char| if c.is_ascii_graphic() && c != ':' { c } else { '_' };
    address.to_string().chars().map(permitted).collect()
}

#[cfg(test)]
mod tests {
    use std::path::PathBuf;

    use super::*;

    #[test]
    fn names_have_no_characters_that_systemd_refuses() {
        for (address, expected) in [
            (Address::Tcp("[::1]:22".parse().unwrap()), "[__1]_22"),
            (Address::Unix(PathBuf::from("/run/a b/ü.sock")), "/run/a_b/_.sock"),
        ] {
            assert_eq!(name(&address), expected);
        }
    }
}
