//! Frames: a header (type, stream id, payload length; big endian) and a payload. `proto/STREAMS.md` is the specification.
//!
//! `streams-v2` says what `streams-v1` leaves to the order of the bytes: where data belongs, how far credit reaches, and
//! where a stream ends. Both have the same types, of which the first version lacks HELLO, CALL, RETRACT, RETRACTED,
//! RELINK and DRAIN.

use bytes::{BufMut, Bytes, BytesMut};

use super::{Version, window};
use crate::{DialError, refusal::printable};

/// The most bytes of a stream in one DATA frame. With its header it fits into one SSH packet.
pub const MAX_DATA: usize = 63 * 1024;
/// The most payload bytes of any other frame.
pub const MAX_CONTROL: usize = 16 * 1024;
/// The most bytes of a certificate, which is alone in its frame.
const MAX_CERTIFICATE: usize = MAX_CONTROL - 2;
/// The most bytes of any other text. What is longer is cut off.
const MAX_TEXT: usize = MAX_CONTROL / 4;
/// The length of the offset in front of a stream's bytes, in the versions that say it.
const OFFSET: usize = 8;

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
const HELLO: u8 = 12;
const CALL: u8 = 13;
const RETRACT: u8 = 14;
const RETRACTED: u8 = 15;
const RELINK: u8 = 16;
const DRAIN: u8 = 17;
/// Frames whose type has this bit are skipped by who does not know them.
const OPTIONAL: u8 = 0x80;

/// One decoded frame. A DATA frame comes in several parts if its bytes do.
///
/// Fields that are `None` are not on the wire of `streams-v1`.
#[derive(Debug, PartialEq, Eq)]
pub enum Frame<'a> {
    Hello(Hello),
    /// `limit` and the one in [`Frame::Opened`] are the number of bytes that the peer may send before the first credit.
    Open {
        stream: u64,
        timeout_ms: u32,
        limit: u64,
        target: String,
        origin: String,
    },
    Opened {
        stream: u64,
        limit: u64,
    },
    Refused {
        stream: u64,
        error: DialError,
    },
    /// `offset` is the number of bytes of this direction before these.
    Data {
        stream: u64,
        offset: Option<u64>,
        bytes: &'a [u8],
    },
    Credit {
        stream: u64,
        credit: Credit,
    },
    /// `end` is the number of bytes of this direction.
    Eof {
        stream: u64,
        end: Option<u64>,
    },
    Reset {
        stream: u64,
        end: Option<u64>,
        reason: String,
    },
    Ping([u8; 8]),
    Pong([u8; 8]),
    GoAway {
        reason: String,
    },
    Certificate {
        text: String,
    },
    /// The node is asked to dial one more connection.
    Call,
    /// The peer is asked to lower the number of bytes that it may send to `limit`, or to what it has sent.
    Retract {
        stream: u64,
        limit: u64,
    },
    /// The answer: from now on, the sender of this frame may send `limit` bytes.
    Retracted {
        stream: u64,
        limit: u64,
    },
    /// Whoever dials the links is asked for another one, which is to take the place of this one.
    Relink,
    /// The node wants no streams that others can carry, and after so many milliseconds none at all; 0 undoes that.
    Drain {
        milliseconds: u64,
    },
}

impl Frame<'_> {
    /// What the specification calls it.
    pub fn name(&self) -> &'static str {
        match self {
            Self::Hello(_) => "HELLO",
            Self::Open { .. } => "OPEN",
            Self::Opened { .. } => "OPENED",
            Self::Refused { .. } => "REFUSED",
            Self::Data { .. } => "DATA",
            Self::Credit { .. } => "CREDIT",
            Self::Eof { .. } => "EOF",
            Self::Reset { .. } => "RESET",
            Self::Ping(_) => "PING",
            Self::Pong(_) => "PONG",
            Self::GoAway { .. } => "GOAWAY",
            Self::Certificate { .. } => "CERTIFICATE",
            Self::Call => "CALL",
            Self::Retract { .. } => "RETRACT",
            Self::Retracted { .. } => "RETRACTED",
            Self::Relink => "RELINK",
            Self::Drain { .. } => "DRAIN",
        }
    }
}

