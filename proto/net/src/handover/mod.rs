//! How a running agent hands over to its next process, which may be of another release, so that nobody notices.
//!
//! The running process starts the next one with a socket as its standard input, and tells it over that socket what it
//! listens on, with the descriptors, and which peers it is linked to. The next one reads and checks everything, and says
//! [`Loaded`](message::Message::Loaded). Now links come to it, and the running process asks its peers for them. Once it has
//! the links that its callers need, it accepts callers, too, and says [`Serving`](message::Message::Serving). Then the
//! running process accepts nothing more, and ends when its streams have.
//!
//! Until `Serving`, the running process can go on as if nothing had happened, and does so if the next one fails. If the
//! running process dies, systemd starts the agent anew; without systemd, the next process takes its place. The next process is nobody's child but that of whoever adopts
//! orphans, which is systemd, so that systemd supervises it as it supervised the former one.

mod channel;
mod draining;
pub mod hangup;
mod message;
mod predecessor;
mod program;
pub mod reload;
mod running;
mod successor;
#[cfg(test)]
mod tests;

use std::{io, path::PathBuf};

use crate::{listeners::Listeners, socket_store};

pub use draining::{Draining, DrainingGauges};
pub use predecessor::Predecessor;
pub use program::Program;
pub use running::{Agent, Handover};
pub use successor::Successor;

/// How a process of an agent begins.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Role {
    /// By itself.
    First,
    /// It takes over from the process at the other end of its standard input.
    Next,
}

/// How a process begins, and what its next one runs.
#[derive(Debug)]
pub struct Beginning {
    pub program: Program,
    pub role: Role,
    /// The configuration file.
    pub file: PathBuf,
}

impl Beginning {
    /// To be made before anybody replaces the program's file.
    pub fn new(role: Role, file: PathBuf) -> io::Result<Self> {
        Ok(Self { program: Program::current()?, role, file })
    }
}

impl Role {
    /// Returns the running process, if there is one, and the listeners of this one with the sockets that it begins with.
    pub async fn begin(self) -> io::Result<(Option<Predecessor>, Listeners)> {
        match self {
            Self::First => Ok((None, Listeners::with_sockets(socket_store::take()))),
            Self::Next => {
                let mut predecessor = Predecessor::meet().await?;
                let listeners = Listeners::taking_over(predecessor.take_listeners());
                Ok((Some(predecessor), listeners))
            }
        }
    }

    /// Tells the running process, if there is one, why this one does not serve.
    pub fn refuse(self, why: &dyn std::fmt::Display) {
        if self == Self::Next {
            predecessor::refuse(&why.to_string());
        }
    }
}
