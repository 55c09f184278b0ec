//! Frames: a 9-byte header (type, stream id, payload length; big endian) and a payload.
//!
//! | type | payload |
//! | --- | --- |
//! | 1 OPEN | dial deadline in ms (u32), target, origin |
//! | 2 OPENED | empty |
//! | 3 REFUSED | error code (u8) and two texts; a text that the error does not need is empty |
//! | 4 DATA | bytes, which the receiver's window shrinks by |
//! | 5 CREDIT | bytes (u32) by which the receiver's window grows, to at most [`MAX`](super::window::MAX) |
//! | 6 EOF | empty; the sender sends no more DATA |
//! | 7 RESET | reason; the stream is gone in both directions |
//! | 8 PING, 9 PONG | 8 random bytes; each PING is answered once, with the same bytes |
//! | 10 GOAWAY | reason; no new streams are accepted from now on |
//! | 11 CERTIFICATE | a renewed host certificate in OpenSSH's text form |
//!
//! Every text, such as a target, an origin, a reason or a certificate, is its length in bytes (u16) followed by UTF-8.
//!
//! PING, PONG, GOAWAY and CERTIFICATE have stream id 0. The others have a stream's id, which is never 0 and never used twice
//! ([`super::ids`]).

use bytes::{BufMut, Bytes, BytesMut};

use crate::{DialError, refusal::printable};

/// The length of a frame's header in bytes.
pub const HEADER: usize = 9;
/// The most payload bytes of a DATA frame. With its header it fits into one SSH packet.
pub const MAX_DATA: usize = 63 * 1024;
/// The most payload bytes of any other frame.
pub const MAX_CONTROL: usize = 16 * 1024;
/// The most bytes of a certificate, which is alone in its frame.
const MAX_CERTIFICATE: usize = MAX_CONTROL - 2;
/// The most bytes of any other text. What is longer is cut off.
const MAX_TEXT: usize = MAX_CONTROL / 4;

const OPEN: u8 = 1;
const OPENED: u8 = 2;
const REFUSED: u8 = 3;
const DATA: u8 = 4;
const CREDIT: u8 = 5;
const EOF: u8 = 6;
const RESET: u8 = 7;
const PING: u8 = 8;
const PONG: u8 = 9;
const GOAWAY: u8 = 10;
const CERTIFICATE: u8 = 11;

/// One decoded frame. A DATA frame comes in several parts if its bytes do.
#[derive(Debug, PartialEq, Eq)]
pub enum Frame<'a> {
    Open { stream: u32, timeout_ms: u32, target: String, origin: String },
    Opened { stream: u32 },
    Refused { stream: u32, error: DialError },
    Data { stream: u32, bytes: &'a [u8] },
    Credit { stream: u32, bytes: u32 },
    Eof { stream: u32 },
    Reset { stream: u32, reason: String },
    Ping([u8; 8]),
    Pong([u8; 8]),
    GoAway { reason: String },
    Certificate { text: String },
}

/// The peer broke the protocol, and its tunnel has to be closed.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum FrameError {
    #[error("frame type {0} is unknown")]
    Type(u8),
    #[error("a frame of type {kind} has {len} bytes of payload")]
    Length { kind: u8, len: usize },
    #[error("a frame of type {0} has a payload that can't be read")]
    Payload(u8),
    #[error("a frame of type {0} has a stream id that can't be")]
    Stream(u8),
}

/// Encodes a frame. DATA on the data path is encoded in place instead, by [`start_data`] and [`finish_data`].
pub fn encode(frame: &Frame<'_>) -> Bytes {
    let mut out = BytesMut::with_capacity(HEADER + 16);
    out.put_bytes(0, HEADER);
    let (kind, stream) = match frame {
        Frame::Open { stream, timeout_ms, target, origin } => {
            out.put_u32(*timeout_ms);
            put_text(&mut out, target);
            put_text(&mut out, origin);
            (OPEN, *stream)
        }
        Frame::Opened { stream } => (OPENED, *stream),
        Frame::Refused { stream, error } => {
            put_error(&mut out, error);
            (REFUSED, *stream)
        }
        Frame::Data { stream, bytes } => {
            out.extend_from_slice(bytes);
            (DATA, *stream)
        }
        Frame::Credit { stream, bytes } => {
            out.put_u32(*bytes);
            (CREDIT, *stream)
        }
        Frame::Eof { stream } => (EOF, *stream),
        Frame::Reset { stream, reason } => {
            put_text(&mut out, reason);
            (RESET, *stream)
        }
        Frame::Ping(id) => {
            out.put_slice(id);
            (PING, 0)
        }
        Frame::Pong(id) => {
            out.put_slice(id);
            (PONG, 0)
        }
        Frame::GoAway { reason } => {
            put_text(&mut out, reason);
            (GOAWAY, 0)
        }
        Frame::Certificate { text } => {
            put_text_up_to(&mut out, text, MAX_CERTIFICATE);
            (CERTIFICATE, 0)
        }
    };
    put_header(&mut out, kind, stream);
    out.freeze()
}

