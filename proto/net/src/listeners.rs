//! The sockets that an agent listens on. Its next process takes them over, so no connection is refused between them.

use std::{
    collections::HashMap,
    fmt, io,
    net::SocketAddr,
    ops::Deref,
    os::fd::{AsFd, OwnedFd},
    path::{Path, PathBuf},
    sync::{Mutex, MutexGuard, PoisonError},
};

use serde::{Deserialize, Serialize};
use tokio::{
    net::{TcpListener, UnixListener},
    sync::watch,
};

use super::{
    accept::{Listener, Tuning},
    socket, unix,
};

/// What a socket is configured to listen on.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Address {
    Tcp(SocketAddr),
    Unix(PathBuf),
}

impl fmt::Display for Address {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Tcp(address) => address.fmt(f),
            Self::Unix(path) => path.display().fmt(f),
        }
    }
}

/// When a process that takes over begins to accept on a socket.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stage {
    /// At once, since its links come in there.
    Links,
    /// Once it has the links that its callers need.
    Callers,
}

/// Sockets by their address.
pub type Inherited = HashMap<Address, OwnedFd>;

/// All sockets that a process listens on.
#[derive(Debug)]
pub struct Listeners {
    /// Those that the process began with, as long as nobody has asked for them.
    inherited: Inherited,
    /// A handle to each socket in use, for the process after.
    bound: Mutex<Vec<(Address, OwnedFd)>>,
    /// What is to be done to the files of Unix sockets once this process accepts callers. Until then, the process before
    /// does, and may go on to do so.
    changes: Mutex<Vec<Change>>,
    links: watch::Sender<bool>,
    callers: watch::Sender<bool>,
}

#[derive(Debug)]
enum Change {
    /// Who may connect to a socket that is taken over.
    Access(PathBuf, Access),
    /// A socket takes the place of another one.
    Replace { temporary: PathBuf, path: PathBuf },
}

/// The mode, owner and group of a Unix socket's file.
type Access = (u32, Option<u32>, Option<u32>);

impl Change {
    fn apply(self) -> io::Result<()> {
        match self {
            Self::Access(path, (mode, owner, group)) => unix::set_access(&path, mode, owner, group),
            Self::Replace { temporary, path } => std::fs::rename(temporary, path),
        }
    }
}

impl Listeners {
    /// Listeners of a process that accepts connections as soon as a socket is served.
    pub fn new() -> Self {
        Self::with_sockets(Inherited::new())
    }

    /// The same for a process that has been started with sockets.
    pub fn with_sockets(sockets: Inherited) -> Self {
        Self::with(sockets, true)
    }

    /// Listeners of a process that takes over from another one, and accepts nothing until it is told to.
    pub fn taking_over(inherited: Inherited) -> Self {
        Self::with(inherited, false)
    }

    fn with(inherited: Inherited, accepts: bool) -> Self {
        let [links, callers] = std::array::from_fn(|_| watch::Sender::new(accepts));
        let (bound, changes) = (Mutex::default(), Mutex::default());
        Self { inherited, bound, changes, links, callers }
    }

    /// Listens on a TCP address, with the socket of the process before if it had one there.
    pub fn tcp(&mut self, address: SocketAddr, stage: Stage) -> io::Result<Pausable<TcpListener>> {
        let key = Address::Tcp(address);
        let listener = match self.inherited.remove(&key) {
            Some(inherited) => {
                let listener = std::net::TcpListener::from(inherited);
                listener.set_nonblocking(true)?;
                TcpListener::from_std(listener)?
            }
            None => socket::listen(address)?,
        };
        self.keep(key, listener, stage)
    }

    /// Listens on a path as [`unix::bind`] does, with the socket of the process before if it had one there and nobody has
    /// removed it.
    pub fn unix(&mut self, path: &Path, access: Access, stage: Stage) -> io::Result<Pausable<UnixListener>> {
        let (mode, owner, group) = access;
        let key = Address::Unix(path.to_owned());
        let listener = match self.inherited.remove(&key).filter(|_| unix::is_socket(path)) {
            Some(inherited) if unix::belongs_to(path, owner, group) => {
                let listener = std::os::unix::net::UnixListener::from(inherited);
                listener.set_nonblocking(true)?;
                self.change(Change::Access(path.to_owned(), access))?;
                UnixListener::from_std(listener)?
            }
            // Its owner or group can't always be changed.
            Some(_) => {
                let (listener, temporary) = unix::bind_beside(path, mode, owner, group)?;
                self.change(Change::Replace { temporary, path: path.to_owned() })?;
                listener
            }
            None => unix::bind(path, mode, owner, group)?,
        };
        self.keep(key, listener, stage)
    }

