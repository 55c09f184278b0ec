//! The tunnels: what agents and masters send each other, and what callers ask of them.

use std::{future::ready, time::Duration};

use bytes::Bytes;
use prost::Message;
use proto::{
    call_home::Master,
    connect,
    join::{JoinRequest, JoinResponse, JoinToken},
    konnectivity::Packet,
    mux::{
        Version,
        frame::{self, Decoder, Frame, Hello},
        ids::{Numbering, Opener},
    },
    refusal,
    revocation::{Report, SignedList, krl::Krl},
    target::Target,
};
use proto_net::{
    gate::Gate,
    mux::{Mux, SendFrame, Settings},
    stalls,
    tasks::Tasks,
};
use tokio::{runtime, task::yield_now};

/// The streams that a multiplexer may carry.
const MAX_STREAMS: usize = 8;
/// Streams that it has asked its peer for.
const ASKED: usize = 3;

/// The frames of the multiplexer in `bytes`, taken in pieces of `size`, each as text; the last is the error, if any.
/// DATA of one stream that arrives in pieces is joined.
fn read_frames(version: Version, bytes: &[u8], size: usize) -> Vec<String> {
    let mut decoder = Decoder::new(version);
    let mut found = Vec::new();
    let mut data: Option<(u64, Option<u64>, Vec<u8>)> = None;
    for piece in bytes.chunks(size.max(1)) {
        let mut input = piece;
        loop {
            match decoder.decode(&mut input) {
                Ok(Some(Frame::Data { stream, offset, bytes })) => match &mut data {
                    Some((of, at, before))
                        if *of == stream && at.map(|at| at.saturating_add(before.len() as u64)) == offset =>
                    {
                        before.extend_from_slice(bytes);
                    }
                    _ => {
                        found.extend(data.replace((stream, offset, bytes.to_vec())).map(|d| format!("{d:?}")))
                    }
                },
                Ok(Some(frame)) => {
                    found.extend(data.take().map(|d| format!("{d:?}")));
                    found.push(format!("{frame:?}"));
                    reencode(version, &frame);
                }
                Ok(None) => break,
                Err(error) => {
                    found.extend(data.take().map(|d| format!("{d:?}")));
                    found.push(error.to_string());
                    return found;
                }
            }
        }
        assert!(input.is_empty(), "the decoder asks for more and left {} bytes", input.len());
    }
    found.extend(data.map(|d| format!("{d:?}")));
    found
}

fn reencode(version: Version, frame: &Frame<'_>) {
    let encoded = frame::encode(version, frame);
    let is_whole = matches!(frame, Frame::Data { .. } | Frame::Certificate { .. });
    // The long texts of other frames are cut off.
    if !is_whole && encoded.len() > frame::MAX_CONTROL / 4 {
        return;
    }
    let mut input = &encoded[..];
    let mut decoder = Decoder::new(version);
    assert!(matches!(decoder.decode(&mut input), Ok(Some(again)) if again == *frame));
    assert!(input.is_empty());
}

/// Frames are the same in whatever pieces their bytes arrive.
pub fn frames(bytes: &[u8]) {
    for version in Version::ALL {
        let whole = read_frames(version, bytes, bytes.len());
        for size in [1, 7] {
            assert_eq!(read_frames(version, bytes, size), whole);
        }
    }
}

/// What a multiplexer makes of its peer's bytes, in pieces of `size`: the error, if any, the number of its streams, what it
/// has been asked for, and what it has been told.
fn multiplex(
    bytes: &[u8],
    size: usize,
    numbering: Numbering,
) -> (Option<String>, usize, Vec<String>, Vec<String>) {
    let runtime = runtime::Builder::new_current_thread().enable_time().build().expect("a runtime");
    runtime.block_on(async {
        let tasks = Tasks::new();
        let send: SendFrame = Box::new(|_| Box::pin(ready(true)));
        let opens = numbering.opens(Opener::This);
        let most = |opener| if numbering.opens(opener) { MAX_STREAMS } else { 0 };
        let settings = Settings {
            numbering,
            max_opened: most(Opener::This),
            max_accepted: most(Opener::Peer),
            stalls: stalls::ByDirection::default(),
            peer: matches!(numbering, Numbering::Halves { .. }).then(Hello::default),
        };
        let (mux, mut feeder, mut events) = Mux::new(settings, Gate::default(), send, &tasks);
        if opens {
            for _ in 0..ASKED {
                let mux = mux.clone();
                let target: Target = "10.0.0.1:80".parse().expect("a target");
                tasks.spawn(
                    async move { mux.open(&target, "caller", Duration::from_secs(60)).await.map(drop) },
                );
            }
            // Each task comes as far as to wait for the answer.
            for _ in 0..2 * ASKED {
                yield_now().await;
            }
        }
        let fed = bytes.chunks(size.max(1)).try_for_each(|piece| feeder.feed(piece));
        let streams = mux.streams_open();
        assert!([Opener::This, Opener::Peer].iter().all(|opener| mux.streams_of(*opener) <= MAX_STREAMS));
        let (mut incoming, mut notices) = (Vec::new(), Vec::new());
        while let Ok(asked) = events.incoming.try_recv() {
            incoming.push(format!("{} {} {:?}", asked.target, asked.origin, asked.timeout));
        }
        while let Ok(notice) = events.notices.try_recv() {
            notices.push(format!("{notice:?}"));
        }
        assert!(incoming.len() <= MAX_STREAMS);
        tasks.cancel();
        (fed.err().map(|error| error.to_string()), streams, incoming, notices)
    })
}

