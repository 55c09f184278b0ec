//! The listener before clients that speak HTTP/2 as bytes, and a dialer whose dials never end.
#![allow(clippy::disallowed_methods, reason = "a test owns its tasks by its runtime")]

use std::{
    collections::HashMap,
    sync::atomic::{AtomicUsize, Ordering},
    time::Duration,
};

use bytes::{Buf, BufMut, BytesMut};
use proto::{Target, konnectivity::Payload};
use proto_net::{
    dialer::{DialFuture, Dialer, Origin},
    tasks::Tasks,
};
use tokio::io::{AsyncReadExt, AsyncWriteExt, DuplexStream};
use tonic_prost::prost::Message;

use super::*;
use crate::{
    egress::outbound::CallerLimits,
    http::generations::Generations,
    stream::metrics::{ListenerLabels, StreamMetrics},
    tunnels::registry::Registry,
};

const DOOR: &str = "konnectivity-test";
const HANGS: Duration = Duration::from_secs(600);

const DATA: u8 = 0;
const HEADERS: u8 = 1;
const RST_STREAM: u8 = 3;
const SETTINGS: u8 = 4;
const PING: u8 = 6;
const END_HEADERS: u8 = 4;
const CANCEL: [u8; 4] = [0, 0, 0, 8];
const MAX_CONCURRENT_STREAMS: u16 = 3;

/// Counts the dials that are under way.
#[derive(Default)]
struct Never(AtomicUsize);

struct Pending<'a>(&'a AtomicUsize);

impl Drop for Pending<'_> {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Relaxed);
    }
}

impl Dialer for Never {
    fn dial<'a>(&'a self, _: &'a Target, _: &'a Origin) -> DialFuture<'a> {
        Box::pin(async move {
            self.0.fetch_add(1, Ordering::Relaxed);
            let _pending = Pending(&self.0);
            std::future::pending().await
        })
    }
}

/// A client's end of a connection.
struct Wire {
    socket: DuplexStream,
    dialer: Arc<Never>,
    listener: Arc<Konnectivity>,
    /// The bytes of each stream that were not read yet.
    received: HashMap<u32, BytesMut>,
    settings: HashMap<u16, u32>,
}

fn frame(kind: u8, flags: u8, stream: u32, payload: &[u8]) -> Vec<u8> {
    let mut out = Vec::new();
    out.put_uint(payload.len() as u64, 3);
    out.extend_from_slice(&[kind, flags]);
    out.put_u32(stream);
    out.extend_from_slice(payload);
    out
}

/// The head of a call.
fn call(stream: u32) -> Vec<u8> {
    head(stream, PROXY, "identity")
}

fn head(stream: u32, path: &str, encoding: &str) -> Vec<u8> {
    let mut block = Vec::new();
    for (name, value) in [
        (":method", "POST"),
        (":scheme", "http"),
        (":path", path),
        (":authority", "localhost"),
        ("content-type", "application/grpc"),
        ("grpc-encoding", encoding),
        ("te", "trailers"),
    ] {
        block.push(0);
        for text in [name, value] {
            block.push(u8::try_from(text.len()).unwrap());
            block.extend_from_slice(text.as_bytes());
        }
    }
    frame(HEADERS, END_HEADERS, stream, &block)
}

fn dial(stream: u32) -> Vec<u8> {
    let packet = Packet::dial_request(stream.into(), "10.0.0.1:80").encode_to_vec();
    let mut message = vec![0];
    message.put_u32(packet.len() as u32);
    message.extend_from_slice(&packet);
    frame(DATA, 0, stream, &message)
}

fn cancel(stream: u32) -> Vec<u8> {
    frame(RST_STREAM, 0, stream, &CANCEL)
}

/// The ids of `count` streams of a client, from `first` on.
fn ids(first: u32, count: u32) -> impl Iterator<Item = u32> + Clone {
    (0..count).map(move |i| first + 2 * i)
}

