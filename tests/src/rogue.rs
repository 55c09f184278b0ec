//! Hostile peers: SSH servers in a node's place and SSH clients in a master's, with whatever identity a test gives
//! them.

use std::{
    collections::HashMap,
    path::{Path, PathBuf},
    pin::Pin,
    process::Command,
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, AtomicUsize, Ordering},
    },
    task::{Context, Poll},
    time::Duration,
};

use anyhow::Context as _;
use proto::mux::{FRONT_END_SUBSYSTEM, Version};
use proto_net::{link::Link, ssh};
use russh::{
    Channel, ChannelId, MethodKind, MethodSet,
    client::{self, AuthResult},
    keys::{Certificate, PrivateKey, PublicKeyOrCertificate},
    server::{self, Auth, ChannelOpenHandle, Msg, PublicKeyOffer, VerifiedPublicKey},
};
use tokio::{
    io::{AsyncRead, AsyncWrite, ReadBuf},
    net::{TcpListener, TcpStream},
    sync::mpsc,
    task::JoinHandle,
};
use tokio_util::sync::CancellationToken;

use crate::openssh;

/// A key, and what certifies it.
#[derive(Clone, Debug)]
pub struct Identity {
    pub key: PrivateKey,
    pub certificate: Option<Certificate>,
    /// The private key's file.
    pub file: PathBuf,
}

impl Identity {
    /// Makes a key without a certificate.
    pub fn new(file: &Path) -> anyhow::Result<Self> {
        openssh::keygen(file)?;
        Self::read(file)
    }

    /// Makes a key and has `ssh-keygen -s CA` certify it, with these further arguments.
    pub fn certified(file: &Path, ca: &Path, args: &[&str]) -> anyhow::Result<Self> {
        openssh::keygen(file)?;
        certify(file, ca, args)?;
        Self::read(file)
    }

    /// Reads `FILE`, and `FILE-cert.pub` if there is one.
    pub fn read(file: &Path) -> anyhow::Result<Self> {
        let key = PrivateKey::read_openssh_file(file)?;
        let path = certificate_file(file);
        let certificate = if path.exists() { Some(Certificate::read_file(&path)?) } else { None };
        Ok(Self { key, certificate, file: file.to_owned() })
    }

    pub fn fingerprint(&self) -> String {
        self.key.fingerprint(Default::default()).to_string()
    }
}

/// `FILE-cert.pub`.
pub fn certificate_file(file: &Path) -> PathBuf {
    let mut name = file.as_os_str().to_owned();
    name.push("-cert.pub");
    PathBuf::from(name)
}

/// Certifies the key of `file` anew.
pub fn certify(file: &Path, ca: &Path, args: &[&str]) -> anyhow::Result<()> {
    let mut command = Command::new("ssh-keygen");
    command.arg("-q").arg("-s").arg(ca).args(args).arg(file.with_extension("pub"));
    openssh::run(&mut command)
}

/// How far masters came with a rogue node.
#[derive(Default)]
pub struct Seen {
    pub connections: AtomicUsize,
    /// Masters that showed a key, and so had accepted this node's.
    pub authentications: AtomicUsize,
    /// Channels that they asked for.
    pub channels: AtomicUsize,
    /// Where they asked the node to listen, and the session that they asked in.
    pub forwards: Mutex<Vec<(String, u32, server::Handle)>>,
}

impl Seen {
    pub fn connections(&self) -> usize {
        self.connections.load(Ordering::Relaxed)
    }

    pub fn authentications(&self) -> usize {
        self.authentications.load(Ordering::Relaxed)
    }

    pub fn channels(&self) -> usize {
        self.channels.load(Ordering::Relaxed)
    }
}

/// A master's multiplexer as a rogue node has it: raw bytes both ways.
pub struct NodeMux {
    /// It is the one on which the node opens streams.
    pub front_end: bool,
    pub channel: ChannelId,
    pub handle: server::Handle,
    /// Ends with the session.
    pub received: mpsc::UnboundedReceiver<Vec<u8>>,
}

/// An SSH server that lets everybody in.
pub struct RogueNode {
    pub seen: Arc<Seen>,
    /// The multiplexer of each tunnel. Nothing comes unless the node was to offer it.
    pub tunnels: mpsc::UnboundedReceiver<NodeMux>,
    task: JoinHandle<()>,
}

