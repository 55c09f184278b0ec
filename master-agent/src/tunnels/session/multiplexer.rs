//! The multiplexer of a session, on an SSH channel of its own, or the multiplexer of a tunnel that the session joins. A
//! node-agent of an earlier release has a second one, on which it opens its streams to the front end.

use bytes::Bytes;
use proto::mux::{
    FRONT_END_SUBSYSTEM, Version,
    frame::{self, Frame, Hello},
    ids::{Numbering, Opener},
};
use proto_net::mux::{self, Events, Mux, SendFrame, Settings};
use russh::{Channel, ChannelId, ChannelMsg, client};

use super::{error::TunnelError, handshake::Session, state::MuxInput};

/// The streams that a session may carry at once.
#[derive(Clone, Copy, Debug)]
pub(crate) struct StreamLimits {
    /// Those that the master opens.
    pub(crate) to_node: usize,
    /// Those that the node opens to the front end. With `None`, no callers come through tunnels.
    pub(crate) to_front_end: Option<usize>,
}

/// What a session has become.
pub(crate) enum Started {
    /// It has a multiplexer of its own.
    New(Mux, Events),
    /// It is a further connection of the multiplexer that it was to join.
    Joined,
    /// The node has no multiplexer, as a plain sshd.
    Nothing,
}

impl Session {
    /// Asks the node for a multiplexer, of the best version that it has. The session joins `present` instead, if there is
    /// one and the node agrees.
    pub(crate) async fn start_multiplexer(
        &self,
        limits: StreamLimits,
        present: Option<&Mux>,
    ) -> Result<Started, TunnelError> {
        let Some(mut channel) = self.open_channel().await? else { return Ok(Started::Nothing) };
        let id = channel.id();
        let said = self.state.to_node.expect_hello(id);
        if is_agreed(&mut channel, Version::V2.subsystem()).await? {
            let session = present.and_then(Mux::peer).map_or_else(rand::random, |peer| peer.session);
            let hello = mux::hello(if limits.to_front_end.is_some() { Hello::FRONT_END } else { 0 }, session);
            let _ = self.handle.data(id, frame::encode(Version::V2, &Frame::Hello(hello))).await;
            let Ok(peer) = said.await else { return Err(TunnelError::Closed) };
            return self.begin(id, limits, present, peer);
        }
        self.state.to_node.expect(id);
        if is_agreed(&mut channel, Version::V1.subsystem()).await? {
            let settings = self.settings(Numbering::All { opener: Opener::This }, limits.to_node, 0, None);
            let (mux, events) = self.run(&self.state.to_node, id, settings)?;
            return Ok(Started::New(mux, events));
        }
        self.state.to_node.clear();
        let _ = channel.close().await;
        Ok(Started::Nothing)
    }

    /// Begins as both sides have agreed in their HELLOs.
    fn begin(
        &self,
        channel: ChannelId,
        limits: StreamLimits,
        present: Option<&Mux>,
        peer: Hello,
    ) -> Result<Started, TunnelError> {
        let is_same = |mux: &&Mux| mux.peer().is_some_and(|known| known.instance == peer.instance);
        let present = present.filter(is_same);
        if peer.can(Hello::JOINED) {
            let joined =
                present.and_then(|mux| mux.join(self.gate.clone(), self.sender(channel), &self.tasks));
            let feeder = joined.ok_or(TunnelError::NotJoined)?;
            self.state.to_node.set(feeder)?;
            return Ok(Started::Joined);
        }
        // The node wants a separate tunnel. It dials again, and then gets a session of another name.
        if present.is_some() {
            return Err(TunnelError::NotJoined);
        }
        let numbering = Numbering::Halves { is_client: true };
        let max_accepted = limits.to_front_end.unwrap_or_default();
        let settings = self.settings(numbering, limits.to_node, max_accepted, Some(peer));
        let (mux, events) = self.run(&self.state.to_node, channel, settings)?;
        Ok(Started::New(mux, events))
    }

    /// Asks a node-agent of an earlier release for the multiplexer on which it opens at most `max_streams` streams to the
    /// front end. Returns `None` if it opens none.
    pub(crate) async fn start_front_end(
        &self,
        max_streams: usize,
    ) -> Result<Option<(Mux, Events)>, TunnelError> {
        let Some(mut channel) = self.open_channel().await? else { return Ok(None) };
        let (id, input) = (channel.id(), &self.state.to_front_end);
        input.expect(id);
        if is_agreed(&mut channel, FRONT_END_SUBSYSTEM).await? {
            let settings = self.settings(Numbering::All { opener: Opener::Peer }, 0, max_streams, None);
            return self.run(input, id, settings).map(Some);
        }
        input.clear();
        let _ = channel.close().await;
        Ok(None)
    }

    fn settings(
        &self,
        numbering: Numbering,
        max_opened: usize,
        max_accepted: usize,
        peer: Option<Hello>,
    ) -> Settings {
        Settings { numbering, max_opened, max_accepted, stalls: self.stalls.clone(), peer }
    }

    /// Runs a multiplexer on a channel, which `input` feeds.
    fn run(
        &self,
        input: &MuxInput,
        channel: ChannelId,
        settings: Settings,
    ) -> Result<(Mux, Events), TunnelError> {
        let (mux, feeder, events) = Mux::new(settings, self.gate.clone(), self.sender(channel), &self.tasks);
        input.set(feeder)?;
        Ok((mux, events))
    }

    fn sender(&self, channel: ChannelId) -> SendFrame {
        let handle = self.handle.clone();
        Box::new(move |frame: Bytes| {
            let handle = handle.clone();
            Box::pin(async move { handle.data(channel, frame).await.is_ok() })
        })
    }

    /// Opens a channel of type `session`; `None` if the node has none, as an sshd that is configured for forwarding only.
    async fn open_channel(&self) -> Result<Option<Channel<client::Msg>>, TunnelError> {
        match self.handle.channel_open_session().await {
            Ok(channel) => {
                self.channels.forget(channel.id());
                Ok(Some(channel))
            }
            Err(russh::Error::ChannelOpenFailure(_)) => Ok(None),
            Err(error) => Err(error.into()),
        }
    }
}

/// Asks for a subsystem, and waits for the answer. Nothing may be sent before that. A plain sshd keeps the channel's window
/// closed until then, and while one channel waits for its window, russh sends nothing at all, not even the close of that
/// channel.
async fn is_agreed(channel: &mut Channel<client::Msg>, subsystem: &str) -> Result<bool, TunnelError> {
    channel.request_subsystem(true, subsystem).await?;
    loop {
        match channel.wait().await {
            Some(ChannelMsg::Success) => return Ok(true),
            Some(ChannelMsg::Failure | ChannelMsg::Close | ChannelMsg::Eof) | None => return Ok(false),
            Some(_) => {}
        }
    }
}
