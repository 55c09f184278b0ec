//! The exchange that delivers the list of revoked certificates to a node-agent, on an SSH channel of its own.

use bytes::Bytes;
use proto::{
    refusal,
    revocation::{Report, SUBSYSTEM},
};
use russh::{Channel, ChannelMsg, client::Msg};
use tokio::{sync::oneshot, time::timeout};

use super::{session::error::TunnelError, tunnel::Tunnel};

/// The outcome of delivering a list to a node.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Delivery {
    /// The node has accepted the list.
    Accepted,
    /// The node already had this version.
    Current,
    /// The node already has this newer version.
    Newer(u64),
    Refused(String),
    /// The version of the node-agent does not support such lists.
    Unsupported,
}

impl Tunnel {
    /// Delivers the list of the user CA with the fingerprint `ca` to a node-agent, unless the node-agent has that
    /// version or a newer one.
    pub(super) async fn deliver_revocations(
        &self,
        ca: &str,
        version: u64,
        signed: Bytes,
    ) -> Result<Delivery, TunnelError> {
        let late = |_| TunnelError::Timeout(self.answer_timeout);
        let opened = timeout(self.answer_timeout, self.open_exchange()).await;
        let mut channel = match opened.map_err(late)? {
            Ok(Ok(channel)) => channel,
            Ok(Err(russh::Error::ChannelOpenFailure(_))) => return Ok(Delivery::Unsupported),
            Ok(Err(error)) => return Err(error.into()),
            Err(_) => return Err(TunnelError::Closed),
        };
        let exchange = exchange(&mut channel, ca, version, signed);
        let delivered = timeout(self.answer_timeout, exchange).await.map_err(late);
        // The master closes the channel first, since the node's side keeps memory for channels that it closes first
        // itself.
        channel.close().await?;
        delivered?
    }

    /// Opens the channel of an exchange. SSH can't cancel an open request, so a channel that is opened when nobody waits
    /// for it any more is closed. Otherwise, it would count against the few that a node-agent allows at once.
    fn open_exchange(&self) -> oneshot::Receiver<Result<Channel<Msg>, russh::Error>> {
        let (handle, channels) = (self.session.handle.clone(), self.session.channels.clone());
        let (answer, answered) = oneshot::channel();
        self.session.tasks.spawn(async move {
            let opened = handle.channel_open_session().await;
            if let Ok(channel) = &opened {
                channels.forget(channel.id());
            }
            if let Err(Ok(unwanted)) = answer.send(opened) {
                let _ = unwanted.close().await;
            }
        });
        answered
    }
}

async fn exchange(
    channel: &mut Channel<Msg>,
    ca: &str,
    version: u64,
    signed: Bytes,
) -> Result<Delivery, TunnelError> {
    channel.request_subsystem(true, SUBSYSTEM).await?;
    let mut signed = Some(signed);
    let mut received = Vec::new();
    loop {
        match channel.wait().await {
            Some(ChannelMsg::Data { data }) => received.extend_from_slice(&data),
            Some(ChannelMsg::Failure | ChannelMsg::Close | ChannelMsg::Eof) => {
                return Ok(Delivery::Unsupported);
            }
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
            (Some(error), _) => return Ok(Delivery::Refused(refusal::printable(&error))),
            (None, Some(held)) if held > version => return Ok(Delivery::Newer(held)),
            (None, Some(held)) if held == version => {
                return Ok(if signed.is_some() { Delivery::Current } else { Delivery::Accepted });
            }
            (None, _) => match signed.take() {
                Some(signed) => channel.data_bytes(signed).await?,
                None => {
                    return Ok(Delivery::Refused(
                        "the node does not report the list after it was sent".to_owned(),
                    ));
                }
            },
        }
    }
}