    /// Changes a file now if this process accepts callers already, and otherwise when it does.
    fn change(&self, change: Change) -> io::Result<()> {
        if *self.callers.borrow() {
            return change.apply();
        }
        self.changes.lock().unwrap_or_else(PoisonError::into_inner).push(change);
        Ok(())
    }

    fn keep<L: AsFd>(&mut self, address: Address, listener: L, stage: Stage) -> io::Result<Pausable<L>> {
        let handle = listener.as_fd().try_clone_to_owned()?;
        self.bound().push((address, handle));
        Ok(Pausable { listener, accepts: self.stage(stage).subscribe() })
    }

    /// Closes the sockets of the process before that this one does not use, and returns their addresses.
    pub fn close_unused(&mut self) -> Vec<Address> {
        self.inherited.drain().map(|(address, _)| address).collect()
    }

    /// Closes the handles to some sockets, which are then closed with the tasks that accept on them.
    pub fn close_handles(&self, which: &[Address]) {
        self.bound().retain(|(address, _)| !which.contains(address));
    }

    /// Closes the handles to all sockets.
    pub fn close_all_handles(&self) {
        self.bound().clear();
    }

    /// A handle to each socket in use.
    pub fn handles(&self) -> io::Result<Vec<(Address, OwnedFd)>> {
        let copy = |(address, handle): &(Address, OwnedFd)| Ok((address.clone(), handle.try_clone()?));
        self.bound().iter().map(copy).collect()
    }

    fn bound(&self) -> MutexGuard<'_, Vec<(Address, OwnedFd)>> {
        self.bound.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Accepts connections on the sockets of a stage from now on, or leaves them in the kernel's queue.
    pub fn accept(&self, stage: Stage, accepts: bool) {
        if (stage, accepts) == (Stage::Callers, true) {
            for change in self.changes.lock().unwrap_or_else(PoisonError::into_inner).drain(..) {
                if let Err(error) = change.apply() {
                    tracing::error!(%error, "can't change the file of a Unix socket");
                }
            }
        }
        self.stage(stage).send_replace(accepts);
    }

    fn stage(&self, stage: Stage) -> &watch::Sender<bool> {
        match stage {
            Stage::Links => &self.links,
            Stage::Callers => &self.callers,
        }
    }
}

impl Drop for Listeners {
    /// A process that never serves leaves nothing behind.
    fn drop(&mut self) {
        for change in self.changes.get_mut().unwrap_or_else(PoisonError::into_inner).drain(..) {
            if let Change::Replace { temporary, .. } = change {
                let _ = std::fs::remove_file(temporary);
            }
        }
    }
}

impl Default for Listeners {
    fn default() -> Self {
        Self::new()
    }
}

/// A listener that accepts connections only while its [`Listeners`] say so, or while nobody can say anything any more.
#[derive(Debug)]
pub struct Pausable<L> {
    listener: L,
    accepts: watch::Receiver<bool>,
}

impl<L> From<L> for Pausable<L> {
    /// A listener that is never paused.
    fn from(listener: L) -> Self {
        Self { listener, accepts: watch::channel(true).1 }
    }
}

impl<L> Deref for Pausable<L> {
    type Target = L;

    fn deref(&self) -> &L {
        &self.listener
    }
}

impl<L: Listener> Listener for Pausable<L> {
    type Socket = L::Socket;
    type Peer = L::Peer;

    async fn accept(&self) -> io::Result<(L::Socket, L::Peer)> {
        let mut accepts = self.accepts.clone();
        loop {
            // An error says that nothing will change.
            let _ = accepts.wait_for(|accepts| *accepts).await;
            let paused = async {
                if accepts.wait_for(|accepts| !*accepts).await.is_err() {
                    std::future::pending::<()>().await;
                }
            };
            tokio::select! {
                // Nothing is accepted any more once the listener is paused.
                biased;
                () = paused => {}
                accepted = self.listener.accept() => return accepted,
            }
        }
    }

