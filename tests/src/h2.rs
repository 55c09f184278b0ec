//! Speaks HTTP/2 as bytes: sends frames that are well-formed or not, and reads the answers.

use anyhow::{Context, bail};
use bytes::{BufMut, Bytes, BytesMut};
use tokio::io::{AsyncReadExt, AsyncWriteExt};

use crate::client::Stream;

pub const PREFACE: &[u8] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";

pub const DATA: u8 = 0;
pub const HEADERS: u8 = 1;
pub const PRIORITY: u8 = 2;
pub const RST_STREAM: u8 = 3;
pub const SETTINGS: u8 = 4;
pub const PUSH_PROMISE: u8 = 5;
pub const PING: u8 = 6;
pub const GOAWAY: u8 = 7;
pub const WINDOW_UPDATE: u8 = 8;
pub const CONTINUATION: u8 = 9;

pub const END_STREAM: u8 = 1;
pub const ACK: u8 = 1;
pub const END_HEADERS: u8 = 4;
pub const PADDED: u8 = 8;
pub const PRIORITIZED: u8 = 0x20;

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Frame {
    pub kind: u8,
    pub flags: u8,
    pub stream: u32,
    pub payload: Bytes,
}

impl Frame {
    pub fn new(kind: u8, flags: u8, stream: u32, payload: impl Into<Bytes>) -> Self {
        Self { kind, flags, stream, payload: payload.into() }
    }

    pub fn encode(&self) -> Bytes {
        let mut out = BytesMut::new();
        out.put_uint(self.payload.len() as u64, 3);
        out.put_u8(self.kind);
        out.put_u8(self.flags);
        out.put_u32(self.stream);
        out.put_slice(&self.payload);
        out.freeze()
    }
}

/// A header block in which every field is a literal: any bytes at all can be names and values.
pub fn block<N: AsRef<[u8]>, V: AsRef<[u8]>>(fields: &[(N, V)]) -> Bytes {
    let mut out = BytesMut::new();
    for (name, value) in fields {
        out.put_u8(0);
        for text in [name.as_ref(), value.as_ref()] {
            length(text.len(), &mut out);
            out.put_slice(text);
        }
    }
    out.freeze()
}

/// An integer with a prefix of seven bits (RFC 7541 §5.1).
fn length(mut n: usize, out: &mut BytesMut) {
    if n < 127 {
        out.put_u8(n as u8);
        return;
    }
    out.put_u8(127);
    n -= 127;
    while n >= 128 {
        out.put_u8((n % 128 + 128) as u8);
        n /= 128;
    }
    out.put_u8(n as u8);
}

/// How the server took what was sent.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Answer {
    Response(Response),
    /// RST_STREAM, with its error code.
    Reset(u32),
    /// GOAWAY with an error code other than 0.
    GoAway(u32),
    /// The acknowledgement of a PING.
    Pong(Bytes),
    Closed,
}

#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Response {
    pub status: u16,
    pub headers: Vec<(String, String)>,
    pub body: Vec<u8>,
    /// Frames that carried the body.
    pub frames: usize,
}

/// One connection.
pub struct Connection {
    stream: Stream,
    decoder: loona_hpack::Decoder<'static>,
}

impl Connection {
    /// Nothing is sent yet.
    pub fn raw(stream: Stream) -> Self {
        Self { stream, decoder: loona_hpack::Decoder::new() }
    }

    /// Sends the preface and empty settings.
    pub async fn start(stream: Stream) -> anyhow::Result<Self> {
        let mut this = Self::raw(stream);
        this.write(PREFACE).await?;
        this.send(&Frame::new(SETTINGS, 0, 0, Bytes::new())).await?;
        Ok(this)
    }

    pub async fn write(&mut self, bytes: &[u8]) -> anyhow::Result<()> {
        self.stream.write_all(bytes).await?;
        self.stream.flush().await?;
        Ok(())
    }

    pub async fn send(&mut self, frame: &Frame) -> anyhow::Result<()> {
        self.write(&frame.encode()).await
    }

