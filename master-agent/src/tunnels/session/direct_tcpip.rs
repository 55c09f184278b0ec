//! Streams to targets behind a plain sshd. Each of them is a direct-tcpip channel (RFC 4254, section 7.2).

use std::{sync::Arc, time::Duration};

use proto::{DialError, Target};
use proto_net::{
    channel::{Channels, WriteHalf},
    stream::Stream,
    tasks::Tasks,
};
use russh::{ChannelOpenFailure, client::Handle};
use tokio::{sync::oneshot, time::timeout};

use super::{handler::ClientHandler, handshake::Session, state::SessionState};

/// Opens the streams of one session.
pub(crate) struct DirectTcpip {
    handle: Arc<Handle<ClientHandler>>,
    state: Arc<SessionState>,
    channels: Channels,
    tasks: Tasks,
    /// Has one clone for each channel whose opening the sshd has not answered yet.
    opening: Arc<()>,
    max_streams: usize,
}

impl DirectTcpip {
    pub(crate) fn new(session: &Session, max_streams: usize) -> Self {
        Self {
            handle: session.handle.clone(),
            state: session.state.clone(),
            channels: session.channels.clone(),
            tasks: session.tasks.clone(),
            opening: Arc::default(),
            max_streams,
        }
    }

    pub(crate) fn streams(&self) -> usize {
        self.channels.len()
    }

    /// Resets all streams. Returns how many there were.
    pub(crate) fn reset(&self, reason: &str) -> usize {
        self.channels.reset(reason)
    }

    pub(crate) async fn open(&self, target: &Target, limit: Duration) -> Result<Stream, DialError> {
        // SSH can't cancel an open request, so a channel that nobody waits for any more still counts.
        let opening = self.opening.clone();
        if self.channels.len() + Arc::strong_count(&opening) > self.max_streams + 1 {
            let error =
                format!("the tunnel carries {} streams already (max_streams_per_tunnel)", self.max_streams);
            return Err(DialError::TooManyStreams(error));
        }
        let (handle, channels) = (self.handle.clone(), self.channels.clone());
        let (host, port) = (target.host.to_string(), u32::from(target.port));
        let (answer, answered) = oneshot::channel();
        self.tasks.spawn(async move {
            let opened = handle.channel_open_direct_tcpip(host, port, "127.0.0.1", 0).await;
            drop(opening);
            let _ = answer.send(opened.map(|channel| channels.stream(WriteHalf::Client(channel.split().1))));
        });
        match timeout(limit, answered).await {
            Ok(Ok(Ok(stream))) => Ok(stream),
            Ok(Ok(Err(russh::Error::ChannelOpenFailure(failure)))) => Err(dial_error(target, &failure)),
            Ok(Ok(Err(_)) | Err(_)) => {
                Err(DialError::TunnelLost { node: String::new(), reason: self.state.reason() })
            }
            Err(_) => Err(DialError::TimedOut(format!(
                "dial tcp {target}: the node's sshd gave no answer within {}",
                humantime::format_duration(limit)
            ))),
        }
    }
}

fn dial_error(target: &Target, failure: &ChannelOpenFailure) -> DialError {
    match failure {
        ChannelOpenFailure::AdministrativelyProhibited => DialError::Policy {
            rule: "sshd".to_owned(),
            reason: format!("the node's sshd forbids {target} (PermitOpen, AllowTcpForwarding)"),
        },
        ChannelOpenFailure::ConnectFailed => {
            DialError::Refused(format!("dial tcp {target}: refused or unreachable, says the node's sshd"))
        }
        ChannelOpenFailure::ResourceShortage => {
            DialError::TooManyStreams("the node's sshd is short of resources".to_owned())
        }
        ChannelOpenFailure::UnknownChannelType => DialError::Policy {
            rule: "sshd".to_owned(),
            reason: "the node's sshd does not forward TCP connections".to_owned(),
        },
        ChannelOpenFailure::Other { reason, .. } => {
            DialError::Refused(format!("dial tcp {target}: {reason}"))
        }
    }
}
