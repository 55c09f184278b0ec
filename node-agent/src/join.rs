//! `node-agent join`: from a fresh host to an identity, over one call-home link.
//!
//! The host has a key and no certificate; the master is known by the fingerprint of its user CA alone. The SSH
//! roles are as ever, so the two prove themselves in this order: the master signs the session with a key
//! that the pinned CA certified (a relay in between has another session and no such key), and only then does
//! this side send the token. The master signs the host key that this very session has proved.

use std::{
    net::IpAddr,
    sync::Arc,
    time::{Duration, SystemTime},
};

use proto::{
    NodeName,
    call_home::{Master, Purpose},
    join::{JoinRequest, JoinResponse, SUBSYSTEM},
    refusal,
};
use proto_net::{link::Link, ssh};
use russh::{
    Channel, ChannelId, MethodKind, MethodSet, SshId,
    keys::Certificate,
    server::{self, Auth, ChannelOpenHandle, Msg},
};
use tokio::{
    io::{AsyncRead, AsyncWrite},
    sync::mpsc,
};
use tokio_util::sync::CancellationToken;

use crate::{
    https::{self, CallHomeHttps},
    identity::NodeIdentity,
    tcp,
};

/// How long the whole exchange may take.
const TIMEOUT: Duration = Duration::from_secs(20);

/// What joining needs to know.
pub struct Join {
    pub master: Master,
    /// How it is reached if it is a front end. Without a credential of its own, the join token is presented there, too.
    pub https: CallHomeHttps,
    pub token: String,
    pub ca_pin: String,
    pub node: Option<NodeName>,
    pub addresses: Vec<IpAddr>,
}

/// Why the host did not join; the text says what to do.
#[derive(Debug, thiserror::Error)]
pub enum JoinError {
    #[error("{0}")]
    Connect(String),
    #[error(
        "the master at {master} did not prove itself: {reason}. Compare --ca-pin with the line that `master-agent token create` printed; if it is the same, something between this host and the master answers in its place"
    )]
    Pin { master: Master, reason: String },
    #[error("the master at {0} did not complete the exchange; its log says why")]
    Incomplete(Master),
    #[error("the master at {0} refused the link: {1}")]
    Link(Master, String),
    #[error("the master refused: {reason}. {hint}")]
    Refused { reason: String, hint: String },
    #[error("the master's answer can't be read: {0}")]
    Answer(String),
    #[error("{0}")]
    Identity(String),
}

enum Event {
    WrongPin(String),
    Refused(String),
    Bytes(Vec<u8>),
}

/// Joins, and installs what the master gave into `identity`. Gives the node's name.
pub async fn join(identity: &mut NodeIdentity, join: Join) -> Result<NodeName, JoinError> {
    let response = match &join.master {
        Master::Tcp(master) => {
            let socket = tcp::connect(master, TIMEOUT).await.map_err(JoinError::Connect)?;
            let local = socket.local_addr().map(|a| a.ip()).ok();
            exchange(identity, &join, socket, local).await?
        }
        Master::Https(front_end) => {
            let (node, token) = (join.node.as_ref(), Some(join.token.as_str()));
            let link = https::connect(&join.https, front_end, node, Purpose::Join, token, TIMEOUT);
            let link = link.await.map_err(JoinError::Connect)?;
            exchange(identity, &join, link.stream, link.local).await?
        }
    };
    match response {
        JoinResponse::Accepted { .. } => {
            identity.install(&response).map_err(|e| JoinError::Identity(e.to_string()))?;
            identity
                .node_name()
                .ok_or_else(|| JoinError::Identity("the certificate names no node".to_owned()))
        }
        JoinResponse::Refused { reason, hint } => Err(JoinError::Refused { reason, hint }),
    }
}

async fn exchange<T>(
    identity: &NodeIdentity,
    join: &Join,
    socket: T,
    local: Option<IpAddr>,
) -> Result<JoinResponse, JoinError>
where
    T: AsyncRead + AsyncWrite + Unpin + Send + 'static,
{
    let exchanged = tokio::time::timeout(TIMEOUT, exchange_within(identity, join, socket, local));
    exchanged.await.map_err(|_| JoinError::Incomplete(join.master.clone()))?
}