impl RogueNode {
    /// Listens on a loopback port. With `mux`, it offers the multiplexer as a node-agent of the first release does.
    pub async fn listen(port: u16, identity: Identity, mux: bool) -> anyhow::Result<Self> {
        Self::listen_as(port, identity, mux.then_some(Version::V1)).await
    }

    /// Listens on a loopback port, and offers this version of the multiplexer.
    pub async fn listen_with(port: u16, identity: Identity, version: Version) -> anyhow::Result<Self> {
        Self::listen_as(port, identity, Some(version)).await
    }

    async fn listen_as(port: u16, identity: Identity, version: Option<Version>) -> anyhow::Result<Self> {
        let listener =
            TcpListener::bind(("127.0.0.1", port)).await.with_context(|| format!("port {port}"))?;
        let (tunnels_tx, tunnels) = mpsc::unbounded_channel();
        let seen = Arc::new(Seen::default());
        let counts = seen.clone();
        let offer = version.map(|version| Offer { version, tunnels: tunnels_tx });
        let task = tokio::spawn(async move {
            let mut sessions = tokio::task::JoinSet::new();
            while let Ok((socket, _)) = listener.accept().await {
                sessions.spawn(serve(socket, identity.clone(), offer.clone(), counts.clone()));
                while sessions.try_join_next().is_some() {}
            }
        });
        Ok(Self { seen, tunnels, task })
    }
}

impl Drop for RogueNode {
    fn drop(&mut self) {
        self.task.abort();
    }
}

/// Serves one session to its end, or until it is dropped; the link may be one that this side dialled.
pub async fn serve(
    socket: TcpStream,
    identity: Identity,
    offer: Option<Offer>,
    seen: Arc<Seen>,
) -> Result<(), russh::Error> {
    let _ = socket.set_nodelay(true);
    seen.connections.fetch_add(1, Ordering::Relaxed);
    let config = server::Config {
        methods: MethodSet::from(&[MethodKind::PublicKey][..]),
        auth_rejection_time: Duration::ZERO,
        keys: vec![identity.key],
        certificates: identity.certificate.into_iter().collect(),
        window_size: ssh::TUNNEL_WINDOW,
        maximum_packet_size: ssh::MAX_PACKET,
        preferred: ssh::preferred(),
        nodelay: true,
        ..server::Config::default()
    };
    let handler = NodeHandler { offer, seen, received: HashMap::new() };
    // russh runs the session in a task of its own, which this ends.
    let cut = CancellationToken::new();
    let _cut_on_exit = cut.clone().drop_guard();
    let (link, _) = Link::new(socket, cut, Arc::default());
    server::run_stream(Arc::new(config), link, handler).await?.await
}

/// The multiplexer that a rogue node offers, and where those go that masters start.
#[derive(Clone)]
pub struct Offer {
    pub version: Version,
    pub tunnels: mpsc::UnboundedSender<NodeMux>,
}

struct NodeHandler {
    offer: Option<Offer>,
    seen: Arc<Seen>,
    received: HashMap<ChannelId, mpsc::UnboundedSender<Vec<u8>>>,
}

impl server::Handler for NodeHandler {
    type Error = russh::Error;

    async fn auth_publickey_offered(&mut self, _: &str, _: PublicKeyOffer<'_>) -> Result<Auth, russh::Error> {
        self.seen.authentications.fetch_add(1, Ordering::Relaxed);
        Ok(Auth::Accept)
    }

    async fn auth_publickey(&mut self, _: &str, _: VerifiedPublicKey<'_>) -> Result<Auth, russh::Error> {
        self.seen.authentications.fetch_add(1, Ordering::Relaxed);
        Ok(Auth::Accept)
    }

    async fn auth_openssh_certificate(&mut self, _: &str, _: &Certificate) -> Result<Auth, russh::Error> {
        self.seen.authentications.fetch_add(1, Ordering::Relaxed);
        Ok(Auth::Accept)
    }

    async fn channel_open_session(
        &mut self,
        _: Channel<Msg>,
        reply: ChannelOpenHandle,
        _: &mut server::Session,
    ) -> Result<(), russh::Error> {
        self.seen.channels.fetch_add(1, Ordering::Relaxed);
        reply.accept().await;
        Ok(())
    }

