//! A node whose links are in memory, and the SSH client at the other end of one.

use std::{
    net::IpAddr,
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use proto::{
    mux::{
        FRONT_END_SUBSYSTEM, Version,
        frame::{self, Decoder, Frame, Hello},
        ids::{Numbering, Opener},
    },
    policy::{Policy, Rule},
    revocation::SignedList,
};
use proto_net::{
    clock::Clock,
    gate::Gate,
    handshake::{HandshakePermit, HandshakePermits},
    link::Link,
    log_throttle::LogThrottle,
    mux::{self, Events, Feeder, Greeting, Mux, SendFrame, Settings},
    ssh, stalls,
    stream::Stream,
    tasks::Tasks,
};
use russh::{
    Channel, ChannelId, ChannelMsg,
    client::{self, DisconnectReason, Handle},
    keys::{Certificate, PrivateKey, PublicKeyOrCertificate},
};
use tokio::{
    io::DuplexStream,
    net::TcpListener,
    sync::{mpsc, oneshot, watch},
    task::JoinHandle,
};
use tokio_util::sync::{CancellationToken, DropGuard};

use crate::{
    dialer::Dialer,
    drain::Drain,
    identity::{
        current::CurrentIdentity,
        host::NodeIdentity,
        renewal::{self, Installer},
        trust::Trust,
        user::MASTER,
    },
    local_endpoint::{config::LocalEndpointConfig, front_ends::FrontEnds},
    metrics::Metrics,
    policy::Scope,
    revocation::Revocations,
    session::{
        bounds::Bounds,
        config::LimitsConfig,
        error::SessionError,
        serve::{Authenticated, Direction, SessionServer},
        services::SessionServices,
        streams::StreamServer,
    },
    shutdown::Shutdown,
    testing::{CertificateSpec, TempDir, accepted, new_key, valid_for},
};

/// How long a certificate of [`TestNode::connect`] is valid.
pub(super) const VALID: Duration = Duration::from_secs(600);
pub(super) const MAX_STREAMS: usize = 3;
pub(super) const MAX_PEOPLE: usize = 2;
pub(super) const HANDSHAKE_TIMEOUT: Duration = Duration::from_secs(10);
pub(super) const SHUTDOWN_GRACE: Duration = Duration::from_secs(30);
pub(super) const MAX_CLOSED_FIRST: usize = 2;

/// A node that allows every port of 127.0.0.1 but port 1.
pub(super) struct TestNode {
    _dir: TempDir,
    pub(super) host_ca: PrivateKey,
    pub(super) user_ca: PrivateKey,
    pub(super) identity: CurrentIdentity,
    pub(super) installer: Option<Installer>,
    pub(super) front_ends: Arc<FrontEnds>,
    pub(super) revocations: Arc<Revocations>,
    pub(super) streams: Arc<StreamServer>,
    pub(super) metrics: Arc<Metrics>,
    pub(super) shutdown: Shutdown,
    pub(super) tasks: Tasks,
    server: SessionServer,
}

impl TestNode {
    pub(super) fn new() -> Self {
        let (dir, host_ca, user_ca) = (TempDir::new(), new_key(), new_key());
        let mut identity = NodeIdentity::load_or_create(dir.path()).unwrap();
        let key = identity.host_key().public_key().clone();
        let certificate = CertificateSpec::host(&host_ca, &key).text();
        identity.install(&accepted(&certificate, &host_ca, &user_ca)).unwrap();
        let cas = identity.user_cas().to_vec();
        let identity = CurrentIdentity::new(identity);
        let metrics = Arc::<Metrics>::default();
        let shutdown = Shutdown::default();
        let revocations = Arc::new(Revocations::load(dir.path(), &cas).unwrap());
        let (renewals, installer) = renewal::queue(identity.clone(), metrics.clone(), |_| {});
        let front_ends =
            LocalEndpointConfig { tcp: None, unix: None, max_connections: 10, wait: Duration::from_secs(5) };
        let front_ends = Arc::new(FrontEnds::new(&front_ends, shutdown.draining.clone()));
        let drain = Arc::new(Drain::load(dir.path()).unwrap());
        let streams = Arc::new(streams(&metrics, &shutdown, drain));
        let services = SessionServices {
            identity: identity.clone(),
            trust: Trust::new(cas, revocations.clone(), Vec::new()),
            renewals,
            revocations: revocations.clone(),
            streams: streams.clone(),
            front_ends: Some(front_ends.clone()),
            limits: limits(),
            bounds_of_masters: Bounds::of_masters(&limits()),
            bounds_of_people: Bounds::of_people(&limits()),
            connected_masters: Arc::default(),
            multiplexers: Arc::default(),
            max_closed_first: MAX_CLOSED_FIRST,
            log_throttle: LogThrottle::default(),
            shutdown_grace: SHUTDOWN_GRACE,
            metrics: metrics.clone(),
            clock: Clock::new_virtual(),
            shutdown: shutdown.clone(),
        };
        let tasks = Tasks::new();
        let server = SessionServer::new(Arc::new(services), tasks.clone());
        let installer = Some(installer);
        Self {
            _dir: dir,
            host_ca,
            user_ca,
            identity,
            installer,
            front_ends,
            revocations,
            streams,
            metrics,
            shutdown,
            server,
            tasks,
        }
    }

    /// Begins a session on a new link that a peer has dialled.
    pub(super) fn accept(&self, permit: Option<HandshakePermit>) -> ServedLink {
        let permit = permit.unwrap_or_else(|| HandshakePermits::new(1).take(IpAddr::from([10, 0, 0, 1])));
        self.serve(Direction::Dialled(permit))
    }

    /// Begins a session on a link with which this node has called a master.
    pub(super) fn call_home(&self) -> ServedLink {
        self.serve(Direction::CallHome)
    }

    /// The same, because the master has asked for a further connection.
    pub(super) fn call_home_further(&self) -> ServedLink {
        self.serve(Direction::CallHomeFurther)
    }

    fn serve(&self, direction: Direction) -> ServedLink {
        let (near, far) = tokio::io::duplex(256 * 1024);
        let (authenticated, proof) = oneshot::channel();
        let served = self.tasks.spawn(self.server.clone().serve(near, None, direction, authenticated));
        ServedLink { link: far, served, proof }
    }

    /// Connects with a certificate of the trusted CA that names `login`.
    pub(super) async fn connect(&self, login: &str) -> Peer {
        self.connect_with(login, new_key(), VALID).await
    }

    /// Connects with a key, and with a certificate that is valid for this time.
    pub(super) async fn connect_with(&self, login: &str, key: PrivateKey, valid: Duration) -> Peer {
        self.answer(self.accept(None), login, key, valid).await
    }

    /// Connects as a master of another host.
    pub(super) async fn connect_other_master(&self) -> Peer {
        self.answer_as("other", self.accept(None), MASTER, new_key(), VALID).await
    }

    /// Authenticates on a link.
    pub(super) async fn answer(
        &self,
        link: ServedLink,
        login: &str,
        key: PrivateKey,
        valid: Duration,
    ) -> Peer {
        self.answer_as(login, link, login, key, valid).await
    }

    async fn answer_as(
        &self,
        key_id: &str,
        link: ServedLink,
        login: &str,
        key: PrivateKey,
        valid: Duration,
    ) -> Peer {
        let certificate = CertificateSpec {
            key_id,
            principals: &[login],
            valid: valid_for(valid),
            ..CertificateSpec::user(&self.user_ca, key.public_key())
        }
        .sign();
        let mut peer = Peer::on(link).await;
        peer.authenticate(login, key, certificate).await;
        peer
    }

    /// A master with its multiplexer.
    pub(super) async fn connect_master(&self) -> (Peer, Mux, Events) {
        let mut peer = self.connect(MASTER).await;
        let (mux, events) = peer.start_mux().await;
        (peer, mux, events)
    }

    pub(super) fn count_handshakes(&self, result: &'static str) -> u64 {
        self.metrics.handshakes.get_or_create(&crate::metrics::ResultLabel { result }).get()
    }
}

fn limits() -> LimitsConfig {
    LimitsConfig {
        max_handshakes: 10,
        max_sessions: MAX_PEOPLE,
        max_streams: MAX_STREAMS,
        handshake_timeout: HANDSHAKE_TIMEOUT,
        dial_timeout: Duration::from_secs(10),
        keepalive_interval: Duration::from_secs(60),
        keepalive_max: 2,
    }
}

fn streams(metrics: &Arc<Metrics>, shutdown: &Shutdown, drain: Arc<Drain>) -> StreamServer {
    let rule = Rule { name: "test".into(), net: "127.0.0.1/32".parse().unwrap(), ports: 2..=u16::MAX };
    let scope = Scope { policy: Policy { rules: vec![rule] }, ..Scope::default() };
    StreamServer {
        dialer: Arc::new(Dialer::new(scope, metrics.clone())),
        metrics: metrics.clone(),
        dial_timeout: Duration::from_secs(10),
        half_closed_timeout: Duration::from_secs(600),
        drain,
        shutdown: shutdown.clone(),
    }
}

/// The peer's end of a link on which the node serves a session.
pub(super) struct ServedLink {
    pub(super) link: DuplexStream,
    pub(super) served: JoinHandle<Option<Result<(), SessionError>>>,
    pub(super) proof: oneshot::Receiver<Authenticated>,
}

/// An SSH client.
pub(super) struct Peer {
    pub(super) handle: Arc<Handle<ClientHandler>>,
    /// Whether the node has accepted the certificate.
    pub(super) accepted: bool,
    pub(super) served: JoinHandle<Option<Result<(), SessionError>>>,
    pub(super) proof: oneshot::Receiver<Authenticated>,
    feeders: Feeders,
    raw: mpsc::UnboundedReceiver<Vec<u8>>,
    /// What has come behind the node's HELLO.
    early: Vec<u8>,
    decoder: Decoder,
    farewell: watch::Receiver<Option<String>>,
    gate: Gate,
    tasks: Tasks,
    _cut_on_drop: DropGuard,
}

/// The multiplexers, by their channels.
type Feeders = Arc<Mutex<Vec<(ChannelId, Feeder)>>>;

impl Peer {
    /// Runs the key exchange on a link.
    pub(super) async fn on(link: ServedLink) -> Self {
        let ServedLink { link, served, proof } = link;
        let cut = CancellationToken::new();
        let (link, gate) = Link::new(link, cut.clone(), Arc::default());
        let config = client::Config {
            window_size: ssh::TUNNEL_WINDOW,
            maximum_packet_size: ssh::MAX_PACKET,
            preferred: ssh::preferred(),
            inactivity_timeout: None,
            ..client::Config::default()
        };
        let feeders = Feeders::default();
        let (unfed, raw) = mpsc::unbounded_channel();
        let (said, farewell) = watch::channel(None);
        let handler = ClientHandler { feeders: feeders.clone(), unfed, farewell: said };
        let handle = client::connect_stream(Arc::new(config), link, handler).await.unwrap();
        Self {
            handle: Arc::new(handle),
            accepted: false,
            served,
            proof,
            feeders,
            raw,
            early: Vec::new(),
            decoder: Decoder::new(Version::V1),
            farewell,
            gate,
            tasks: Tasks::new(),
            _cut_on_drop: cut.drop_guard(),
        }
    }

    /// Authenticates with a certificate.
    pub(super) async fn authenticate(&mut self, login: &str, key: PrivateKey, certificate: Certificate) {
        let handle = Arc::get_mut(&mut self.handle).unwrap();
        let result = handle.authenticate_openssh_cert(login, Arc::new(key), certificate).await;
        self.accepted = result.is_ok_and(|result| result.success());
    }

    /// Starts the multiplexer of a master that has a front end.
    pub(super) async fn start_mux(&mut self) -> (Mux, Events) {
        let (id, peer) = self.greet(rand::random()).await;
        assert!(!peer.can(Hello::JOINED));
        self.start(id, Numbering::Halves { is_client: true }, Some(peer))
    }

    /// Asks for the latest version of the multiplexer under the name of a session. Returns the node's HELLO.
    pub(super) async fn greet(&mut self, session: [u8; 16]) -> (ChannelId, Hello) {
        let id = self.ask(session).await;
        let mut greeting = Greeting::default();
        loop {
            let bytes = self.raw.recv().await.unwrap();
            let mut rest = &bytes[..];
            if let Some(hello) = greeting.take(&mut rest).unwrap() {
                self.early = rest.to_vec();
                return (id, hello);
            }
        }
    }

    /// Does the same without waiting for the node's HELLO.
    pub(super) async fn ask(&self, session: [u8; 16]) -> ChannelId {
        let id = self.request(Version::V2.subsystem()).await;
        let hello = Frame::Hello(mux::hello(Hello::FRONT_END, session));
        self.handle.data(id, frame::encode(Version::V2, &hello)).await.unwrap();
        id
    }

    /// Whether the node grants a subsystem.
    pub(super) async fn is_granted(&self, subsystem: &str) -> bool {
        let mut channel = self.handle.channel_open_session().await.unwrap();
        channel.request_subsystem(true, subsystem).await.unwrap();
        loop {
            match channel.wait().await {
                Some(ChannelMsg::Success) => return true,
                Some(ChannelMsg::Failure) | None => return false,
                Some(_) => {}
            }
        }
    }

    /// Starts the multiplexer of a master of an earlier release on which it opens streams, or the one on which the node
    /// does.
    pub(super) async fn start_mux_v1(&mut self, opener: Opener) -> (Mux, Events) {
        let subsystem = match opener {
            Opener::This => Version::V1.subsystem(),
            Opener::Peer => FRONT_END_SUBSYSTEM,
        };
        let id = self.request(subsystem).await;
        self.start(id, Numbering::All { opener }, None)
    }

    async fn request(&self, subsystem: &str) -> ChannelId {
        let mut channel = self.handle.channel_open_session().await.unwrap();
        channel.request_subsystem(true, subsystem).await.unwrap();
        while !matches!(channel.wait().await.unwrap(), ChannelMsg::Success) {}
        channel.id()
    }

    fn start(&mut self, id: ChannelId, numbering: Numbering, peer: Option<Hello>) -> (Mux, Events) {
        let stalls = stalls::ByDirection::default();
        let settings = Settings { numbering, max_opened: 100, max_accepted: 100, stalls, peer };
        let (mux, feeder, events) = Mux::new(settings, self.gate.clone(), self.sender(id), &self.tasks);
        self.feed(id, feeder);
        (mux, events)
    }

    /// Joins this session to a multiplexer.
    pub(super) fn join(&mut self, id: ChannelId, mux: &Mux) {
        let feeder = mux.join(self.gate.clone(), self.sender(id), &self.tasks).unwrap();
        self.feed(id, feeder);
    }

    fn sender(&self, id: ChannelId) -> SendFrame {
        let handle = self.handle.clone();
        Box::new(move |frame| {
            let handle = handle.clone();
            Box::pin(async move { handle.data(id, frame).await.is_ok() })
        })
    }

    /// Hands over to a multiplexer, beginning with what has come behind the node's HELLO.
    fn feed(&mut self, id: ChannelId, mut feeder: Feeder) {
        let mut feeders = self.feeders.lock().unwrap_or_else(PoisonError::into_inner);
        feeder.feed(&std::mem::take(&mut self.early)).unwrap();
        while let Ok(bytes) = self.raw.try_recv() {
            feeder.feed(&bytes).unwrap();
        }
        feeders.push((id, feeder));
    }

    /// Opens the multiplexer's channel without a multiplexer, for frames that no honest master sends.
    pub(super) async fn start_raw_mux(&self) -> ChannelId {
        let channel = self.handle.channel_open_session().await.unwrap();
        channel.request_subsystem(false, Version::V1.subsystem()).await.unwrap();
        channel.id()
    }

    pub(super) async fn send_raw(&self, channel: ChannelId, frame: &Frame<'_>) {
        self.handle.data(channel, frame::encode(Version::V1, frame)).await.unwrap();
    }

    /// The first frame on the raw multiplexer that `pick` takes.
    pub(super) async fn next_raw<T>(&mut self, pick: impl Fn(Frame<'_>) -> Option<T>) -> T {
        loop {
            let bytes = self.raw.recv().await.unwrap();
            let mut bytes = &bytes[..];
            while let Some(frame) = self.decoder.decode(&mut bytes).unwrap() {
                if let Some(picked) = pick(frame) {
                    return picked;
                }
            }
        }
    }

    /// Asks to bring a list of revoked certificates; `None` if the node refuses.
    pub(super) async fn begin_exchange(&self) -> Option<Channel<client::Msg>> {
        let mut channel = self.handle.channel_open_session().await.unwrap();
        channel.request_subsystem(true, proto::revocation::SUBSYSTEM).await.unwrap();
        loop {
            let message = channel.wait().await.unwrap();
            if matches!(message, ChannelMsg::Success) {
                return Some(channel);
            }
            if matches!(message, ChannelMsg::Failure) {
                channel.close().await.unwrap();
                return None;
            }
        }
    }

    /// Brings a list of revoked certificates, without waiting for the answer.
    pub(super) async fn bring(&self, list: &SignedList) {
        let channel = self.handle.channel_open_session().await.unwrap();
        channel.request_subsystem(false, proto::revocation::SUBSYSTEM).await.unwrap();
        self.handle.data(channel.id(), list.encode()).await.unwrap();
    }

    /// Waits until the node has handled everything that was sent before.
    pub(super) async fn sync(&self) {
        // The node answers requests in their order.
        let _ = self.handle.channel_open_session().await;
    }

    /// Waits until the node says goodbye, and returns its reason.
    pub(super) async fn farewell(&mut self) -> String {
        let said = self.farewell.wait_for(Option::is_some).await.unwrap();
        said.clone().unwrap()
    }

    /// How the session ended for the node.
    pub(super) async fn ended(self) -> Result<(), SessionError> {
        self.served.await.unwrap().unwrap()
    }
}

pub(super) struct ClientHandler {
    feeders: Feeders,
    unfed: mpsc::UnboundedSender<Vec<u8>>,
    farewell: watch::Sender<Option<String>>,
}

impl client::Handler for ClientHandler {
    type Error = russh::Error;

    async fn check_server_key(&mut self, presented: &PublicKeyOrCertificate) -> Result<bool, russh::Error> {
        Ok(matches!(presented, PublicKeyOrCertificate::Certificate(_)))
    }

    async fn data(
        &mut self,
        channel: ChannelId,
        data: &[u8],
        _session: &mut client::Session,
    ) -> Result<(), russh::Error> {
        let mut feeders = self.feeders.lock().unwrap_or_else(PoisonError::into_inner);
        match feeders.iter_mut().find(|(id, _)| *id == channel) {
            Some((_, feeder)) => feeder.feed(data).unwrap(),
            None => drop(self.unfed.send(data.to_vec())),
        }
        Ok(())
    }

    async fn disconnected(&mut self, reason: DisconnectReason<russh::Error>) -> Result<(), russh::Error> {
        let said = match reason {
            DisconnectReason::ReceivedDisconnect(info) => info.message,
            DisconnectReason::Error(error) => error.to_string(),
        };
        self.farewell.send_replace(Some(said));
        Ok(())
    }
}

impl Drop for ClientHandler {
    fn drop(&mut self) {
        self.feeders.lock().unwrap_or_else(PoisonError::into_inner).clear();
    }
}

/// Sends back what comes, on every connection to the port that is returned.
pub(super) async fn echo_server(tasks: &Tasks) -> u16 {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let port = listener.local_addr().unwrap().port();
    let each = tasks.clone();
    tasks.spawn(async move {
        while let Ok((socket, _)) = listener.accept().await {
            each.spawn(async move {
                let (mut read, mut write) = socket.into_split();
                let _ = tokio::io::copy(&mut read, &mut write).await;
            });
        }
    });
    port
}

/// Sends a few bytes on a stream to an echo server, and waits for them to come back.
pub(super) async fn assert_echoes(stream: &mut Stream) {
    stream.writer.room().await.unwrap();
    let mut buffer = stream.writer.buffer(5);
    buffer.extend_from_slice(b"hello");
    stream.writer.send(buffer).await.unwrap();
    let mut came = Vec::new();
    while came.len() < 5 {
        let bytes = stream.reader.fill().await.unwrap();
        assert!(!bytes.is_empty(), "the stream ended");
        came.extend_from_slice(bytes);
        stream.reader.taken().await.unwrap();
    }
    assert_eq!(came, b"hello");
}