impl Wire {
    /// Opens a connection whose client may send `buffer` bytes before they are read.
    async fn open(buffer: usize, max_dials: usize) -> Self {
        let dialer = Arc::new(Never::default());
        let outbound = Outbound {
            dialer: dialer.clone(),
            metrics: StreamMetrics::new(Arc::new(Registry::new(1))),
            limits: CallerLimits { head_timeout: HANGS, half_closed_timeout: HANGS, max_connections: 1 },
            tasks: Tasks::new(),
        };
        let listener = Arc::new(Konnectivity { outbound, generations: Generations::default(), max_dials });
        let (socket, far) = tokio::io::duplex(buffer);
        let caller = Caller::new(DOOR, Origin("test".to_owned()));
        listener.outbound.tasks.spawn(listener.clone().serve(far, caller));
        let mut wire = Self { socket, dialer, listener, received: HashMap::new(), settings: HashMap::new() };
        let preface = [b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n".to_vec(), frame(SETTINGS, 0, 0, &[])].concat();
        wire.socket.write_all(&preface).await.unwrap();
        wire
    }

    async fn send(&mut self, frames: impl IntoIterator<Item = Vec<u8>>) {
        let bytes = frames.into_iter().collect::<Vec<_>>().concat();
        self.socket.write_all(&bytes).await.expect("an open connection");
    }

    /// Reads one frame, and keeps what it says. Returns the kind, or `None` at the connection's end.
    async fn read(&mut self) -> Option<u8> {
        let mut head = [0; 9];
        self.socket.read_exact(&mut head).await.ok()?;
        let length = u32::from_be_bytes([0, head[0], head[1], head[2]]) as usize;
        let stream = u32::from_be_bytes([head[5], head[6], head[7], head[8]]);
        let mut payload = vec![0; length];
        self.socket.read_exact(&mut payload).await.ok()?;
        match head[3] {
            DATA => self.received.entry(stream).or_default().extend_from_slice(&payload),
            SETTINGS => {
                for mut setting in payload.chunks_exact(6) {
                    self.settings.insert(setting.get_u16(), setting.get_u32());
                }
            }
            _ => {}
        }
        Some(head[3])
    }

    /// Waits until the listener has read everything that was sent before.
    async fn settle(&mut self) {
        self.send([frame(PING, 0, 0, &[7; 8])]).await;
        let pong = async { while self.read().await.expect("an open connection") != PING {} };
        tokio::time::timeout(HANGS, pong).await.expect("a pong");
    }

    /// Waits for a number of dials that are under way.
    async fn dials(&mut self, wanted: usize) {
        let reached = async {
            while self.dialer.0.load(Ordering::Relaxed) != wanted {
                tokio::task::yield_now().await;
            }
        };
        let reached = tokio::time::timeout(HANGS, reached).await;
        assert!(reached.is_ok(), "{} dials are under way", self.dialer.0.load(Ordering::Relaxed));
    }

    /// The calls that have failed, as they are counted.
    fn errors(&self) -> Vec<String> {
        let mut registry = prometheus_client::registry::Registry::default();
        registry.register("errors", "calls", self.listener.outbound.metrics.konnectivity.errors.clone());
        let mut text = String::new();
        prometheus_client::encoding::text::encode(&mut text, &registry).unwrap();
        let mut lines: Vec<_> =
            text.lines().filter(|line| !line.starts_with('#')).map(str::to_owned).collect();
        lines.sort();
        lines
    }

    /// The error that a dial is answered with.
    async fn dial_error(&mut self, stream: u32) -> String {
        loop {
            if let Some(message) = self.received.get(&stream).and_then(|bytes| bytes.get(5..)) {
                match Packet::decode(message).unwrap().into_payload() {
                    Some(Payload::DialResponse(answer)) => return answer.error,
                    other => panic!("{other:?}"),
                }
            }
            tokio::time::timeout(HANGS, self.read()).await.expect("an answer").expect("an open connection");
        }
    }
}

#[tokio::test]
async fn dials_that_are_cancelled_at_once_cost_only_themselves() {
    let mut wire = Wire::open(1024 * 1024, 8192).await;
    wire.send([call(1), dial(1)]).await;
    wire.dials(1).await;
    for round in 0..5 {
        let first = 3 + round * 10_000;
        // All of it is there before the listener reads any.
        wire.send(ids(first, 500).flat_map(|id| [call(id), dial(id), cancel(id)])).await;
        wire.settle().await;
        // Here all dials are under way before they are cancelled.
        let held = ids(first + 1000, 500);
        wire.send(held.clone().flat_map(|id| [call(id), dial(id)])).await;
        wire.dials(501).await;
        wire.send(held.map(cancel)).await;
        wire.dials(1).await;
        wire.settle().await;
    }
    // The first dial is still under way, and new ones are taken.
    wire.send([call(100_001), dial(100_001)]).await;
    wire.dials(2).await;
}

#[tokio::test]
async fn all_dials_of_a_connection_may_be_cancelled_before_they_are_accepted() {
    let mut wire = Wire::open(4 * 1024 * 1024, 8192).await;
    // The connection's window is larger from now on.
    wire.settle().await;
    wire.send(ids(1, 8192).flat_map(|id| [call(id), dial(id), cancel(id)])).await;
    wire.settle().await;
    wire.send([call(100_001), dial(100_001)]).await;
    wire.dials(1).await;
}

/// Sends what `frames` makes of each new stream until the connection ends. Returns the number of streams.
async fn flood(buffer: usize, frames: fn(u32) -> Vec<u8>) -> u32 {
    let Wire { socket, .. } = Wire::open(buffer, 8192).await;
    let (mut read, mut write) = tokio::io::split(socket);
    let mut sink = tokio::io::sink();
    let mut answers = pin!(tokio::io::copy(&mut read, &mut sink));
    for id in ids(1, 1_000_000) {
        let frames = frames(id);
        tokio::select! {
            written = write.write_all(&frames) => if written.is_err() {
                return id / 2;
            },
            _ = answers.as_mut() => return id / 2,
        }
    }
    panic!("the flood goes on");
}

#[tokio::test(start_paused = true)]
async fn a_flood_of_cancelled_calls_ends_the_connection() {
    let kinds: [fn(u32) -> Vec<u8>; 4] = [
        |id| [call(id), cancel(id)].concat(),
        |id| [call(id), dial(id), cancel(id)].concat(),
        |id| [head(id, "/ProxyService/Other", "identity"), cancel(id)].concat(),
        |id| [head(id, PROXY, "br"), cancel(id)].concat(),
    ];
    for (number, frames) in kinds.into_iter().enumerate() {
        // It comes faster than calls are accepted, or only as fast as that.
        for buffer in [8 * 1024 * 1024, 4096] {
            let began = Instant::now();
            let calls = flood(buffer, frames).await;
            assert!(calls < 100_000, "{calls} calls of kind {number}");
            assert!(began.elapsed() < HANGS, "only a timeout has ended it");
        }
    }
}

#[tokio::test]
async fn a_call_that_fails_is_counted_once() {
    let mut wire = Wire::open(1024 * 1024, 8).await;
    let counts = wire.listener.outbound.metrics.konnectivity.clone();
    wire.send([call(1), dial(1)]).await;
    wire.dials(1).await;
    wire.send([cancel(1)]).await;
    wire.dials(0).await;
    // This is no message of protobuf.
    wire.send([call(3), frame(DATA, 0, 3, &[0, 0, 0, 0, 1, 0xff])]).await;
    let counted = async {
        while wire.errors().len() < 2 || counts.calls.get() > 0 {
            wire.settle().await;
        }
    };
    tokio::time::timeout(HANGS, counted).await.expect("two failed calls");
    let line =
        |code| format!("errors_total{{segment=\"from_client\",code=\"{code}\",packet_type=\"Unknown\"}} 1");
    assert_eq!(wire.errors(), [line("Canceled"), line("Internal")]);
}

#[tokio::test]
async fn a_client_with_too_many_dials_is_told() {
    let mut wire = Wire::open(1024 * 1024, 1000).await;
    // Some are on a stream that they share.
    wire.send([call(1)]).await;
    wire.send(ids(3, 999).flat_map(|id| [call(id), dial(id)])).await;
    wire.send([dial(1)]).await;
    wire.dials(1000).await;
    for id in ids(3001, 300) {
        wire.send([call(id), dial(id)]).await;
        let error = wire.dial_error(id).await;
        assert!(error.contains("has 1000 dials and connections already (konnectivity.max_dials)"), "{error}");
    }
    assert_eq!(wire.settings.get(&MAX_CONCURRENT_STREAMS), Some(&(1000 + SPARE_STREAMS)));
    // The answer leaves the streams to the client, which closes them.
    wire.send(ids(3001, 300).map(cancel)).await;
    wire.send([cancel(3)]).await;
    wire.dials(999).await;
    wire.send([call(5001), dial(5001)]).await;
    wire.dials(1000).await;
    wire.settle().await;
    assert!(!wire.received.contains_key(&5001));
    let labels = ListenerLabels { egress: DOOR };
    assert_eq!(wire.listener.outbound.metrics.bad_requests.get_or_create(&labels).get(), 0);
}
