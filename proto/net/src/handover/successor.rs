//! The running process's side: it starts the next process, and follows what becomes of it.

use std::{
    io,
    os::fd::{AsFd, OwnedFd},
    path::PathBuf,
    time::Duration,
};

use rustix::process::{Signal, pidfd_send_signal};
use tokio::{
    process::Command,
    time::{Instant, timeout},
};

use super::{
    channel::Channel,
    draining::Draining,
    message::{Message, PEERS},
    program::Program,
};
use crate::listeners::{Address, Listeners};

/// How long the next process may take to read and check everything.
const LOAD_TIMEOUT: Duration = Duration::from_secs(30);
/// How long it may take from then on until it serves, most of which it may spend on waiting for links.
const SERVE_TIMEOUT: Duration = Duration::from_secs(60);
/// How long systemd may take to learn which process is the main one.
pub(super) const JUST_REPLACED: Duration = Duration::from_secs(1);

/// Why the running process goes on. The text is for people.
#[derive(Debug, thiserror::Error)]
pub enum HandoverError {
    #[error("can't start {program}: {error}")]
    Start { program: PathBuf, error: io::Error },
    #[error("the new process can't serve: {0}")]
    Failed(String),
    #[error("the new process ended before it served; its log says why")]
    Ended,
    #[error("the new process {what} within {}", humantime::format_duration(*.limit))]
    Late { what: &'static str, limit: Duration },
    #[error("can't speak with the new process: {0}")]
    Channel(#[from] io::Error),
    #[error("the new process has said something unexpected")]
    Unexpected,
}

/// The next process. Dropping this ends it unless it serves.
#[derive(Debug)]
pub struct Successor {
    channel: Channel,
    /// What `pidfd_open(2)` gives.
    process: OwnedFd,
    /// Since when it serves.
    since: Option<Instant>,
    unused: Vec<Address>,
    pub pid: u32,
    pub version: String,
}

impl Successor {
    /// Starts the next process, and hands it the sockets. Returns once it has read and checked everything.
    pub async fn start(
        program: &Program,
        listeners: &Listeners,
        peers: Vec<String>,
    ) -> Result<Self, HandoverError> {
        let (channel, stdin) = Channel::pair()?;
        let mut starter = Command::from(program.start_next())
            .stdin(stdin)
            .kill_on_drop(true)
            .spawn()
            .map_err(|error| HandoverError::Start { program: program.path().to_owned(), error })?;
        let loading = async {
            let (pid, process) = match channel.receive().await? {
                Some((Message::Started(pid), Some(process))) => (pid, process),
                // It was faster than the process that has started it.
                Some((Message::Failed(why), _)) => return Err(HandoverError::Failed(why)),
                Some(_) => return Err(HandoverError::Unexpected),
                None => return Err(HandoverError::Ended),
            };
            let (version, unused) = (String::new(), Vec::new());
            let mut next = Self { channel, process, since: None, unused, pid, version };
            starter.wait().await?;
            say_all(&next.channel, listeners, &peers).await?;
            let Message::Loaded { version, unused } = next.answer().await? else {
                return Err(HandoverError::Unexpected);
            };
            (next.version, next.unused) = (version, unused);
            Ok(next)
        };
        let limit = LOAD_TIMEOUT;
        let late = HandoverError::Late { what: "has not read its files", limit };
        timeout(limit, loading).await.unwrap_or(Err(late))
    }

    /// Lets the next process accept and make links, and waits until it serves everybody.
    ///
    /// The sockets that it does not need are closed then.
    pub async fn serve(&mut self, listeners: &Listeners) -> Result<(), HandoverError> {
        let serving = async {
            self.channel.send(&Message::Link).await?;
            let Message::Serving = self.answer().await? else { return Err(HandoverError::Unexpected) };
            Ok(())
        };
        let limit = SERVE_TIMEOUT;
        let late = HandoverError::Late { what: "does not serve", limit };
        timeout(limit, serving).await.unwrap_or(Err(late))?;
        self.since = Some(Instant::now());
        listeners.close_handles(&self.unused);
        Ok(())
    }

    /// The next message, unless that says that the process has failed.
    async fn answer(&self) -> Result<Message, HandoverError> {
        match self.channel.receive().await? {
            Some((Message::Failed(why), _)) => Err(HandoverError::Failed(why)),
            Some((message, _)) => Ok(message),
            None => Err(HandoverError::Ended),
        }
    }

    /// Tells the next process what this one and those before it still carry.
    pub async fn report(&self, draining: Draining) {
        let _ = self.channel.send(&Message::Draining(draining)).await;
    }

    /// Waits until the process says that it has been told to stop, or has ended without that (`false`). Cancel-safe.
    pub async fn stops(&self) -> bool {
        while let Ok(Some((message, _))) = self.channel.receive().await {
            if message == Message::Stopping {
                return true;
            }
        }
        false
    }
}

impl Successor {
    /// Waits until the former process is `told` to stop. If that is soon after the handover, it was meant for the next one,
    /// which is told, too.
    pub async fn stops_with(&self, told: impl Future<Output = ()>) {
        told.await;
        if self.since.is_some_and(|since| since.elapsed() < JUST_REPLACED) {
            let _ = pidfd_send_signal(&self.process, Signal::TERM);
        }
    }
}

impl Drop for Successor {
    fn drop(&mut self) {
        if self.since.is_none() {
            // It must not begin to serve later.
            let _ = pidfd_send_signal(&self.process, Signal::KILL);
        }
    }
}

/// Says everything that the next process needs.
async fn say_all(channel: &Channel, listeners: &Listeners, peers: &[String]) -> Result<(), HandoverError> {
    let said = async {
        for (address, socket) in listeners.handles()? {
            channel.send_with(&Message::Listener(address), &[socket.as_fd()]).await?;
        }
        for some in peers.chunks(PEERS) {
            channel.send(&Message::Peers(some.to_vec())).await?;
        }
        channel.send(&Message::Load).await
    };
    match said.await {
        // Its last message says why it is gone.
        Err(error) if matches!(error.kind(), io::ErrorKind::BrokenPipe | io::ErrorKind::ConnectionReset) => {
            Ok(())
        }
        said => Ok(said?),
    }
}
