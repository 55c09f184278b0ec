//! The bytes that a real kube-apiserver sent in GRPC mode are answered when they are played again.

use prost::Message;
use proto::konnectivity::{CloseResponse, DialRequest, Packet, Payload};
use tests::{client::Door, cluster::Kind, load::completes, process::free_port, target};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::UnixStream,
};

use super::konnectivity::Site;

/// Frames of HTTP/2: type and payload, with all their bytes.
fn frames(bytes: &[u8]) -> Vec<(u8, Vec<u8>)> {
    let (mut all, mut rest) = (Vec::new(), bytes);
    while let Some(header) = rest.get(..9) {
        let len = 9 + u32::from_be_bytes([0, header[0], header[1], header[2]]) as usize;
        let Some(frame) = rest.get(..len) else { break };
        all.push((header[3], frame.to_vec()));
        rest = &rest[len..];
    }
    all
}

/// A recorded connection, played again to a target and a connection's number of here and now.
struct Replay {
    socket: UnixStream,
    recorded: std::vec::IntoIter<(u8, Vec<u8>)>,
    received: Vec<u8>,
    address: String,
}

const DATA: u8 = 0;
const RST_STREAM: u8 = 3;
const GOAWAY: u8 = 7;
const PREFACE: usize = 24;

impl Replay {
    async fn start(door: &Door, capture: &str, address: String) -> Self {
        let bytes = std::fs::read(format!("{}/data/captures/{capture}", env!("CARGO_MANIFEST_DIR"))).unwrap();
        let Door::Unix(path) = door else { unreachable!() };
        let mut socket = UnixStream::connect(path).await.unwrap();
        socket.write_all(&bytes[..PREFACE]).await.unwrap();
        let recorded = frames(&bytes[PREFACE..]).into_iter();
        Self { socket, recorded, received: Vec::new(), address }
    }

    /// Sends up to the next packet, that one included, with `id` in place of the recorded number.
    async fn send_packet(&mut self, id: i64) {
        for (kind, mut frame) in self.recorded.by_ref() {
            let packet = kind == DATA;
            if packet {
                let payload = match Packet::decode(&frame[9 + 5..]).unwrap().into_payload().unwrap() {
                    Payload::DialRequest(dial) => {
                        Payload::DialRequest(DialRequest { address: self.address.clone(), ..dial })
                    }
                    Payload::Data(data) => {
                        Payload::Data(proto::konnectivity::Data { connect_id: id, ..data })
                    }
                    Payload::CloseRequest(_) => Packet::close_request(id).payload.unwrap(),
                    other => panic!("{other:?}"),
                };
                let message = Packet::from(payload).encode_to_vec();
                frame.truncate(9);
                frame[..3].copy_from_slice(&(message.len() as u32 + 5).to_be_bytes()[1..]);
                frame.push(0);
                frame.extend_from_slice(&(message.len() as u32).to_be_bytes());
                frame.extend_from_slice(&message);
            }
            self.socket.write_all(&frame).await.unwrap();
            if packet {
                return;
            }
        }
        panic!("no packet is left");
    }

    /// Packets that have come so far.
    fn packets(&self) -> Vec<Payload> {
        let mut messages = Vec::new();
        for (kind, frame) in frames(&self.received) {
            assert!(kind != RST_STREAM && kind != GOAWAY, "{frame:?}");
            if kind == DATA {
                messages.extend_from_slice(&frame[9..]);
            }
        }
        let (mut all, mut rest) = (Vec::new(), messages.as_slice());
        while let Some(prefix) = rest.get(..5) {
            let len = u32::from_be_bytes(prefix[1..].try_into().unwrap()) as usize;
            let Some(message) = rest.get(5..5 + len) else { break };
            all.push(Packet::decode(message).unwrap().into_payload().unwrap());
            rest = &rest[5 + len..];
        }
        all
    }

    /// Reads until there is a packet that `wanted` accepts.
    async fn receive<T>(&mut self, wanted: impl Fn(&Payload) -> Option<T>) -> T {
        loop {
            if let Some(found) = self.packets().iter().find_map(&wanted) {
                return found;
            }
            let n = completes("an answer", self.socket.read_buf(&mut self.received)).await.unwrap();
            assert_ne!(n, 0, "closed after {:?}", self.packets());
        }
    }
}

#[tokio::test]
async fn the_recorded_bytes_of_kube_apiserver_are_answered() {
    let (port, closed) = (target::start().await, free_port());
    let site = Site::start(Kind::Dialled, &[port, closed]).await;
    let mut replay = Replay::start(&site.unix, "grpc-uds-1.client.bin", format!("127.0.0.1:{port}")).await;
    replay.send_packet(0).await;
    let answer = |payload: &Payload| match payload {
        Payload::DialResponse(answer) => Some(answer.clone()),
        _ => None,
    };
    let dialled = replay.receive(answer).await;
    assert_eq!(
        (dialled.random, dialled.connect_id, dialled.error.as_str()),
        (7_188_621_719_815_055_000, 1, "")
    );
    replay.send_packet(dialled.connect_id).await;
    let data = replay.receive(|p| if let Payload::Data(d) = p { Some(d.clone()) } else { None }).await;
    assert_eq!(data.connect_id, dialled.connect_id);
    assert!(data.data.starts_with(b"HTTP/1.1 200 OK\r\n"), "{data:?}");
    replay.send_packet(dialled.connect_id).await;
    let closed_response = |payload: &Payload| match payload {
        Payload::CloseResponse(answer) => Some(answer.clone()),
        _ => None,
    };
    let expected = CloseResponse { error: String::new(), connect_id: dialled.connect_id };
    assert_eq!(replay.receive(closed_response).await, expected);
    for (_, frame) in replay.recorded.by_ref() {
        replay.socket.write_all(&frame).await.unwrap();
    }

    let address = format!("127.0.0.1:{closed}");
    let mut replay = Replay::start(&site.unix, "grpc-uds-2.client.bin", address.clone()).await;
    replay.send_packet(0).await;
    let refused = replay.receive(answer).await;
    assert_eq!((refused.random, refused.connect_id), (2_286_212_748_466_133_381, 0));
    assert_eq!(refused.error, format!("dial tcp {address}: connection refused"));
    assert_eq!(site.dials("unix", "refused").await, 1.0);
}