/// A multiplexer of either side comes to the same in whatever pieces its peer's bytes arrive, and carries no more streams
/// than it may.
pub fn multiplexer(bytes: &[u8]) {
    for numbering in [
        Numbering::All { opener: Opener::This },
        Numbering::All { opener: Opener::Peer },
        Numbering::Halves { is_client: true },
        Numbering::Halves { is_client: false },
    ] {
        let whole = multiplex(bytes, bytes.len(), numbering);
        for size in [1, 7] {
            assert_eq!(multiplex(bytes, size, numbering), whole);
        }
    }
}

/// A head is complete at one length only, and names a target that can be written and read again.
pub fn connect(bytes: &[u8]) {
    if let Ok(Some(request)) = connect::parse(bytes) {
        assert!(request.head_len <= bytes.len() && request.head_len <= connect::MAX_HEAD);
        assert_eq!(request.target.to_string().parse(), Ok(request.target.clone()));
        assert!(matches!(connect::parse(&bytes[..request.head_len - 1]), Ok(None)));
    }
}

pub fn konnectivity(bytes: &[u8]) {
    let Ok(packet) = Packet::decode(Bytes::copy_from_slice(bytes)) else { return };
    let again = Packet::decode(Bytes::from(packet.encode_to_vec())).expect("what was encoded can be decoded");
    assert_eq!(again, packet);
    let _ = packet.into_payload();
}

pub fn join_request(bytes: &[u8]) {
    if let Ok(Some(request)) = JoinRequest::decode(bytes) {
        assert_eq!(JoinRequest::decode(&request.encode()).ok().flatten(), Some(request));
    }
}

pub fn join_response(bytes: &[u8]) {
    if let Ok(Some(response)) = JoinResponse::decode(bytes) {
        assert_eq!(JoinResponse::decode(&response.encode()).ok().flatten(), Some(response));
    }
}

pub fn join_token(bytes: &[u8]) {
    let Ok(text) = std::str::from_utf8(bytes) else { return };
    if let Ok(token) = JoinToken::parse(text) {
        assert_eq!(JoinToken::parse(&token.reveal()), Ok(token));
    }
}

pub fn revocation_list(bytes: &[u8]) {
    if let Ok(list) = Krl::decode(bytes)
        && let Ok(encoded) = list.encode()
    {
        assert_eq!(Krl::decode(&encoded).ok(), Some(list));
    }
}

pub fn signed_list(bytes: &[u8]) {
    if let Ok(Some(list)) = SignedList::decode(bytes) {
        assert_eq!(list.encode(), bytes);
        assert!(list.verify(&[]).is_err());
    }
}

pub fn revocation_report(bytes: &[u8]) {
    if let Ok(Some((report, used))) = Report::decode(bytes) {
        assert!(used <= bytes.len());
        assert_eq!(Report::decode(&report.encode()).ok().flatten().map(|(again, _)| again), Some(report));
    }
}

/// No spelling of a target passes a policy that another one doesn't.
pub fn target(bytes: &[u8]) {
    let Ok(text) = std::str::from_utf8(bytes) else { return };
    if let Ok(target) = text.parse::<Target>() {
        assert_eq!(target.to_string().parse(), Ok(target));
    }
}

pub fn call_home(bytes: &[u8]) {
    let Ok(text) = std::str::from_utf8(bytes) else { return };
    if let Ok(master) = text.parse::<Master>() {
        assert_eq!(master.to_string().parse(), Ok(master));
    }
}

/// Nothing that changes how a log is shown gets through, and nobody is told to wait for longer than the bound.
pub fn refusal(bytes: &[u8]) {
    let text = String::from_utf8_lossy(bytes);
    if let Some(after) = refusal::retry_after(&text) {
        assert!(after <= refusal::LONGEST_WAIT);
        let told = refusal::come_again(after);
        let identification = told.split(|byte| *byte == b'\n').next().expect("a line");
        assert_eq!(refusal::retry_after(&String::from_utf8_lossy(identification)), Some(after));
    }
    if let Some(reason) = refusal::from_login(&text) {
        assert!(reason.chars().count() <= refusal::MOST && !reason.contains(char::is_control));
        assert_eq!(refusal::from_login(&refusal::to_login(&reason)), Some(reason));
    }
}