/// A buffer for a DATA frame with at most `payload` bytes. Append the payload to the [`HEADER`] bytes that it already holds,
/// and then call [`finish_data`].
pub fn start_data(payload: usize) -> BytesMut {
    let mut out = BytesMut::with_capacity(HEADER + payload);
    out.put_bytes(0, HEADER);
    out
}

/// Completes a frame that [`start_data`] began.
pub fn finish_data(mut frame: BytesMut, stream: u32) -> Bytes {
    put_header(&mut frame, DATA, stream);
    frame.freeze()
}

fn put_header(out: &mut BytesMut, kind: u8, stream: u32) {
    let len = u32::try_from(out.len().saturating_sub(HEADER)).unwrap_or(u32::MAX);
    if let Some(mut header) = out.get_mut(..HEADER) {
        header.put_u8(kind);
        header.put_u32(stream);
        header.put_u32(len);
    }
}

fn put_text(out: &mut BytesMut, text: &str) {
    put_text_up_to(out, text, MAX_TEXT);
}

fn put_text_up_to(out: &mut BytesMut, text: &str, most: usize) {
    let mut end = text.len().min(most);
    while !text.is_char_boundary(end) {
        end -= 1;
    }
    let text = text.get(..end).unwrap_or_default();
    out.put_u16(u16::try_from(text.len()).unwrap_or_default());
    out.put_slice(text.as_bytes());
}

fn put_error(out: &mut BytesMut, error: &DialError) {
    let (code, first, second): (u8, &str, &str) = match error {
        DialError::BadTarget(text) => (1, text, ""),
        DialError::TooManyStreams(text) => (2, text, ""),
        DialError::Cancelled => (3, "", ""),
        DialError::NoRoute(text) => (4, text, ""),
        DialError::NoTunnel { node, state } => (5, node, state),
        DialError::TunnelLost { node, reason } => (6, node, reason),
        DialError::Policy { rule, reason } => (7, rule, reason),
        DialError::Refused(text) => (8, text, ""),
        DialError::Resolve(text) => (9, text, ""),
        DialError::Unreachable(text) => (10, text, ""),
        DialError::TimedOut(text) => (11, text, ""),
    };
    out.put_u8(code);
    put_text(out, first);
    put_text(out, second);
}

fn read_error(r: &mut Reader<'_>) -> Option<DialError> {
    let code = r.u8()?;
    let (first, second) = (r.text()?, r.text()?);
    Some(match code {
        1 => DialError::BadTarget(first),
        2 => DialError::TooManyStreams(first),
        3 => DialError::Cancelled,
        4 => DialError::NoRoute(first),
        5 => DialError::NoTunnel { node: first, state: second },
        6 => DialError::TunnelLost { node: first, reason: second },
        7 => DialError::Policy { rule: first, reason: second },
        8 => DialError::Refused(first),
        9 => DialError::Resolve(first),
        10 => DialError::Unreachable(first),
        11 => DialError::TimedOut(first),
        _ => return None,
    })
}

struct Reader<'a>(&'a [u8]);

impl Reader<'_> {
    fn take<const N: usize>(&mut self) -> Option<[u8; N]> {
        let (head, rest) = self.0.split_first_chunk::<N>()?;
        self.0 = rest;
        Some(*head)
    }

    fn u8(&mut self) -> Option<u8> {
        self.take::<1>().map(|[b]| b)
    }

    fn u32(&mut self) -> Option<u32> {
        self.take().map(u32::from_be_bytes)
    }

    /// Text that gets into logs and status lines.
    fn text(&mut self) -> Option<String> {
        self.raw_text().map(printable)
    }

    fn raw_text(&mut self) -> Option<&str> {
        let len = usize::from(u16::from_be_bytes(self.take()?));
        let (text, rest) = self.0.split_at_checked(len)?;
        self.0 = rest;
        std::str::from_utf8(text).ok()
    }
}

/// Turns bytes into frames, in whatever pieces the bytes arrive.
#[derive(Debug, Default)]
pub struct Decoder {
    state: State,
    /// What has arrived so far of a header or of the payload of a control frame.
    partial: Vec<u8>,
}

#[derive(Debug, Default)]
enum State {
    #[default]
    Header,
    Data {
        stream: u32,
        left: usize,
    },
    Control {
        kind: u8,
        stream: u32,
        len: usize,
    },
}

