//! Thousands of dials on one HTTP/2 connection, as Konnectivity's client makes them: held, and cancelled within
//! milliseconds.

use std::{collections::HashMap, time::Duration};

use bytes::{Buf, Bytes, BytesMut};
use prost::Message;
use proto::konnectivity::{PROXY, Packet, Payload};
use tests::{
    client::Door,
    cluster::{Kind, SOON},
    h2::{self, ACK, DATA, END_HEADERS, Frame, GOAWAY, HEADERS, RST_STREAM, SETTINGS, WINDOW_UPDATE},
    konnectivity::Connection,
    load::completes,
    process::eventually,
    silent::NeverAnswers,
    steady::raise_descriptor_limit,
    target,
};
use tokio::task::JoinSet;

use super::konnectivity::Site;

const HELD: usize = 4000;
const CANCELLED: u32 = 500;
/// For each target and each time until they are cancelled.
const ROUNDS: usize = 4;

/// One connection, whose calls are the client's odd streams.
struct Wire {
    connection: h2::Connection,
    last: u32,
    received: HashMap<u32, BytesMut>,
}

fn call(stream: u32) -> Frame {
    let block = h2::block(&[
        (":method", "POST"),
        (":scheme", "http"),
        (":path", PROXY),
        (":authority", "localhost"),
        ("content-type", "application/grpc"),
        ("te", "trailers"),
    ]);
    Frame::new(HEADERS, END_HEADERS, stream, block)
}

fn message(stream: u32, packet: Packet) -> Frame {
    let packet = packet.encode_to_vec();
    let payload = [&[0], &(packet.len() as u32).to_be_bytes()[..], &packet].concat();
    Frame::new(DATA, 0, stream, payload)
}

fn dial(stream: u32, address: &str) -> [Frame; 2] {
    [call(stream), message(stream, Packet::dial_request(stream.into(), address))]
}

fn cancel(stream: u32) -> Frame {
    Frame::new(RST_STREAM, 0, stream, Bytes::from_static(&[0, 0, 0, 8]))
}

impl Wire {
    async fn open(door: &Door) -> Self {
        let connection = h2::Connection::start(door.enter().await.unwrap()).await.unwrap();
        Self { connection, last: 0, received: HashMap::new() }
    }

    /// The ids of new streams.
    fn streams(&mut self, count: u32) -> impl Iterator<Item = u32> + Clone + use<> {
        let first = if self.last == 0 { 1 } else { self.last + 2 };
        self.last = first + 2 * (count - 1);
        (first..=self.last).step_by(2)
    }

    async fn send(&mut self, frames: impl IntoIterator<Item = Frame>) {
        let bytes: Vec<u8> = frames.into_iter().flat_map(|frame| frame.encode()).collect();
        self.connection.write(&bytes).await.expect("an open connection");
    }

    /// The next packet on a stream.
    async fn next(&mut self, on: u32) -> Payload {
        loop {
            let received = self.received.entry(on).or_default();
            if let Some(head) = received.get(1..5) {
                let len = 5 + u32::from_be_bytes(head.try_into().unwrap()) as usize;
                if received.len() >= len {
                    let mut message = received.split_to(len);
                    message.advance(5);
                    return Packet::decode(message).unwrap().into_payload().unwrap();
                }
            }
            let frame = completes("a frame", self.connection.read()).await.expect("an open connection");
            match frame.kind {
                DATA => {
                    let grant = Bytes::copy_from_slice(&(frame.payload.len() as u32).to_be_bytes());
                    if frame.stream == on {
                        self.received.entry(on).or_default().extend_from_slice(&frame.payload);
                        self.send([Frame::new(WINDOW_UPDATE, 0, on, grant.clone())]).await;
                    }
                    self.send([Frame::new(WINDOW_UPDATE, 0, 0, grant)]).await;
                }
                SETTINGS if frame.flags & ACK == 0 => {
                    self.send([Frame::new(SETTINGS, ACK, 0, Bytes::new())]).await;
                }
                GOAWAY => panic!("{frame:?}"),
                RST_STREAM if frame.stream == on => panic!("{frame:?}"),
                _ => {}
            }
        }
    }
}

#[tokio::test]
async fn dials_that_are_cancelled_disturb_no_other_on_their_connection() {
    let (port, silent) = (target::start().await, NeverAnswers::start().await);
    let site = Site::start(Kind::Dialled, &[port, silent.port]).await;
    let before = site.cluster.descriptors_at_rest().await;
    let mut wire = Wire::open(&site.unix).await;
    let steady = wire.streams(1).next().unwrap();
    wire.send(dial(steady, &format!("n1:{port}"))).await;
    let Payload::DialResponse(answer) = wire.next(steady).await else { panic!("no answer to the dial") };
    let id = answer.connect_id;
    wire.send([message(steady, Packet::data(id, Bytes::from_static(b"echo\n")))]).await;
    let mut said = 0;
    for _ in 0..ROUNDS {
        // A client may give up 10,000 calls at once, and then 10,000 a second. A round gives up 5,000.
        tokio::time::sleep(Duration::from_secs(1)).await;
        for port in [port, silent.port] {
            for until in [0, 200, 1000, 3000, 10_000].map(Duration::from_micros) {
                let (streams, address) = (wire.streams(CANCELLED), format!("n1:{port}"));
                if until.is_zero() {
                    let frames = streams.flat_map(|id| [&dial(id, &address)[..], &[cancel(id)]].concat());
                    wire.send(frames).await;
                } else {
                    wire.send(streams.clone().flat_map(|id| dial(id, &address))).await;
                    tokio::time::sleep(until).await;
                    wire.send(streams.map(cancel)).await;
                }
                said += 1;
                let words = Bytes::from(format!("{said:032}"));
                wire.send([message(steady, Packet::data(id, words.clone()))]).await;
                match wire.next(steady).await {
                    Payload::Data(data) => assert_eq!(data.data, words, "cancelled after {until:?}"),
                    other => panic!("{other:?}"),
                }
            }
        }
    }
    eventually("all that was cancelled has ended", SOON, async || {
        (site.streams_on_node().await? == 1.0 && silent.dials() == 0).then_some(())
    })
    .await;
    drop(wire);
    site.nothing_is_left(before).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn thousands_of_dials_are_held_on_one_connection() {
    raise_descriptor_limit(16_384).unwrap();
    let port = target::start().await;
    let site = Site::start(Kind::Dialled, &[port]).await;
    let before = site.cluster.descriptors_at_rest().await;
    let connection = Connection::open(&site.unix).await.unwrap();
    let mut dials = JoinSet::new();
    for _ in 0..HELD {
        let connection = connection.clone();
        dials
            .spawn(async move { completes("a dial", connection.dial(&format!("n1:{port}"))).await.unwrap() });
    }
    let held = dials.join_all().await;
    let mut echoes = JoinSet::new();
    for (mut call, id) in held {
        echoes.spawn(async move {
            call.data(id, "echo\nhello").await;
            assert_eq!(&call.read(id).await.unwrap()[..], b"hello");
            call
        });
    }
    let held = echoes.join_all().await;
    assert_eq!(site.metric("master_agent_streams{egress=\"konnectivity-unix\"}").await, HELD as f64);
    drop((held, connection));
    site.nothing_is_left(before).await;
}
