//! The callbacks of a session, which verify the host key and process everything that a node sends.

use std::{io::ErrorKind, sync::Arc, time::Instant};

use proto::refusal;
use proto_net::{
    channel::{Channels, WriteHalf},
    stalls,
};
use russh::{
    ChannelId, ChannelOpenFailure,
    client::{self, DisconnectReason},
    keys::PublicKeyOrCertificate,
};

use super::{
    forward::{Forwarded, Reserved},
    identity::Verify,
    state::{Loss, SessionState},
};

/// The smallest maximum packet size that a node may announce.
const MIN_PACKET: u32 = 1024;

const NO_ANSWER: &str = "the node no longer answers";

/// The handler that russh calls.
pub(crate) struct ClientHandler {
    pub(super) verify: Verify,
    pub(super) state: Arc<SessionState>,
    pub(super) channels: Channels,
    pub(super) stalls: stalls::ByDirection,
}

impl ClientHandler {
    /// Ends the session, because the node has opened a channel that it was not asked for. A refusal instead would have
    /// to wait in an unbounded queue during a key exchange.
    fn unsolicited_channel(&self) -> russh::Error {
        self.violation("the node tried to open a channel".to_owned())
    }

    /// Ends the session, because the node has violated a protocol.
    fn violation(&self, reason: String) -> russh::Error {
        self.state.end(Loss::Protocol, reason);
        russh::Error::Inconsistent
    }

    /// Reserves a place for a connection to the address on which the node was asked to listen. An error ends the
    /// session, and `None` refuses the channel.
    fn reserve_forwarded(&self, host: &str, port: u32) -> Result<Option<Reserved>, russh::Error> {
        let mut forward = self.state.forward();
        let Some(forward) = forward.as_mut().filter(|forward| forward.listens_on(host, port)) else {
            return Err(self.unsolicited_channel());
        };
        if !forward.count_open(Instant::now()) {
            return Err(self.violation("the node opens too many channels".to_owned()));
        }
        Ok(forward.reserve())
    }
}

impl client::Handler for ClientHandler {
    type Error = russh::Error;

    async fn check_server_key(&mut self, presented: &PublicKeyOrCertificate) -> Result<bool, russh::Error> {
        let identity = (self.verify)(presented).await;
        // The key exchange is completed even if the key is refused, so that the node can be told why. The handshake
        // then goes no further.
        Ok(self.state.identity.set(identity).is_ok())
    }

    async fn kex_done(
        &mut self,
        _shared_secret: Option<&[u8]>,
        _names: &russh::Names,
        session: &mut client::Session,
    ) -> Result<(), russh::Error> {
        self.state.set_node_agent(session.remote_sshid().starts_with(refusal::NODE_AGENT.as_bytes()));
        Ok(())
    }

    async fn channel_open_confirmation(
        &mut self,
        id: ChannelId,
        max_packet_size: u32,
        _window_size: u32,
        _session: &mut client::Session,
    ) -> Result<(), russh::Error> {
        // RFC 4253, section 6.1, requires peers to accept packets of 32 KiB. A tiny maximum would split one write into
        // thousands of packets.
        if max_packet_size < MIN_PACKET {
            return Err(self.violation(format!("the node takes packets of {max_packet_size} bytes only")));
        }
        self.channels.on_open(id);
        Ok(())
    }

    async fn data(
        &mut self,
        channel: ChannelId,
        data: &[u8],
        session: &mut client::Session,
    ) -> Result<(), russh::Error> {
        let fed = self.state.to_node.feed(channel, data);
        match fed.or_else(|| self.state.to_front_end.feed(channel, data)) {
            Some(Ok(())) => Ok(()),
            Some(Err(error)) => Err(self.violation(format!("the node broke the stream protocol: {error}"))),
            None if self.channels.on_data(channel, data).await => Ok(()),
            None => session.close(channel),
        }
    }

    async fn channel_eof(
        &mut self,
        channel: ChannelId,
        _session: &mut client::Session,
    ) -> Result<(), russh::Error> {
        self.channels.on_eof(channel);
        Ok(())
    }

    async fn channel_close(
        &mut self,
        channel: ChannelId,
        _session: &mut client::Session,
    ) -> Result<(), russh::Error> {
        self.channels.on_close(channel);
        self.state.to_front_end.close(channel);
        if self.state.to_node.close(channel) { Err(russh::Error::Disconnect) } else { Ok(()) }
    }