    fn tune(socket: &L::Socket, tuning: Tuning) {
        L::tune(socket, tuning);
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use tokio::{net::TcpStream, time::timeout};

    use super::*;

    const A_WHILE: Duration = Duration::from_millis(100);

    /// The sockets as the process after gets them.
    fn handed_over(listeners: &Listeners) -> Inherited {
        listeners.handles().unwrap().into_iter().collect()
    }

    /// A free port. Others may take it, but nobody does on an address of this test alone.
    fn free_address() -> SocketAddr {
        std::net::TcpListener::bind("127.77.3.1:0").unwrap().local_addr().unwrap()
    }

    #[tokio::test]
    async fn a_connection_waits_while_its_listener_is_paused_and_is_served_by_the_process_after() {
        let address = free_address();
        let mut before = Listeners::new();
        let first = before.tcp(address, Stage::Links).unwrap();
        let mut after = Listeners::taking_over(handed_over(&before));
        let second = after.tcp(address, Stage::Links).unwrap();
        after.close_unused();
        before.accept(Stage::Links, false);
        let _waits = TcpStream::connect(address).await.unwrap();
        for paused in [&first, &second] {
            assert!(timeout(A_WHILE, paused.accept()).await.is_err());
        }
        // Callers are another stage.
        after.accept(Stage::Callers, true);
        assert!(timeout(A_WHILE, second.accept()).await.is_err());
        after.accept(Stage::Links, true);
        second.accept().await.unwrap();
        drop((before, first));
        let _later = TcpStream::connect(address).await.unwrap();
        second.accept().await.unwrap();
        // If the process after fails, the present one goes on.
        let third = after.tcp(free_address(), Stage::Links).unwrap();
        after.accept(Stage::Links, false);
        assert!(timeout(A_WHILE, third.accept()).await.is_err());
    }

    #[tokio::test]
    async fn a_listener_that_is_paused_while_it_waits_accepts_nothing_until_it_goes_on() {
        let address = free_address();
        let mut listeners = Listeners::new();
        let listener = listeners.tcp(address, Stage::Callers).unwrap();
        let pausing = async {
            tokio::time::sleep(A_WHILE).await;
            listeners.accept(Stage::Callers, false);
            let socket = TcpStream::connect(address).await.unwrap();
            tokio::time::sleep(A_WHILE).await;
            socket
        };
        tokio::select! {
            _ = listener.accept() => panic!("accepted while paused"),
            _socket = pausing => {}
        }
        listeners.accept(Stage::Callers, true);
        listener.accept().await.unwrap();
        // Without anybody who could pause it, it goes on.
        drop(listeners);
        let _socket = TcpStream::connect(address).await.unwrap();
        listener.accept().await.unwrap();
    }

    #[tokio::test]
    async fn a_unix_socket_is_taken_over_with_new_access_unless_its_file_is_gone() {
        use std::os::unix::fs::PermissionsExt;
        let directory = std::env::temp_dir().join(format!("listeners-{}", std::process::id()));
        let path = directory.join("test.sock");
        let mut before = Listeners::new();
        let first = before.unix(&path, (0o600, None, None), Stage::Callers).unwrap();
        let mut after = Listeners::taking_over(handed_over(&before));
        let mode = || std::fs::metadata(&path).unwrap().permissions().mode() & 0o777;
        let second = after.unix(&path, (0o660, None, None), Stage::Callers).unwrap();
        assert_eq!(mode(), 0o600, "it is still the former one's");
        after.accept(Stage::Callers, true);
        drop((before, first));
        assert_eq!(mode(), 0o660);
        let _caller = tokio::net::UnixStream::connect(&path).await.unwrap();
        second.accept().await.unwrap();
        std::fs::remove_file(&path).unwrap();
        let mut last = Listeners::taking_over(handed_over(&after));
        let third = last.unix(&path, (0o600, None, None), Stage::Callers).unwrap();
        last.accept(Stage::Callers, true);
        let _caller = tokio::net::UnixStream::connect(&path).await.unwrap();
        third.accept().await.unwrap();
        std::fs::remove_dir_all(directory).unwrap();
    }

    #[tokio::test]
    async fn sockets_that_the_process_after_does_not_use_are_closed() {
        let (kept, unused) = (free_address(), free_address());
        let mut before = Listeners::new();
        let _sockets = [kept, unused].map(|address| before.tcp(address, Stage::Links).unwrap());
        let mut after = Listeners::taking_over(handed_over(&before));
        let _socket = after.tcp(kept, Stage::Links).unwrap();
        assert_eq!(after.close_unused(), [Address::Tcp(unused)]);
        drop((before, _sockets));
        assert!(TcpStream::connect(unused).await.is_err());
        assert!(TcpStream::connect(kept).await.is_ok());
    }
}