/// What an agent says before anything else.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Hello {
    /// One bit for each thing that this agent can do, such as [`FRONT_END`](Self::FRONT_END). Unknown bits are ignored.
    pub capabilities: u64,
    /// Chosen at random when an agent starts.
    pub instance: [u8; 16],
    /// What the connection belongs to. The master chooses it at random for the first connection, and says the same on further
    /// ones. The node repeats it.
    pub session: [u8; 16],
}

impl Hello {
    /// The master accepts streams to its front end.
    pub const FRONT_END: u64 = 1;
    /// Sessions may have further connections.
    pub const CONNECTIONS: u64 = 2;
    /// The node has the session that the master has named, and this connection is a further one of it.
    pub const JOINED: u64 = 4;
    /// The agent answers RETRACT.
    pub const RETRACT: u64 = 8;
    /// The agent understands RELINK.
    pub const RELINK: u64 = 16;
    /// The agent knows DRAIN, which only nodes send.
    pub const DRAIN: u64 = 32;

    pub fn can(&self, capability: u64) -> bool {
        self.capabilities & capability == capability
    }
}

/// How many more bytes the peer may send.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Credit {
    /// So many more than before (`streams-v1`).
    By(u32),
    /// So many since the stream began.
    UpTo(u64),
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

impl Version {
    /// The length of a frame's header in bytes.
    pub fn header(self) -> usize {
        match self {
            Self::V1 => 9,
            Self::V2 => 13,
        }
    }

    /// The length of everything in front of the bytes of a DATA frame.
    pub fn data_header(self) -> usize {
        match self {
            Self::V1 => self.header(),
            Self::V2 => self.header() + OFFSET,
        }
    }
}