    /// The next frame; `None` at the connection's end.
    pub async fn read(&mut self) -> Option<Frame> {
        let mut head = [0; 9];
        self.stream.read_exact(&mut head).await.ok()?;
        let length = u32::from_be_bytes([0, head[0], head[1], head[2]]) as usize;
        let stream = u32::from_be_bytes([head[5], head[6], head[7], head[8]]) & 0x7fff_ffff;
        let mut payload = vec![0; length];
        self.stream.read_exact(&mut payload).await.ok()?;
        Some(Frame { kind: head[3], flags: head[4], stream, payload: payload.into() })
    }

    /// What the server says to the end of a stream; `on` 0 is the connection itself: PING and GOAWAY. Settings and
    /// pings of the server are acknowledged meanwhile.
    pub async fn answer(&mut self, on: u32) -> anyhow::Result<Answer> {
        let mut response = Response::default();
        loop {
            let Some(frame) = self.read().await else { return Ok(Answer::Closed) };
            let end = frame.flags & END_STREAM != 0 && frame.stream == on && on != 0;
            match frame.kind {
                SETTINGS if frame.flags & ACK == 0 => {
                    // The server may have closed already: it says so when it is read.
                    let _ = self.send(&Frame::new(SETTINGS, ACK, 0, Bytes::new())).await;
                }
                PING if frame.flags & ACK == 0 => {
                    let _ = self.send(&Frame::new(PING, ACK, 0, frame.payload)).await;
                }
                PING if on == 0 => return Ok(Answer::Pong(frame.payload)),
                GOAWAY => {
                    let code = code(frame.payload.get(4..8).context("a GOAWAY is longer")?);
                    if code != 0 {
                        return Ok(Answer::GoAway(code));
                    }
                }
                RST_STREAM if frame.stream == on => return Ok(Answer::Reset(code(&frame.payload))),
                HEADERS => {
                    if frame.flags & END_HEADERS == 0 || frame.flags & (PADDED | PRIORITIZED) != 0 {
                        bail!("a head in parts or padded: {frame:?}");
                    }
                    let fields = self.decoder.decode(&frame.payload);
                    let fields = fields.map_err(|error| anyhow::anyhow!("HPACK: {error:?}"))?;
                    if frame.stream != on {
                        continue;
                    }
                    for (name, value) in fields {
                        let text = |bytes: Vec<u8>| String::from_utf8_lossy(&bytes).into_owned();
                        match (text(name), text(value)) {
                            (name, value) if name == ":status" => response.status = value.parse()?,
                            field => response.headers.push(field),
                        }
                    }
                }
                DATA => {
                    let n = frame.payload.len() as u32;
                    for stream in [0, frame.stream] {
                        if n > 0 {
                            let grant = Bytes::copy_from_slice(&n.to_be_bytes());
                            let _ = self.send(&Frame::new(WINDOW_UPDATE, 0, stream, grant)).await;
                        }
                    }
                    if frame.stream == on {
                        response.body.extend_from_slice(&frame.payload);
                        response.frames += 1;
                    }
                }
                _ => {}
            }
            if end {
                return Ok(Answer::Response(response));
            }
        }
    }
}

fn code(bytes: &[u8]) -> u32 {
    bytes.iter().fold(0, |code, byte| code << 8 | u32::from(*byte))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn blocks_are_read_as_they_were_written() {
        for n in [0, 1, 126, 127, 128, 254, 255, 300, 20_000] {
            let fields = [(b"a".to_vec(), vec![b'x'; n]), (vec![b'n'; n.max(1)], b"\0\r\n".to_vec())];
            assert_eq!(loona_hpack::Decoder::new().decode(&block(&fields)).unwrap(), fields);
        }
        let frame = Frame::new(PING, ACK, 7, vec![1; 8]);
        assert_eq!(frame.encode()[..10], [0, 0, 8, 6, 1, 0, 0, 0, 7, 1]);
    }
}
