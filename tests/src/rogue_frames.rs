//! A node and a master that have turned hostile: their identity is genuine, and they send whatever frames a test wants.

use std::{
    collections::HashMap,
    net::SocketAddr,
    sync::{Arc, atomic::AtomicBool},
    time::Duration,
};

use bytes::Bytes;
use proto::{
    DialError,
    mux::{
        Version,
        frame::{self, Credit, Decoder, Frame, Hello, MAX_DATA},
        window,
    },
};
use rand::{RngExt, rngs::StdRng};
use tokio::net::TcpStream;

use crate::{
    cluster::{Cluster, Kind, Options, SOON},
    hostile_bytes::mutate,
    load::completes,
    process::eventually,
    rogue::{self, Deaf, Identity, MasterSession, NodeMux},
    steady::{Health, Steady, raise_descriptor_limit},
    target,
};

const MB: u64 = 1024 * 1024;
/// A flood of which nothing has been taken for so long is over.
const TAKES_NO_MORE: Duration = Duration::from_secs(30);

/// A frame as an agent of the first release sends it.
pub fn encode(frame: &Frame<'_>) -> Bytes {
    frame::encode(Version::V1, frame)
}

/// Reads what an agent sends to one of the first release.
pub fn decoder() -> Decoder {
    Decoder::new(Version::V1)
}

pub fn data(stream: u64, bytes: &[u8]) -> Frame<'_> {
    Frame::Data { stream, offset: None, bytes }
}

pub fn credit(stream: u64, bytes: u32) -> Frame<'static> {
    Frame::Credit { stream, credit: Credit::By(bytes) }
}

pub fn eof(stream: u64) -> Frame<'static> {
    Frame::Eof { stream, end: None }
}

pub fn opened(stream: u64) -> Frame<'static> {
    Frame::Opened { stream, limit: window::INITIAL.into() }
}

pub fn reset(stream: u64, reason: &str) -> Frame<'static> {
    Frame::Reset { stream, end: None, reason: reason.to_owned() }
}

/// Some frames of a version, whose values do not matter.
fn sample_frames(version: Version, stream: u64, target: &str) -> Vec<Bytes> {
    let text = |s: &str| s.to_owned();
    let errors = [
        DialError::BadTarget(text("x")),
        DialError::Cancelled,
        DialError::NoTunnel { node: text("n1"), state: text("down") },
        DialError::Policy { rule: text("r"), reason: text("no") },
        DialError::TimedOut(text("late")),
    ];
    let mut frames: Vec<Frame<'_>> =
        errors.into_iter().map(|error| Frame::Refused { stream, error }).collect();
    let open = |stream, timeout_ms, target: &str| {
        let (target, origin, limit) = (text(target), text("x"), window::INITIAL.into());
        Frame::Open { stream, timeout_ms, limit, target, origin }
    };
    let granted = |bytes: u32| match version {
        Version::V1 => Credit::By(bytes),
        Version::V2 => Credit::UpTo(bytes.into()),
    };
    frames.extend([
        open(stream, 10_000, target),
        open(stream + 2, 0, "[::1]:1"),
        opened(stream),
        data(stream, b"echo\nhello"),
        Frame::Credit { stream, credit: granted(65_536) },
        Frame::Credit { stream, credit: granted(u32::MAX) },
        eof(stream),
        reset(stream, "gone"),
        Frame::Ping(*b"12345678"),
        Frame::Pong([0xff; 8]),
        Frame::GoAway { reason: text("bye") },
        Frame::Certificate { text: text("ssh-ed25519-cert-v01@openssh.com AAAA") },
    ]);
    if version == Version::V2 {
        frames.extend([
            Frame::Call,
            Frame::Retract { stream, limit: 1000 },
            Frame::Retracted { stream, limit: 1000 },
            Frame::Relink,
            Frame::Drain { milliseconds: 1000 },
        ]);
    }
    frames.iter().map(|frame| frame::encode(version, frame)).collect()
}