/// Encodes a frame. DATA on the data path is encoded in place instead, by [`start_data`] and [`finish_data`].
pub fn encode(version: Version, frame: &Frame<'_>) -> Bytes {
    let mut out = BytesMut::with_capacity(version.header() + 16);
    out.put_bytes(0, version.header());
    // What the first version does not say.
    let said = |out: &mut BytesMut, number: u64| match version {
        Version::V1 => {}
        Version::V2 => out.put_u64(number),
    };
    let (kind, stream) = match frame {
        Frame::Hello(Hello { capabilities, instance, session }) => {
            out.put_u64(*capabilities);
            out.put_slice(instance);
            out.put_slice(session);
            (HELLO, 0)
        }
        Frame::Open { stream, timeout_ms, limit, target, origin } => {
            out.put_u32(*timeout_ms);
            said(&mut out, *limit);
            put_text(&mut out, target);
            put_text(&mut out, origin);
            (OPEN, *stream)
        }
        Frame::Opened { stream, limit } => {
            said(&mut out, *limit);
            (OPENED, *stream)
        }
        Frame::Refused { stream, error } => {
            put_error(&mut out, error);
            (REFUSED, *stream)
        }
        Frame::Data { stream, offset, bytes } => {
            said(&mut out, offset.unwrap_or_default());
            out.extend_from_slice(bytes);
            (DATA, *stream)
        }
        Frame::Credit { stream, credit } => {
            match *credit {
                Credit::By(bytes) => out.put_u32(bytes),
                Credit::UpTo(limit) => out.put_u64(limit),
            }
            (CREDIT, *stream)
        }
        Frame::Eof { stream, end } => {
            said(&mut out, end.unwrap_or_default());
            (EOF, *stream)
        }
        Frame::Reset { stream, end, reason } => {
            said(&mut out, end.unwrap_or_default());
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
        Frame::Call => (CALL, 0),
        Frame::Retract { stream, limit } => {
            out.put_u64(*limit);
            (RETRACT, *stream)
        }
        Frame::Retracted { stream, limit } => {
            out.put_u64(*limit);
            (RETRACTED, *stream)
        }
        Frame::Relink => (RELINK, 0),
        Frame::Drain { milliseconds } => {
            out.put_u64(*milliseconds);
            (DRAIN, 0)
        }
    };
    put_header(version, &mut out, kind, stream);
    out.freeze()
}

/// A buffer for a DATA frame with at most `payload` bytes. Append the payload to what it already holds, and then call
/// [`finish_data`].
pub fn start_data(version: Version, payload: usize) -> BytesMut {
    let mut out = BytesMut::with_capacity(version.data_header() + payload);
    out.put_bytes(0, version.data_header());
    out
}

/// Completes a frame that [`start_data`] began. `offset` is the number of the stream's bytes before these.
pub fn finish_data(version: Version, mut frame: BytesMut, stream: u64, offset: u64) -> Bytes {
    put_header(version, &mut frame, DATA, stream);
    if let Some(mut place) = frame.get_mut(version.header()..version.data_header())
        && version == Version::V2
    {
        place.put_u64(offset);
    }
    frame.freeze()
}

fn put_header(version: Version, out: &mut BytesMut, kind: u8, stream: u64) {
    let len = u32::try_from(out.len().saturating_sub(version.header())).unwrap_or(u32::MAX);
    if let Some(mut header) = out.get_mut(..version.header()) {
        header.put_u8(kind);
        match version {
            // No stream of this version has an id that does not fit.
            Version::V1 => header.put_u32(u32::try_from(stream).unwrap_or_default()),
            Version::V2 => header.put_u64(stream),
        }
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

    fn u64(&mut self) -> Option<u64> {
        self.take().map(u64::from_be_bytes)
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
#[derive(Debug)]
pub struct Decoder {
    version: Version,
    state: State,
    /// What has arrived so far of a header or of the payload of a control frame.
    partial: Vec<u8>,
}

#[derive(Clone, Copy, Debug)]
enum State {
    Header,
    /// The offset of a DATA frame, whose payload has `len` bytes after it.
    Offset {
        stream: u64,
        len: usize,
    },
    Data {
        stream: u64,
        offset: Option<u64>,
        left: usize,
    },
    Control {
        kind: u8,
        stream: u64,
        len: usize,
    },
    /// A frame that this agent does not know and need not know.
    Skipped {
        left: usize,
    },
}

impl Decoder {
    pub fn new(version: Version) -> Self {
        Self { version, state: State::Header, partial: Vec::new() }
    }

    /// The next frame in `input`, which is advanced past the bytes that were used; `None` if more bytes are needed.
    pub fn decode<'a>(&mut self, input: &mut &'a [u8]) -> Result<Option<Frame<'a>>, FrameError> {
        loop {
            match self.state {
                State::Header => {
                    if !self.gather(input, self.version.header()) {
                        return Ok(None);
                    }
                    self.state = header(self.version, &self.partial)?;
                    self.partial.clear();
                }
                State::Offset { stream, len } => {
                    if !self.gather(input, OFFSET) {
                        return Ok(None);
                    }
                    let offset = Reader(&self.partial).u64();
                    self.state = State::Data { stream, offset, left: len };
                    self.partial.clear();
                }
                State::Data { stream, offset, left } => {
                    let n = left.min(input.len());
                    if n == 0 && left > 0 {
                        return Ok(None);
                    }
                    let (bytes, rest) = input.split_at(n);
                    *input = rest;
                    let next = offset.map(|offset| offset.saturating_add(n as u64));
                    self.state = if n == left {
                        State::Header
                    } else {
                        State::Data { stream, offset: next, left: left - n }
                    };
                    return Ok(Some(Frame::Data { stream, offset, bytes }));
                }
                State::Control { kind, stream, len } => {
                    if !self.gather(input, len) {
                        return Ok(None);
                    }
                    self.state = State::Header;
                    let frame = control(self.version, kind, stream, &self.partial);
                    self.partial.clear();
                    return frame.map(Some);
                }
                State::Skipped { left } => {
                    let n = left.min(input.len());
                    *input = input.get(n..).unwrap_or_default();
                    self.state = if n == left { State::Header } else { State::Skipped { left: left - n } };
                    if n < left {
                        return Ok(None);
                    }
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

fn header(version: Version, bytes: &[u8]) -> Result<State, FrameError> {
    let mut r = Reader(bytes);
    let kind = r.u8();
    let stream = match version {
        Version::V1 => r.u32().map(u64::from),
        Version::V2 => r.u64(),
    };
    let (Some(kind), Some(stream), Some(len)) = (kind, stream, r.u32()) else {
        return Err(FrameError::Payload(0));
    };
    let len = usize::try_from(len).unwrap_or(usize::MAX);
    let on_stream = match (kind, version) {
        (OPEN | OPENED | REFUSED | DATA | CREDIT | EOF | RESET, _) => true,
        (RETRACT | RETRACTED, Version::V2) => true,
        (PING | PONG | GOAWAY | CERTIFICATE, _) | (HELLO | CALL | RELINK | DRAIN, Version::V2) => false,
        (OPTIONAL.., Version::V2) if len <= MAX_CONTROL => return Ok(State::Skipped { left: len }),
        (OPTIONAL.., Version::V2) => return Err(FrameError::Length { kind, len }),
        _ => return Err(FrameError::Type(kind)),
    };
    if on_stream != (stream != 0) {
        return Err(FrameError::Stream(kind));
    }
    match (kind, version) {
        (DATA, Version::V1) if len <= MAX_DATA => Ok(State::Data { stream, offset: None, left: len }),
        (DATA, Version::V2) if (OFFSET..=OFFSET + MAX_DATA).contains(&len) => {
            Ok(State::Offset { stream, len: len - OFFSET })
        }
        (DATA, _) => Err(FrameError::Length { kind, len }),
        _ if len > MAX_CONTROL => Err(FrameError::Length { kind, len }),
        _ => Ok(State::Control { kind, stream, len }),
    }
}

fn control(version: Version, kind: u8, stream: u64, payload: &[u8]) -> Result<Frame<'static>, FrameError> {
    let mut r = Reader(payload);
    let is_v2 = version == Version::V2;
    // What the first version does not say.
    let said = |r: &mut Reader<'_>| if is_v2 { r.u64().map(Some) } else { Some(None) };
    let limit = |r: &mut Reader<'_>| Some(said(r)?.unwrap_or(u64::from(window::INITIAL)));
    let mut read = || {
        Some(match kind {
            HELLO => Frame::Hello(Hello { capabilities: r.u64()?, instance: r.take()?, session: r.take()? }),
            OPEN => Frame::Open {
                stream,
                timeout_ms: r.u32()?,
                limit: limit(&mut r)?,
                target: r.text()?,
                origin: r.text()?,
            },
            OPENED => Frame::Opened { stream, limit: limit(&mut r)? },
            REFUSED => Frame::Refused { stream, error: read_error(&mut r)? },
            CREDIT if is_v2 => Frame::Credit { stream, credit: Credit::UpTo(r.u64()?) },
            CREDIT => Frame::Credit { stream, credit: Credit::By(r.u32()?) },
            EOF => Frame::Eof { stream, end: said(&mut r)? },
            RESET => Frame::Reset { stream, end: said(&mut r)?, reason: r.text()? },
            PING => Frame::Ping(r.take()?),
            PONG => Frame::Pong(r.take()?),
            GOAWAY => Frame::GoAway { reason: r.text()? },
            CALL => Frame::Call,
            RELINK => Frame::Relink,
            DRAIN => Frame::Drain { milliseconds: r.u64()? },
            RETRACT => Frame::Retract { stream, limit: r.u64()? },
            RETRACTED => Frame::Retracted { stream, limit: r.u64()? },
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
mod tests;