    async fn channel_open_direct_tcpip(
        &mut self,
        _: Channel<Msg>,
        _: &str,
        _: u32,
        _: &str,
        _: u32,
        reply: ChannelOpenHandle,
        _: &mut server::Session,
    ) -> Result<(), russh::Error> {
        self.seen.channels.fetch_add(1, Ordering::Relaxed);
        reply.accept().await;
        Ok(())
    }

    async fn subsystem_request(
        &mut self,
        channel: ChannelId,
        name: &str,
        session: &mut server::Session,
    ) -> Result<(), russh::Error> {
        let front_end = name == FRONT_END_SUBSYSTEM;
        let offered = |offer: &&Offer| front_end || name == offer.version.subsystem();
        let Some(offer) = self.offer.as_ref().filter(offered) else {
            return session.channel_failure(channel);
        };
        let (sender, received) = mpsc::unbounded_channel();
        self.received.insert(channel, sender);
        session.channel_success(channel)?;
        let _ = offer.tunnels.send(NodeMux { front_end, channel, handle: session.handle(), received });
        Ok(())
    }

    async fn tcpip_forward(
        &mut self,
        address: &str,
        port: &mut u32,
        session: &mut server::Session,
    ) -> Result<bool, russh::Error> {
        self.seen.forwards.lock().unwrap().push((address.to_owned(), *port, session.handle()));
        Ok(true)
    }

    async fn data(
        &mut self,
        channel: ChannelId,
        data: &[u8],
        _: &mut server::Session,
    ) -> Result<(), russh::Error> {
        if let Some(received) = self.received.get(&channel) {
            let _ = received.send(data.to_vec());
        }
        Ok(())
    }
}

/// An SSH client that takes any host key.
pub struct AnyHost;

impl client::Handler for AnyHost {
    type Error = russh::Error;

    async fn check_server_key(&mut self, _: &PublicKeyOrCertificate) -> Result<bool, russh::Error> {
        Ok(true)
    }
}

/// A session of a rogue master.
pub type MasterSession = client::Handle<AnyHost>;

/// Comes to a node as `login`, over a link that either side dialled; `false` if the node refused. `window` is what
/// the node may send on a channel before it is granted more.
pub async fn authenticate<T>(
    link: T,
    identity: &Identity,
    login: &str,
    window: u32,
) -> Result<(MasterSession, bool), russh::Error>
where
    T: AsyncRead + AsyncWrite + Unpin + Send + 'static,
{
    let config = client::Config {
        window_size: window,
        maximum_packet_size: ssh::MAX_PACKET,
        preferred: ssh::preferred(),
        nodelay: true,
        ..client::Config::default()
    };
    let mut session = client::connect_stream(Arc::new(config), link, AnyHost).await?;
    let key = Arc::new(identity.key.clone());
    let result: AuthResult = match &identity.certificate {
        Some(certificate) => session.authenticate_openssh_cert(login, key, certificate.clone()).await?,
        None => {
            let key = russh::keys::PrivateKeyWithHashAlg::new(key, None);
            session.authenticate_publickey(login, key).await?
        }
    };
    Ok((session, result.success()))
}

/// A link on which nothing more arrives once it has been made deaf.
pub struct Deaf<T> {
    inner: T,
    deaf: Arc<AtomicBool>,
}

impl<T> Deaf<T> {
    pub fn new(inner: T) -> (Self, Arc<AtomicBool>) {
        let deaf = Arc::new(AtomicBool::new(false));
        (Self { inner, deaf: deaf.clone() }, deaf)
    }
}

impl<T: AsyncRead + Unpin> AsyncRead for Deaf<T> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<std::io::Result<()>> {
        if self.deaf.load(Ordering::Relaxed) {
            return Poll::Pending;
        }
        Pin::new(&mut self.inner).poll_read(cx, buf)
    }
}

impl<T: AsyncWrite + Unpin> AsyncWrite for Deaf<T> {
    fn poll_write(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<std::io::Result<usize>> {
        Pin::new(&mut self.inner).poll_write(cx, bytes)
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<std::io::Result<()>> {
        Pin::new(&mut self.inner).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<std::io::Result<()>> {
        Pin::new(&mut self.inner).poll_shutdown(cx)
    }
}