    async fn server_channel_open_forwarded_tcpip(
        &mut self,
        channel: russh::Channel<client::Msg>,
        connected_address: &str,
        connected_port: u32,
        originator_address: &str,
        originator_port: u32,
        reply: client::ChannelOpenHandle,
        _session: &mut client::Session,
    ) -> Result<(), russh::Error> {
        let Some(reserved) = self.reserve_forwarded(connected_address, connected_port)? else {
            reply.reject(ChannelOpenFailure::ResourceShortage).await;
            return Ok(());
        };
        let half = channel.split().1;
        let packet = half.writable_packet_size().await;
        if packet < MIN_PACKET as usize {
            return Err(self.violation(format!("the node takes packets of {packet} bytes only")));
        }
        self.channels.on_open(half.id());
        reply.accept().await;
        let Reserved { callers, permit } = reserved;
        callers.send(Forwarded {
            stream: self.channels.counted_in(&self.stalls.down).stream(WriteHalf::Client(half)),
            origin: format!("tcp {originator_address}:{originator_port}"),
            permit,
        });
        Ok(())
    }

    async fn server_channel_open_forwarded_streamlocal(
        &mut self,
        _channel: russh::Channel<client::Msg>,
        _socket_path: &str,
        _reply: client::ChannelOpenHandle,
        _session: &mut client::Session,
    ) -> Result<(), russh::Error> {
        Err(self.unsolicited_channel())
    }

    async fn server_channel_open_agent_forward(
        &mut self,
        _channel: russh::Channel<client::Msg>,
        _reply: client::ChannelOpenHandle,
        _session: &mut client::Session,
    ) -> Result<(), russh::Error> {
        Err(self.unsolicited_channel())
    }

    async fn server_channel_open_session(
        &mut self,
        _channel: russh::Channel<client::Msg>,
        _reply: client::ChannelOpenHandle,
        _session: &mut client::Session,
    ) -> Result<(), russh::Error> {
        Err(self.unsolicited_channel())
    }

    async fn server_channel_open_direct_tcpip(
        &mut self,
        _channel: russh::Channel<client::Msg>,
        _host_to_connect: &str,
        _port_to_connect: u32,
        _originator_address: &str,
        _originator_port: u32,
        _reply: client::ChannelOpenHandle,
        _session: &mut client::Session,
    ) -> Result<(), russh::Error> {
        Err(self.unsolicited_channel())
    }

    async fn server_channel_open_direct_streamlocal(
        &mut self,
        _channel: russh::Channel<client::Msg>,
        _socket_path: &str,
        _reply: client::ChannelOpenHandle,
        _session: &mut client::Session,
    ) -> Result<(), russh::Error> {
        Err(self.unsolicited_channel())
    }

    async fn server_channel_open_x11(
        &mut self,
        _channel: russh::Channel<client::Msg>,
        _originator_address: &str,
        _originator_port: u32,
        _reply: client::ChannelOpenHandle,
        _session: &mut client::Session,
    ) -> Result<(), russh::Error> {
        Err(self.unsolicited_channel())
    }

    async fn disconnected(&mut self, reason: DisconnectReason<russh::Error>) -> Result<(), russh::Error> {
        let (loss, reason) = match reason {
            DisconnectReason::ReceivedDisconnect(info) => {
                (Loss::ByNode, format!("closed by the node: {}", refusal::printable(&info.message)))
            }
            DisconnectReason::Error(russh::Error::KeepaliveTimeout) => (Loss::NoAnswer, NO_ANSWER.to_owned()),
            // The kernel has given up what the node did not acknowledge.
            DisconnectReason::Error(russh::Error::IO(error)) if error.kind() == ErrorKind::TimedOut => {
                (Loss::NoAnswer, NO_ANSWER.to_owned())
            }
            DisconnectReason::Error(error) => (Loss::Link, error.to_string()),
        };
        self.state.end(loss, reason);
        Ok(())
    }
}

impl Drop for ClientHandler {
    fn drop(&mut self) {
        self.state.close_inputs();
        self.channels.close(self.state.end_reason().map_or("the tunnel was lost", |(_, reason)| reason));
        self.state.ended.cancel();
    }
}
