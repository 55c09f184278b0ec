//! The multiplexers of a session, each on an SSH channel of its own. The master opens streams to targets on one of
//! them, and the node opens streams to the front end on the other.

use proto::mux::{FRONT_END_SUBSYSTEM, SUBSYSTEM};
use proto_net::mux::{Events, Mux};
use russh::ChannelMsg;
use tokio::sync::watch;

use super::{error::TunnelError, handshake::Session};

/// The side that opens the streams of a multiplexer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Opener {
    Master,
    Node,
}

impl Session {
    /// Asks the node for a multiplexer with at most `max_streams` streams at once. Returns `None` if the node does not
    /// offer one.
    pub(crate) async fn start_multiplexer(
        &self,
        opener: Opener,
        max_streams: usize,
    ) -> Result<Option<(Mux, Events)>, TunnelError> {
        // What the master sends goes up on the streams that it has opened itself, and down on those of a node's
        // callers.
        let (subsystem, input, stalls) = match opener {
            Opener::Master => (SUBSYSTEM, &self.state.to_node, &self.stalls.up),
            Opener::Node => (FRONT_END_SUBSYSTEM, &self.state.to_front_end, &self.stalls.down),
        };
        let mut channel = match self.handle.channel_open_session().await {
            Ok(channel) => channel,
            // An sshd that is configured for forwarding only answers like this.
            Err(russh::Error::ChannelOpenFailure(_)) => return Ok(None),
            Err(error) => return Err(error.into()),
        };
        let id = channel.id();
        // Nothing is sent before the node has agreed. A plain sshd keeps the channel's window closed until then, and
        // while one channel waits for its window, russh sends nothing at all, not even the close of that channel.
        let (agreed, agreement) = watch::channel(false);
        let handle = self.handle.clone();
        let out = move |frame| {
            let handle = handle.clone();
            let waiting = (!*agreement.borrow()).then(|| agreement.clone());
            Box::pin(async move {
                if let Some(mut agreement) = waiting
                    && agreement.wait_for(|agreed| *agreed).await.is_err()
                {
                    return false;
                }
                handle.data(id, frame).await.is_ok()
            }) as _
        };
        let (mux, feeder, events) = Mux::new(
            opener == Opener::Master,
            max_streams,
            self.gate.clone(),
            stalls.clone(),
            Box::new(out),
            &self.tasks,
        );
        self.channels.forget(id);
        input.set(id, feeder);
        channel.request_subsystem(true, subsystem).await?;
        loop {
            match channel.wait().await {
                Some(ChannelMsg::Success) => {
                    agreed.send_replace(true);
                    return Ok(Some((mux, events)));
                }
                Some(ChannelMsg::Failure | ChannelMsg::Close | ChannelMsg::Eof) | None => {
                    input.clear();
                    let _ = channel.close().await;
                    return Ok(None);
                }
                Some(_) => {}
            }
        }
    }
}
