//! `node-agent join`: from a fresh host to an identity, over one call-home link.
//!
//! The host has a key and no certificate, and knows the master by the fingerprint of its user CA alone. The master is the
//! SSH client, as always. It first signs the session with a key that the pinned CA has certified; a relay in between has
//! another session and no such key. Only then does this side send the token. A front end that the session leads through has
//! seen a hash of it. The master certifies the host key that this
//! very session has proved.

use std::{
    net::IpAddr,
    sync::Arc,
    time::{Duration, SystemTime},
};

use proto::{
    NodeName,
    call_home::{Master, Purpose},
    join::{Admission, JoinRequest, JoinResponse, JoinToken, SUBSYSTEM},
    refusal::{self, whole_seconds},
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
    greeting::{Greeting, Overheard},
    https::{self, CallHomeHttps, HttpsError, LinkRequest},
    identity::{
        host::{IdentityError, NodeIdentity},
        user,
    },
    tcp::{self, ConnectError},
};

/// How long the whole exchange may take.
const TIMEOUT: Duration = Duration::from_secs(20);
/// The number of calls to a master that wants to be called again later.
const CALLS: usize = 3;
/// The greatest time that is added to what such a master says, so that hosts that are told the same come one after another.
const SPREAD: Duration = Duration::from_secs(1);

/// How to join, and with what.
pub struct JoinOptions {
    pub master: Master,
    /// How the master is reached if it is a front end. Without a credential, a hash of the join token is presented there.
    pub https: CallHomeHttps,
    pub token: String,
    pub ca_pin: String,
    pub node: Option<NodeName>,
    pub addresses: Vec<IpAddr>,
}

/// Why the host did not join; the text says what to do.
#[derive(Debug, thiserror::Error)]
pub enum JoinError {
    #[error(transparent)]
    Tcp(#[from] ConnectError),
    #[error(transparent)]
    Https(#[from] HttpsError),
    #[error(
        "the master at {master} did not prove itself: {reason}. Compare --ca-pin with the line that `master-agent token create` printed; if it is the same, something between this host and the master answers in its place"
    )]
    Pin { master: Master, reason: String },
    #[error("the master at {0} did not complete the exchange; its log says why")]
    Incomplete(Master),
    #[error("too many hosts call the master at {master} at once: try again in {} s", whole_seconds(*after))]
    ComeAgain { master: Master, after: Duration },
    #[error("the master at {0} refused the link: {1}")]
    Link(Master, String),
    #[error("the master refused: {reason}. {hint}")]
    Refused { reason: String, hint: String },
    #[error("the master's answer can't be read: {0}")]
    Answer(String),
    #[error(transparent)]
    Identity(#[from] IdentityError),
    #[error("the certificate names no node")]
    Unnamed,
}

enum Event {
    WrongPin(String),
    Refused(String),
    Bytes(Vec<u8>),
}

impl JoinError {
    /// After what time the master wants to be called again, if it says so.
    fn come_again(&self) -> Option<Duration> {
        match self {
            Self::ComeAgain { after, .. } => Some(*after),
            Self::Https(error) => error.retry_after(),
            Self::Tcp(_)
            | Self::Pin { .. }
            | Self::Incomplete(_)
            | Self::Link(..)
            | Self::Refused { .. }
            | Self::Answer(_)
            | Self::Identity(_)
            | Self::Unnamed => None,
        }
    }
}

/// Joins, and installs what the master gave into `identity`. Returns the node's name.
pub async fn join(identity: &mut NodeIdentity, options: JoinOptions) -> Result<NodeName, JoinError> {
    let mut calls = 1;
    let response = loop {
        let error = match call(identity, &options).await {
            Ok(response) => break response,
            Err(error) => error,
        };
        let Some(after) = error.come_again().filter(|_| calls < CALLS) else { return Err(error) };
        calls += 1;
        tokio::time::sleep(after + SPREAD.mul_f64(rand::random())).await;
    };
    match response {
        JoinResponse::Accepted { .. } => {
            identity.install(&response)?;
            identity.node_name().ok_or(JoinError::Unnamed)
        }
        JoinResponse::Refused { reason, hint } => Err(JoinError::Refused { reason, hint }),
    }
}

async fn call(identity: &NodeIdentity, options: &JoinOptions) -> Result<JoinResponse, JoinError> {
    match &options.master {
        Master::Tcp(master) => {
            let socket = tcp::connect(master, TIMEOUT).await?;
            let local = socket.local_addr().map(|a| a.ip()).ok();
            exchange(identity, options, socket, local).await
        }
        Master::Https(front_end) => {
            let (node, purpose) = (options.node.as_ref(), Purpose::Join);
            // A token that is malformed is refused where it would be used.
            let admission = JoinToken::parse(&options.token).ok().map(|token| Admission::of(&token));
            let request = LinkRequest { front_end, node, purpose, admission: admission.as_ref() };
            let link = https::connect(&options.https, request, TIMEOUT).await?;
            exchange(identity, options, link.stream, link.local).await
        }
    }
}

async fn exchange<T>(
    identity: &NodeIdentity,
    options: &JoinOptions,
    socket: T,
    local: Option<IpAddr>,
) -> Result<JoinResponse, JoinError>
where
    T: AsyncRead + AsyncWrite + Unpin + Send + 'static,
{
    let exchanged = tokio::time::timeout(TIMEOUT, exchange_within(identity, options, socket, local));
    exchanged.await.map_err(|_| JoinError::Incomplete(options.master.clone()))?
}

async fn exchange_within<T>(
    identity: &NodeIdentity,
    options: &JoinOptions,
    socket: T,
    local: Option<IpAddr>,
) -> Result<JoinResponse, JoinError>
where
    T: AsyncRead + AsyncWrite + Unpin + Send + 'static,
{
    let addresses = match (options.addresses.as_slice(), local) {
        ([], Some(local)) => vec![local.to_canonical()],
        (given, _) => given.to_vec(),
    };
    let request =
        JoinRequest { version: 1, token: options.token.clone(), node: options.node.clone(), addresses };
    let (events, mut received) = mpsc::channel(16);
    let handler =
        Handler { ca_pin: options.ca_pin.clone(), request: request.encode(), proved: false, events };
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
    let (socket, heard) = Overheard::new(socket);
    let (link, _) = Link::new(socket, cut, Arc::default());
    let incomplete = || JoinError::Incomplete(options.master.clone());
    let _session = server::run_stream(Arc::new(config), link, handler).await.map_err(|_| incomplete())?;
    let mut bytes = Vec::new();
    while let Some(event) = received.recv().await {
        match event {
            Event::WrongPin(reason) => return Err(JoinError::Pin { master: options.master.clone(), reason }),
            Event::Refused(reason) => return Err(JoinError::Link(options.master.clone(), reason)),
            Event::Bytes(more) => bytes.extend(more),
        }
        if let Some(response) = JoinResponse::decode(&bytes).map_err(|e| JoinError::Answer(e.to_string()))? {
            return Ok(response);
        }
    }
    Err(match heard.greeting() {
        Some(Greeting::ComeAgain(after)) => JoinError::ComeAgain { master: options.master.clone(), after },
        Some(Greeting::Hello) | None => incomplete(),
    })
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
        login: &str,
        certificate: &Certificate,
    ) -> Result<Auth, russh::Error> {
        match user::verify_pinned(certificate, login, &self.ca_pin, SystemTime::now()) {
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