/// Some frames of a version, changed, and then bytes that are no frame wherever the reader stands.
pub fn malformed_frames(rng: &mut StdRng, version: Version, target: &str) -> Vec<u8> {
    let samples = sample_frames(version, rng.random_range(1..4), target);
    let mut bytes = Vec::new();
    for _ in 0..rng.random_range(1..12) {
        bytes.extend_from_slice(&samples[rng.random_range(0..samples.len())]);
    }
    let nasty: &[&[u8]] = &[
        b"\0",
        b"\xff\xff\xff\xff",
        b"\0\0\0\0",
        b"\0\0\xfc\0",
        b"\0\0\xfc\x01",
        b"\x04\0\0\0\x01\0\0\xfc\0",
        b"\x0b",
        b"\0\0\x40\0",
        b"\x01\0\0\0\x01\0\0\0\x05",
        &[0xff; 40],
    ];
    let mut bytes = mutate(rng, &bytes, nasty);
    bytes.extend_from_slice(&no_frame());
    bytes
}

/// Bytes that are no frame of any version, and longer than any frame that they may be taken to belong to.
pub fn no_frame() -> Vec<u8> {
    vec![0xff; MAX_DATA + 1024]
}

/// The frames that a master sends to a rogue node.
pub struct FromMaster {
    pub mux: NodeMux,
    pub decoder: Decoder,
}

impl FromMaster {
    /// The id of the next stream that the master asks for.
    pub async fn open(&mut self) -> u64 {
        loop {
            let bytes = completes("an OPEN", self.mux.received.recv()).await.expect("the tunnel has ended");
            let mut bytes = &bytes[..];
            while let Some(frame) = self.decoder.decode(&mut bytes).unwrap() {
                if let Frame::Open { stream, .. } = frame {
                    return stream;
                }
            }
        }
    }

    pub async fn send(&self, bytes: impl Into<Bytes>) {
        // The master may have had enough already.
        let _ = self.mux.handle.data(self.mux.channel, bytes.into()).await;
    }

    pub async fn frame(&self, frame: Frame<'_>) {
        self.send(encode(&frame)).await;
    }

    /// Waits until the master has closed the tunnel.
    pub async fn closed(mut self) {
        completes("the master closes a tunnel", async { while self.mux.received.recv().await.is_some() {} })
            .await;
    }
}

/// A master that turned: its certificate is good.
pub struct RogueMaster {
    identity: Identity,
    node: SocketAddr,
}

/// Its session with a node, and the multiplexer in it.
pub struct Attack {
    session: MasterSession,
    channel: russh::ChannelWriteHalf<russh::client::Msg>,
    /// The bytes that the node sends; the channel ends with the session.
    pub received: tokio::sync::mpsc::UnboundedReceiver<Bytes>,
    /// Whether this master has stopped reading what comes over the link.
    pub deaf: Arc<AtomicBool>,
}

impl RogueMaster {
    pub fn new(cluster: &Cluster) -> Self {
        let args = [
            "-I",
            "rogue",
            "-n",
            "master-agent",
            "-V",
            "-1h:+1d",
            "-O",
            "clear",
            "-O",
            "permit-port-forwarding",
        ];
        let identity =
            Identity::certified(&cluster.path().join("rogue"), &cluster.path().join("master/user_ca"), &args)
                .unwrap();
        Self { identity, node: SocketAddr::from(([127, 0, 0, 1], cluster.nodes[0].port)) }
    }

    /// Attacks as a master of the first release.
    pub async fn attack(&self, window: u32) -> Attack {
        self.attack_with(Version::V1, window).await
    }

    /// Attacks with a version of the multiplexer, after its regular beginning.
    pub async fn attack_with(&self, version: Version, window: u32) -> Attack {
        let (link, deaf) = Deaf::new(TcpStream::connect(self.node).await.unwrap());
        let (session, accepted) =
            rogue::authenticate(link, &self.identity, "master-agent", window).await.unwrap();
        assert!(accepted);
        let channel = session.channel_open_session().await.unwrap();
        let (mut read, channel) = channel.split();
        channel.request_subsystem(true, version.subsystem()).await.unwrap();
        let (sender, received) = tokio::sync::mpsc::unbounded_channel();
        tokio::spawn(async move {
            while let Some(message) = read.wait().await {
                if let russh::ChannelMsg::Data { data } = message {
                    let _ = sender.send(data);
                }
            }
        });
        let attack = Attack { session, channel, received, deaf };
        if version == Version::V2 {
            let hello =
                Frame::Hello(Hello { capabilities: Hello::FRONT_END, instance: [7; 16], session: [8; 16] });
            assert!(attack.send(frame::encode(version, &hello)).await);
        }
        attack
    }
}