async fn exchange_within<T>(
    identity: &NodeIdentity,
    join: &Join,
    socket: T,
    local: Option<IpAddr>,
) -> Result<JoinResponse, JoinError>
where
    T: AsyncRead + AsyncWrite + Unpin + Send + 'static,
{
    let addresses = match (join.addresses.as_slice(), local) {
        ([], Some(local)) => vec![local.to_canonical()],
        (given, _) => given.to_vec(),
    };
    let request = JoinRequest { version: 1, token: join.token.clone(), node: join.node.clone(), addresses };
    let (events, mut received) = mpsc::channel(16);
    let handler = Handler { ca_pin: join.ca_pin.clone(), request: request.encode(), proved: false, events };
    let config = server::Config {
        server_id: SshId::Standard(refusal::NODE_AGENT.into()),
        methods: MethodSet::from(&[MethodKind::PublicKey][..]),
        auth_rejection_time: Duration::ZERO,
        keys: vec![identity.host_key().clone()],
        preferred: ssh::preferred(),
        ..server::Config::default()
    };
    let cut = CancellationToken::new();
    let _cut_on_exit = cut.clone().drop_guard();
    let (link, _) = Link::new(socket, cut, Arc::default());
    let incomplete = || JoinError::Incomplete(join.master.clone());
    let _session = server::run_stream(Arc::new(config), link, handler).await.map_err(|_| incomplete())?;
    let mut bytes = Vec::new();
    while let Some(event) = received.recv().await {
        match event {
            Event::WrongPin(reason) => return Err(JoinError::Pin { master: join.master.clone(), reason }),
            Event::Refused(reason) => return Err(JoinError::Link(join.master.clone(), reason)),
            Event::Bytes(more) => bytes.extend(more),
        }
        if let Some(response) = JoinResponse::decode(&bytes).map_err(|e| JoinError::Answer(e.to_string()))? {
            return Ok(response);
        }
    }
    Err(incomplete())
}

struct Handler {
    ca_pin: String,
    request: Vec<u8>,
    proved: bool,
    events: mpsc::Sender<Event>,
}

impl server::Handler for Handler {
    type Error = russh::Error;

    async fn auth_none(&mut self, user: &str) -> Result<Auth, russh::Error> {
        if let Some(reason) = refusal::from_login(user) {
            let _ = self.events.send(Event::Refused(reason)).await;
        }
        Ok(Auth::reject())
    }

    async fn auth_openssh_certificate(
        &mut self,
        user: &str,
        certificate: &Certificate,
    ) -> Result<Auth, russh::Error> {
        match NodeIdentity::verify_pinned_user(&self.ca_pin, user, certificate, SystemTime::now()) {
            Ok(()) => {
                self.proved = true;
                Ok(Auth::Accept)
            }
            Err(error) => {
                let _ = self.events.send(Event::WrongPin(error.to_string())).await;
                Ok(Auth::reject())
            }
        }
    }

    async fn channel_open_session(
        &mut self,
        _channel: Channel<Msg>,
        reply: ChannelOpenHandle,
        _session: &mut server::Session,
    ) -> Result<(), russh::Error> {
        reply.accept().await;
        Ok(())
    }

    async fn subsystem_request(
        &mut self,
        channel: ChannelId,
        name: &str,
        session: &mut server::Session,
    ) -> Result<(), russh::Error> {
        if !self.proved || name != SUBSYSTEM {
            return session.channel_failure(channel);
        }
        session.channel_success(channel)?;
        session.data(channel, std::mem::take(&mut self.request))
    }

    async fn data(
        &mut self,
        _channel: ChannelId,
        data: &[u8],
        _session: &mut server::Session,
    ) -> Result<(), russh::Error> {
        let _ = self.events.send(Event::Bytes(data.to_vec())).await;
        Ok(())
    }
}
