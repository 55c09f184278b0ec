//! The next process's side: it takes what the running process hands over, and tells it how far it has come.

use std::{env, io};

use super::{channel::Channel, draining::Draining, message::Message};
use crate::{
    descriptors,
    listeners::{Address, Inherited},
};

/// The running process, from which this one takes over.
#[derive(Debug)]
pub struct Predecessor {
    channel: Channel,
    listeners: Inherited,
    peers: Vec<String>,
}

impl Predecessor {
    /// Takes what the process at the other end of standard input hands over.
    pub async fn meet() -> io::Result<Self> {
        Self::listen_to(Channel::of_stdin()?).await
    }

    pub(super) async fn listen_to(channel: Channel) -> io::Result<Self> {
        let (mut listeners, mut peers) = (Inherited::new(), Vec::new());
        loop {
            match channel.receive().await? {
                Some((Message::Listener(address), Some(socket))) => {
                    listeners.insert(address, socket);
                }
                Some((Message::Peers(more), _)) => peers.extend(more),
                Some((Message::Load, _)) => return Ok(Self { channel, listeners, peers }),
                Some(_) => return Err(io::Error::other("the running process has said something unexpected")),
                None => {
                    let text = "no process hands over on standard input: this is for `reload` alone";
                    return Err(io::Error::other(text));
                }
            }
        }
    }

    /// Its sockets.
    pub fn take_listeners(&mut self) -> Inherited {
        std::mem::take(&mut self.listeners)
    }

    /// The peers that it is linked to.
    pub fn take_peers(&mut self) -> Vec<String> {
        std::mem::take(&mut self.peers)
    }

    /// Says that everything has been read and checked, and waits until links may be made.
    ///
    /// `unused` are sockets of the running process that this one does not need.
    pub async fn loaded(&self, version: &str, unused: &[Address]) -> io::Result<()> {
        let loaded = Message::Loaded { version: version.to_owned(), unused: unused.to_vec() };
        let said = self.channel.send(&loaded).await;
        match said.and(self.channel.receive().await) {
            Ok(Some((Message::Link, _))) => Ok(()),
            Ok(Some(_)) => Err(io::Error::other("the running process has said something unexpected")),
            Ok(None) | Err(_) => in_its_place(),
        }
    }

    /// Says that this process serves everybody.
    pub async fn serving(&self) -> io::Result<()> {
        self.channel.send(&Message::Serving).await.or_else(|_| in_its_place())
    }

    /// Passes on what former processes still carry, until they have ended. Tells them once this process is `stopping`.
    pub async fn follow(self, report: impl Fn(Draining), stopping: impl Future<Output = ()>) {
        let reports = async {
            while let Ok(Some((message, _))) = self.channel.receive().await {
                if let Message::Draining(draining) = message {
                    report(draining);
                }
            }
        };
        let telling = async {
            stopping.await;
            let _ = self.channel.send(&Message::Stopping).await;
            std::future::pending::<()>().await;
        };
        tokio::select! {
            () = reports => {}
            () = telling => {}
        }
        report(Draining::default());
    }
}

/// Decides what follows from the death of the running process. systemd starts the agent anew, and two would serve then.
/// Without systemd, this process takes its place.
fn in_its_place() -> io::Result<()> {
    if env::var_os("NOTIFY_SOCKET").is_some() {
        return Err(io::Error::other("the running process has died, and systemd starts the agent anew"));
    }
    Ok(())
}

/// Tells the process at the other end of standard input why this one does not serve.
pub(super) fn refuse(why: &str) {
    if let Ok(message) = serde_json::to_vec(&Message::Failed(why.to_owned())) {
        let _ = descriptors::send(io::stdin(), &message, &[]);
    }
}
