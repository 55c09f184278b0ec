//! What must hold for every decoder of a peer's bytes, whatever the bytes are: nothing panics, and what was decoded
//! means the same after it has been encoded again.
//!
//! The fuzz targets call these functions with new inputs, and `tests/tests/corpora.rs` with those that are kept in
//! `corpora/`, in a folder for each function.

#![allow(dead_code, reason = "each fuzz target uses one function")]

use bytes::Bytes;
use prost::Message;
use proto::{
    call_home::Master,
    connect,
    join::{JoinRequest, JoinResponse, JoinToken},
    konnectivity::Packet,
    mux::frame::{self, Decoder, Frame},
    refusal,
    revocation::{Report, SignedList, krl::Krl},
    target::Target,
};

/// A function that is given a peer's bytes.
pub type Check = fn(&[u8]);

/// All functions by name.
pub const ALL: &[(&str, Check)] = &[
    ("frames", frames),
    ("connect", connect),
    ("konnectivity", konnectivity),
    ("join_request", join_request),
    ("join_response", join_response),
    ("join_token", join_token),
    ("revocation_list", revocation_list),
    ("signed_list", signed_list),
    ("revocation_report", revocation_report),
    ("target", target),
    ("call_home", call_home),
    ("refusal", refusal),
];

/// The frames of the multiplexer in `bytes`, taken in pieces of `size`, each as text; the last is the error, if any.
/// DATA of one stream that arrives in pieces is joined.
fn read_frames(bytes: &[u8], size: usize) -> Vec<String> {
    let mut decoder = Decoder::default();
    let mut found = Vec::new();
    let mut data: Option<(u32, Vec<u8>)> = None;
    for piece in bytes.chunks(size.max(1)) {
        let mut input = piece;
        loop {
            match decoder.decode(&mut input) {
                Ok(Some(Frame::Data { stream, bytes })) => match &mut data {
                    Some((of, before)) if *of == stream => before.extend_from_slice(bytes),
                    _ => found.extend(data.replace((stream, bytes.to_vec())).map(|d| format!("{d:?}"))),
                },
                Ok(Some(frame)) => {
                    found.extend(data.take().map(|d| format!("{d:?}")));
                    found.push(format!("{frame:?}"));
                    reencode(&frame);
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

fn reencode(frame: &Frame<'_>) {
    let encoded = frame::encode(frame);
    let mut input = &encoded[..];
    let mut decoder = Decoder::default();
    assert!(matches!(decoder.decode(&mut input), Ok(Some(again)) if again == *frame));
    assert!(input.is_empty());
}

/// Frames are the same in whatever pieces their bytes arrive.
pub fn frames(bytes: &[u8]) {
    let whole = read_frames(bytes, bytes.len());
    for size in [1, 7] {
        assert_eq!(read_frames(bytes, size), whole);
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

/// Nothing that changes how a log is shown gets through.
pub fn refusal(bytes: &[u8]) {
    let text = String::from_utf8_lossy(bytes);
    if let Some(reason) = refusal::from_login(&text) {
        assert!(reason.chars().count() <= refusal::MOST && !reason.contains(char::is_control));
        assert_eq!(refusal::from_login(&refusal::to_login(&reason)), Some(reason));
    }
}