impl Decoder {
    /// The next frame in `input`, which is advanced past the bytes that were used; `None` if more bytes are needed.
    pub fn decode<'a>(&mut self, input: &mut &'a [u8]) -> Result<Option<Frame<'a>>, FrameError> {
        loop {
            match self.state {
                State::Header => {
                    if !self.gather(input, HEADER) {
                        return Ok(None);
                    }
                    self.state = header(&self.partial)?;
                    self.partial.clear();
                }
                State::Data { stream, left } => {
                    let n = left.min(input.len());
                    if n == 0 && left > 0 {
                        return Ok(None);
                    }
                    let (bytes, rest) = input.split_at(n);
                    *input = rest;
                    self.state =
                        if n == left { State::Header } else { State::Data { stream, left: left - n } };
                    return Ok(Some(Frame::Data { stream, bytes }));
                }
                State::Control { kind, stream, len } => {
                    if !self.gather(input, len) {
                        return Ok(None);
                    }
                    self.state = State::Header;
                    let frame = control(kind, stream, &self.partial);
                    self.partial.clear();
                    return frame.map(Some);
                }
            }
        }
    }

    fn gather(&mut self, input: &mut &[u8], len: usize) -> bool {
        let missing = len.saturating_sub(self.partial.len()).min(input.len());
        let (head, rest) = input.split_at(missing);
        self.partial.extend_from_slice(head);
        *input = rest;
        self.partial.len() >= len
    }
}

fn header(bytes: &[u8]) -> Result<State, FrameError> {
    let mut r = Reader(bytes);
    let (Some(kind), Some(stream), Some(len)) = (r.u8(), r.u32(), r.u32()) else {
        return Err(FrameError::Payload(0));
    };
    let len = usize::try_from(len).unwrap_or(usize::MAX);
    let on_stream = match kind {
        OPEN | OPENED | REFUSED | DATA | CREDIT | EOF | RESET => true,
        PING | PONG | GOAWAY | CERTIFICATE => false,
        _ => return Err(FrameError::Type(kind)),
    };
    if on_stream != (stream != 0) {
        return Err(FrameError::Stream(kind));
    }
    match kind {
        DATA if len > MAX_DATA => Err(FrameError::Length { kind, len }),
        DATA => Ok(State::Data { stream, left: len }),
        _ if len > MAX_CONTROL => Err(FrameError::Length { kind, len }),
        _ => Ok(State::Control { kind, stream, len }),
    }
}

fn control(kind: u8, stream: u32, payload: &[u8]) -> Result<Frame<'static>, FrameError> {
    let mut r = Reader(payload);
    let mut read = || {
        Some(match kind {
            OPEN => Frame::Open { stream, timeout_ms: r.u32()?, target: r.text()?, origin: r.text()? },
            OPENED => Frame::Opened { stream },
            REFUSED => Frame::Refused { stream, error: read_error(&mut r)? },
            CREDIT => Frame::Credit { stream, bytes: r.u32()? },
            EOF => Frame::Eof { stream },
            RESET => Frame::Reset { stream, reason: r.text()? },
            PING => Frame::Ping(r.take()?),
            PONG => Frame::Pong(r.take()?),
            GOAWAY => Frame::GoAway { reason: r.text()? },
            CERTIFICATE => Frame::Certificate { text: r.raw_text()?.replace(char::is_control, " ") },
            _ => return None,
        })
    };
    match read() {
        Some(frame) if r.0.is_empty() => Ok(frame),
        _ => Err(FrameError::Payload(kind)),
    }
}

#[cfg(test)]
mod tests {
    use rand::{RngExt, SeedableRng, rngs::StdRng};

    use super::*;
    use crate::refusal;