impl Attack {
    /// `false` once the node has closed the session.
    pub async fn send(&self, bytes: impl Into<Bytes>) -> bool {
        // russh goes on waiting for room in a channel whose session has ended meanwhile.
        let closed = async {
            while !self.session.is_closed() {
                tokio::time::sleep(Duration::from_millis(50)).await;
            }
        };
        tokio::select! {
            sent = self.channel.data_bytes(bytes) => sent.is_ok() && !self.session.is_closed(),
            () = closed => false,
        }
    }

    pub async fn frame(&self, frame: Frame<'_>) -> bool {
        self.send(encode(&frame)).await
    }

    pub async fn closed(mut self) {
        completes("the node closes a session", async { while self.received.recv().await.is_some() {} }).await;
    }

    /// The node's answers to `count` OPENs, by stream: whether it opened it. `None` once the session has ended.
    pub async fn answers(&mut self, count: usize) -> Option<HashMap<u64, bool>> {
        let mut answers = HashMap::new();
        let mut decoder = decoder();
        while answers.len() < count {
            let bytes = completes("answers to OPEN", self.received.recv()).await?;
            let mut bytes = &bytes[..];
            while let Some(frame) = decoder.decode(&mut bytes).unwrap() {
                match frame {
                    Frame::Opened { stream, .. } => drop(answers.insert(stream, true)),
                    Frame::Refused { stream, .. } => drop(answers.insert(stream, false)),
                    _ => {}
                }
            }
        }
        Some(answers)
    }

    /// Goes on sending `bytes` until the node closes the session or takes no more; `more` is asked before each time.
    pub async fn flood(&self, bytes: &Bytes, mut more: impl FnMut() -> bool) {
        while more() {
            // A master that doesn't read hears of no window and, unless it is sending, of no end.
            match tokio::time::timeout(TAKES_NO_MORE, self.send(bytes.clone())).await {
                Ok(true) => {}
                Ok(false) | Err(_) => return,
            }
        }
    }
}

pub fn open(stream: u64, target: &str) -> Frame<'static> {
    let (target, origin, limit) = (target.to_owned(), "rogue".to_owned(), window::INITIAL.into());
    Frame::Open { stream, timeout_ms: 30_000, limit, target, origin }
}

/// A node with a tunnel to its real master, and a hostile master that the node trusts.
pub struct Turned {
    pub cluster: Cluster,
    pub master: RogueMaster,
    pub steady: Steady,
    pub health: Health,
    pub target: String,
}

impl Turned {
    /// Starts all of them. The node has had one session of the hostile master already, since the first costs what later
    /// ones do not.
    pub async fn start() -> Self {
        raise_descriptor_limit(20_000).unwrap();
        let port = target::start().await;
        let options = Options {
            nodes: vec![("n1".to_owned(), Kind::Dialled)],
            ports: vec![port],
            ..Options::default()
        };
        let cluster = Cluster::start(options).await.unwrap();
        let steady = Steady::start(&cluster, "n1", port).await.unwrap();
        let master = RogueMaster::new(&cluster);
        let target = format!("127.0.0.1:{port}");
        let first = master.attack(1 << 30).await;
        first.send(no_frame()).await;
        first.closed().await;
        let health = Health::of(cluster.nodes[0].process.as_ref().unwrap());
        Self { cluster, master, steady, health, target }
    }

    pub async fn unharmed(&mut self) {
        self.health.no_panic();
        self.steady.check(&self.cluster).await;
    }

    pub async fn log_says(&self, text: &str) {
        let node = self.cluster.nodes[0].process.as_ref().unwrap();
        eventually(text, SOON, async || node.log_text().contains(text).then_some(())).await;
    }

    pub fn bounded(&self, what: &str) {
        let growth = self.health.growth();
        assert!(growth < 64 * MB, "{what}: the node-agent has grown by {} MB", growth / MB);
    }
}
