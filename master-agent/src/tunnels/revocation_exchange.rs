//! The exchange that brings a node-agent the list of revoked certificates, on an SSH channel of its own.

use bytes::Bytes;
use proto::{
    refusal,
    revocation::{Report, SUBSYSTEM},
};
use russh::{Channel, ChannelMsg, client::Msg};
use tokio::time::timeout;

use super::{session::error::TunnelError, tunnel::Tunnel};

/// The outcome of bringing a node a list.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Brought {
    /// The node took it.
    Taken,
    /// The node had this version.
    Held,
    /// The node has this newer version.
    Newer(u64),
    Refused(String),
    /// The node's agent does not know such lists.
    Unknown,
}

impl Tunnel {
    /// Brings a node-agent the list of the user CA with the fingerprint `ca`, unless it has that version or a newer
    /// one.
    pub(super) async fn bring_revocations(
        &self,
        ca: &str,
        version: u64,
        signed: Bytes,
    ) -> Result<Brought, TunnelError> {
        let late = |_| TunnelError::Timeout(self.answer_timeout);
        let opened = timeout(self.answer_timeout, self.session.handle.channel_open_session()).await;
        let mut channel = match opened.map_err(late)? {
            Ok(channel) => channel,
            Err(russh::Error::ChannelOpenFailure(_)) => return Ok(Brought::Unknown),
            Err(error) => return Err(error.into()),
        };
        self.session.channels.forget(channel.id());
        let exchange = exchange(&mut channel, ca, version, signed);
        let brought = timeout(self.answer_timeout, exchange).await.map_err(late);
        // The master closes first, since the node's side keeps memory of channels that it closes first itself.
        channel.close().await?;
        brought?
    }
}

async fn exchange(
    channel: &mut Channel<Msg>,
    ca: &str,
    version: u64,
    signed: Bytes,
) -> Result<Brought, TunnelError> {
    channel.request_subsystem(true, SUBSYSTEM).await?;
    let mut signed = Some(signed);
    let mut received = Vec::new();
    loop {
        match channel.wait().await {
            Some(ChannelMsg::Data { data }) => received.extend_from_slice(&data),
            Some(ChannelMsg::Failure | ChannelMsg::Close | ChannelMsg::Eof) => return Ok(Brought::Unknown),
            None => return Err(TunnelError::Closed),
            Some(_) => continue,
        }
        let decoded = Report::decode(&received);
        let Some((report, used)) = decoded.map_err(|error| TunnelError::Connect(error.to_string()))? else {
            continue;
        };
        received.drain(..used);
        let held = report.held.get(ca).copied();
        match (report.refused, held) {
            (Some(error), _) => return Ok(Brought::Refused(refusal::printable(&error))),
            (None, Some(held)) if held > version => return Ok(Brought::Newer(held)),
            (None, Some(held)) if held == version => {
                return Ok(if signed.is_some() { Brought::Held } else { Brought::Taken });
            }
            (None, _) => match signed.take() {
                Some(signed) => channel.data_bytes(signed).await?,
                None => return Ok(Brought::Refused("it does not have it now".to_owned())),
            },
        }
    }
}