    fn samples() -> Vec<Frame<'static>> {
        let errors = [
            DialError::BadTarget("x".into()),
            DialError::TooManyStreams("x".into()),
            DialError::Cancelled,
            DialError::NoRoute("x".into()),
            DialError::NoTunnel { node: "n1".into(), state: "down".into() },
            DialError::TunnelLost { node: "n1".into(), reason: "cut".into() },
            DialError::Policy { rule: "link-local".into(), reason: "no".into() },
            DialError::Refused("connection refused".into()),
            DialError::Resolve("no such name".into()),
            DialError::Unreachable("no route to host".into()),
            DialError::TimedOut("10 s".into()),
        ];
        let mut all: Vec<_> = errors.into_iter().map(|error| Frame::Refused { stream: 3, error }).collect();
        all.extend([
            Frame::Open {
                stream: 1,
                timeout_ms: 10_000,
                target: "10.0.0.1:80".into(),
                origin: "uid=0".into(),
            },
            Frame::Opened { stream: u32::MAX },
            Frame::Data { stream: 7, bytes: b"hello" },
            Frame::Credit { stream: 1, bytes: 65536 },
            Frame::Eof { stream: 1 },
            Frame::Reset { stream: 1, reason: "gone".into() },
            Frame::Ping(*b"12345678"),
            Frame::Pong(*b"12345678"),
            Frame::GoAway { reason: "draining".into() },
            Frame::Certificate { text: "ssh-ed25519-cert-v01@openssh.com AAAA".into() },
        ]);
        all
    }

    #[test]
    fn round_trips_in_any_pieces() {
        for frame in samples() {
            let bytes = encode(&frame);
            for piece in [1, 2, 8, 9, 10, bytes.len()] {
                let mut decoder = Decoder::default();
                let mut data = Vec::new();
                let mut got = None;
                for mut chunk in bytes.chunks(piece) {
                    while let Some(f) = decoder.decode(&mut chunk).unwrap() {
                        if let Frame::Data { stream, bytes } = f {
                            assert_eq!(stream, 7);
                            data.extend_from_slice(bytes);
                        } else {
                            assert!(got.replace(f).is_none());
                        }
                    }
                    assert!(chunk.is_empty());
                }
                if let Frame::Data { bytes, .. } = frame {
                    assert_eq!(data, bytes);
                } else {
                    assert_eq!(got.as_ref(), Some(&frame), "in pieces of {piece}");
                }
            }
        }
    }

    #[test]
    fn the_wire_form_is_fixed() {
        assert_eq!(
            encode(&Frame::Open { stream: 1, timeout_ms: 256, target: "a:1".into(), origin: String::new() })
                [..],
            *b"\x01\0\0\0\x01\0\0\0\x0b\0\0\x01\0\0\x03a:1\0\0"
        );
        let mut data = start_data(2);
        data.extend_from_slice(b"hi");
        assert_eq!(finish_data(data, 2)[..], *b"\x04\0\0\0\x02\0\0\0\x02hi");
    }

    #[test]
    fn refuses_what_breaks_the_protocol() {
        for (bytes, want) in [
            (&b"\x00\0\0\0\x01\0\0\0\0"[..], FrameError::Type(0)),
            (b"\x04\0\0\0\0\0\0\0\x01", FrameError::Stream(DATA)),
            (b"\x08\0\0\0\x01\0\0\0\x08", FrameError::Stream(PING)),
            (b"\x04\0\0\0\x01\0\0\xfc\x01", FrameError::Length { kind: DATA, len: MAX_DATA + 1 }),
            (b"\x01\0\0\0\x01\xff\xff\xff\xff", FrameError::Length { kind: OPEN, len: u32::MAX as usize }),
            (b"\x05\0\0\0\x01\0\0\0\x03abc", FrameError::Payload(CREDIT)),
            (b"\x05\0\0\0\x01\0\0\0\x05abcde", FrameError::Payload(CREDIT)),
            (b"\x03\0\0\0\x01\0\0\0\x05\x63\0\0\0\0", FrameError::Payload(REFUSED)),
            (b"\x07\0\0\0\x01\0\0\0\x03\0\x01\xff", FrameError::Payload(RESET)),
        ] {
            let mut input = bytes;
            assert_eq!(Decoder::default().decode(&mut input), Err(want), "{bytes:?}");
        }
    }

    #[test]
    fn text_from_a_peer_is_printable() {
        let bytes = encode(&Frame::Reset { stream: 1, reason: "a\r\nSet-Cookie: \u{202e}x".into() });
        let frame = Decoder::default().decode(&mut &bytes[..]).unwrap().unwrap();
        assert_eq!(frame, Frame::Reset { stream: 1, reason: "a  Set-Cookie:  x".into() });
    }

    #[test]
    fn a_long_certificate_is_whole_and_other_long_texts_are_cut_off() {
        let text = "A".repeat(MAX_CERTIFICATE);
        let bytes = encode(&Frame::Certificate { text: text.clone() });
        assert_eq!(bytes.len(), HEADER + MAX_CONTROL);
        assert_eq!(
            Decoder::default().decode(&mut &bytes[..]),
            Ok(Some(Frame::Certificate { text: text.clone() }))
        );
        let bytes = encode(&Frame::GoAway { reason: text });
        let reason = "A".repeat(refusal::MOST);
        assert_eq!(Decoder::default().decode(&mut &bytes[..]), Ok(Some(Frame::GoAway { reason })));
    }

    #[test]
    fn no_bytes_make_it_panic_or_hoard() {
        let mut rng = StdRng::seed_from_u64(4);
        let valid: Vec<Bytes> = samples().iter().map(encode).collect();
        for _ in 0..20_000 {
            let mut bytes: Vec<u8> = valid[rng.random_range(0..valid.len())].to_vec();
            for _ in 0..rng.random_range(0..6) {
                let at = rng.random_range(0..bytes.len());
                bytes[at] = rng.random();
            }
            let mut decoder = Decoder::default();
            let mut input = &bytes[..];
            while let Ok(Some(_)) = decoder.decode(&mut input) {}
            assert!(decoder.partial.capacity() <= 2 * MAX_CONTROL);
        }
    }
}
