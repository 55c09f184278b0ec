//! SPDY/3.1, the server's side, as far as kubectl uses it for exec, attach and port-forward.
//!
//! Frames are those of draft-mbelshe-httpbis-spdy-00 with the 3.1 session window. As kubelets do, this server
//! answers pings, ignores settings and windows, and sends neither: kubectl does not look at windows. A stream
//! that is not read holds up the connection, so that what is on the way stays bounded.

use std::{collections::HashMap, sync::LazyLock, time::Duration};

use anyhow::{Context, bail};
use bytes::{Buf, BufMut, Bytes, BytesMut};
use flate2::{Compress, Compression, Decompress, FlushCompress, FlushDecompress, Status};
use tokio::{
    io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt},
    sync::mpsc,
    task::JoinSet,
};

/// The words that header blocks are compressed with from the start, each behind its length; then text as it is.
static DICTIONARY: LazyLock<Bytes> = LazyLock::new(|| {
    let mut bytes = BytesMut::new();
    for word in DICTIONARY_WORDS.split('|') {
        put_text(&mut bytes, word);
    }
    bytes.put_slice(DICTIONARY_TEXT.as_bytes());
    bytes.freeze()
});

const DICTIONARY_WORDS: &str = "options|head|post|put|delete|trace|accept|accept-charset|accept-encoding|accept-language|\
    accept-ranges|age|allow|authorization|cache-control|connection|content-base|content-encoding|content-language|\
    content-length|content-location|content-md5|content-range|content-type|date|etag|expect|expires|from|host|\
    if-match|if-modified-since|if-none-match|if-range|if-unmodified-since|last-modified|location|max-forwards|\
    pragma|proxy-authenticate|proxy-authorization|range|referer|retry-after|server|te|trailer|transfer-encoding|\
    upgrade|user-agent|vary|via|warning|www-authenticate|method|get|status|200 OK|version|HTTP/1.1|url|public|\
    set-cookie|keep-alive|origin";
const DICTIONARY_TEXT: &str = "100101201202205206300302303304305306307402405406407408409410411412413414415416417502504505\
    203 Non-Authoritative Information204 No Content301 Moved Permanently400 Bad Request401 Unauthorized403 Forbidden\
    404 Not Found500 Internal Server Error501 Not Implemented503 Service Unavailable\
    Jan Feb Mar Apr May Jun Jul Aug Sept Oct Nov Dec 00:00:00 Mon, Tue, Wed, Thu, Fri, Sat, Sun, GMT\
    chunked,text/html,image/png,image/jpg,image/gif,application/xml,application/xhtml+xml,text/plain,text/javascript,\
    publicprivatemax-age=gzip,deflate,sdchcharset=utf-8charset=iso-8859-1,utf-,*,enq=0.";

const HEADER: usize = 8;
const VERSION: u16 = 3;
const FIN: u8 = 1;
/// The most bytes of a frame's body, and of the headers that a block expands to.
const MAX: usize = 1 << 20;
/// Frames and chunks that wait.
const QUEUE: usize = 8;

/// Names and values; names in lower case.
pub type Headers = Vec<(String, String)>;

#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Frame {
    SynStream { id: u32, headers: Headers, fin: bool },
    SynReply { id: u32, headers: Headers, fin: bool },
    Headers { id: u32, headers: Headers, fin: bool },
    Data { id: u32, data: Bytes, fin: bool },
    RstStream { id: u32, status: u32 },
    Ping { id: u32 },
    GoAway { last: u32, status: u32 },
    WindowUpdate { id: u32, delta: u32 },
    Settings,
}

/// Writes frames of one connection.
pub struct Encoder(Compress);

impl Default for Encoder {
    fn default() -> Self {
        let mut compress = Compress::new(Compression::default(), true);
        compress.set_dictionary(&DICTIONARY).expect("a new compressor takes a dictionary");
        Self(compress)
    }
}

impl Encoder {
    pub fn encode(&mut self, frame: &Frame, out: &mut BytesMut) {
        let mut body = BytesMut::new();
        let mut flags = 0;
        let mut end = |fin: bool| flags = if fin { FIN } else { 0 };
        let kind = match frame {
            Frame::Data { id, data, fin } => {
                end(*fin);
                out.put_u32(*id);
                out.put_u32(u32::from(flags) << 24 | data.len() as u32);
                out.put_slice(data);
                return;
            }
            Frame::SynStream { id, headers, fin } => {
                end(*fin);
                body.put_u32(*id);
                // It belongs to no other stream and has no priority.
                body.put_slice(&[0; 6]);
                self.block(headers, &mut body);
                1
            }
            Frame::SynReply { id, headers, fin } | Frame::Headers { id, headers, fin } => {
                end(*fin);
                body.put_u32(*id);
                self.block(headers, &mut body);
                if matches!(frame, Frame::SynReply { .. }) { 2 } else { 8 }
            }
            Frame::RstStream { id, status } => {
                body.put_u32(*id);
                body.put_u32(*status);
                3
            }
            Frame::Settings => {
                body.put_u32(0);
                4
            }
            Frame::Ping { id } => {
                body.put_u32(*id);
                6
            }
            Frame::GoAway { last, status } => {
                body.put_u32(*last);
                body.put_u32(*status);
                7
            }
            Frame::WindowUpdate { id, delta } => {
                body.put_u32(*id);
                body.put_u32(*delta);
                9
            }
        };
        out.put_u16(0x8000 | VERSION);
        out.put_u16(kind);
        out.put_u32(u32::from(flags) << 24 | body.len() as u32);
        out.put_slice(&body);
    }

    fn block(&mut self, headers: &Headers, out: &mut BytesMut) {
        let mut plain = BytesMut::new();
        plain.put_u32(headers.len() as u32);
        for (name, value) in headers {
            put_text(&mut plain, name);
            put_text(&mut plain, value);
        }
        let mut buffer = [0; 4096];
        loop {
            let (before_in, before_out) = (self.0.total_in(), self.0.total_out());
            self.0.compress(&plain, &mut buffer, FlushCompress::Sync).expect("compression has no errors");
            plain.advance((self.0.total_in() - before_in) as usize);
            let written = (self.0.total_out() - before_out) as usize;
            out.put_slice(&buffer[..written]);
            if written < buffer.len() {
                return;
            }
        }
    }
}

/// Reads frames of one connection.
pub struct Decoder(Decompress);

impl Default for Decoder {
    fn default() -> Self {
        Self(Decompress::new(true))
    }
}

impl Decoder {
    /// The next frame, once all of it is there.
    pub fn decode(&mut self, from: &mut BytesMut) -> anyhow::Result<Option<Frame>> {
        if from.len() < HEADER {
            return Ok(None);
        }
        let mut head = &from[..HEADER];
        let (first, second) = (head.get_u32(), head.get_u32());
        let (flags, length) = ((second >> 24) as u8, (second & 0x00ff_ffff) as usize);
        if length > MAX {
            bail!("a frame of {length} bytes");
        }
        if from.len() < HEADER + length {
            return Ok(None);
        }
        from.advance(HEADER);
        let mut body = from.split_to(length).freeze();
        let fin = flags & FIN != 0;
        if first >> 31 == 0 {
            return Ok(Some(Frame::Data { id: first, data: body, fin }));
        }
        let (version, kind) = ((first >> 16) as u16 & 0x7fff, first as u16);
        if version != VERSION {
            bail!("version {version} of SPDY");
        }
        let mut number = || body.try_get_u32().with_context(|| format!("a short frame of type {kind}"));
        Ok(Some(match kind {
            1 => {
                let id = number()?;
                number()?;
                body.try_get_u16().context("a short SYN_STREAM")?;
                Frame::SynStream { id, headers: self.block(&body)?, fin }
            }
            2 => Frame::SynReply { id: number()?, headers: self.block(&body)?, fin },
            3 => Frame::RstStream { id: number()?, status: number()? },
            4 => Frame::Settings,
            6 => Frame::Ping { id: number()? },
            7 => Frame::GoAway { last: number()?, status: number()? },
            8 => Frame::Headers { id: number()?, headers: self.block(&body)?, fin },
            9 => Frame::WindowUpdate { id: number()?, delta: number()? },
            _ => bail!("a frame of type {kind}"),
        }))
    }

    fn block(&mut self, mut compressed: &[u8]) -> anyhow::Result<Headers> {
        let mut plain = BytesMut::new();
        let mut buffer = [0; 4096];
        loop {
            let (before_in, before_out) = (self.0.total_in(), self.0.total_out());
            let status = self.0.decompress(compressed, &mut buffer, FlushDecompress::Sync);
            compressed.advance((self.0.total_in() - before_in) as usize);
            let written = (self.0.total_out() - before_out) as usize;
            plain.put_slice(&buffer[..written]);
            if plain.len() > MAX {
                bail!("headers beyond {MAX} bytes");
            }
            match status {
                Ok(Status::Ok | Status::BufError) if written == buffer.len() => {}
                Ok(Status::Ok | Status::BufError) if compressed.is_empty() => break,
                Ok(status) => bail!("a header block goes on behind its end: {status:?}"),
                Err(error) if error.needs_dictionary().is_some() => {
                    self.0.set_dictionary(&DICTIONARY).context("another dictionary than that of SPDY/3")?;
                }
                Err(error) => return Err(error).context("a header block can't be decompressed"),
            }
        }
        let mut plain = plain.freeze();
        let count = plain.try_get_u32().context("a short header block")?;
        (0..count).map(|_| Ok((get_text(&mut plain)?, get_text(&mut plain)?))).collect()
    }
}

fn put_text(out: &mut BytesMut, text: &str) {
    out.put_u32(text.len() as u32);
    out.put_slice(text.as_bytes());
}

fn get_text(from: &mut Bytes) -> anyhow::Result<String> {
    let length = from.try_get_u32().context("a short header block")? as usize;
    if from.len() < length {
        bail!("a short header block");
    }
    Ok(String::from_utf8(from.split_to(length).to_vec())?)
}

/// A connection whose streams the peer opens. It ends with its owner.
pub struct Session {
    opened: mpsc::Receiver<Stream>,
    frames: mpsc::Sender<Frame>,
    tasks: JoinSet<anyhow::Result<()>>,
}

/// A stream that the peer has opened and that has been answered.
pub struct Stream {
    pub headers: Headers,
    /// Data from the peer, until it ends the stream or the connection.
    pub reader: mpsc::Receiver<Bytes>,
    pub writer: Writer,
}

/// The sending half of a stream.
#[derive(Clone)]
pub struct Writer {
    id: u32,
    frames: mpsc::Sender<Frame>,
}

impl Session {
    pub fn new<S: AsyncRead + AsyncWrite + Send + 'static>(socket: S) -> Self {
        let (read, write) = tokio::io::split(socket);
        let (frames, waiting) = mpsc::channel(QUEUE);
        let (open, opened) = mpsc::channel(QUEUE);
        let mut tasks = JoinSet::new();
        tasks.spawn(send(write, waiting));
        tasks.spawn(receive(read, open, frames.clone()));
        Self { opened, frames, tasks }
    }

    /// The next stream; `None` once the connection has ended.
    pub async fn accept(&mut self) -> Option<Stream> {
        self.opened.recv().await
    }

    /// Says that this is the end, and gives the peer a while to close.
    pub async fn close(mut self) {
        let _ = self.frames.send(Frame::GoAway { last: 0, status: 0 }).await;
        let _ = tokio::time::timeout(Duration::from_secs(5), self.tasks.join_next()).await;
    }
}

impl Stream {
    pub fn header(&self, name: &str) -> &str {
        self.headers.iter().find(|(n, _)| n == name).map_or("", |(_, value)| value)
    }
}

impl Writer {
    /// An error is the connection's end.
    pub async fn write(&self, data: Bytes) -> anyhow::Result<()> {
        self.send(Frame::Data { id: self.id, data, fin: false }).await
    }

    pub async fn finish(&self) -> anyhow::Result<()> {
        self.send(Frame::Data { id: self.id, data: Bytes::new(), fin: true }).await
    }

    async fn send(&self, frame: Frame) -> anyhow::Result<()> {
        self.frames.send(frame).await.context("the connection has ended")
    }
}

async fn send(mut socket: impl AsyncWrite + Unpin, mut frames: mpsc::Receiver<Frame>) -> anyhow::Result<()> {
    let (mut encoder, mut bytes) = (Encoder::default(), BytesMut::new());
    while let Some(frame) = frames.recv().await {
        encoder.encode(&frame, &mut bytes);
        socket.write_all_buf(&mut bytes).await?;
        socket.flush().await?;
    }
    Ok(())
}

async fn receive(
    mut socket: impl AsyncRead + Unpin,
    open: mpsc::Sender<Stream>,
    frames: mpsc::Sender<Frame>,
) -> anyhow::Result<()> {
    let (mut decoder, mut bytes) = (Decoder::default(), BytesMut::new());
    let mut streams = HashMap::new();
    loop {
        let Some(frame) = decoder.decode(&mut bytes)? else {
            if socket.read_buf(&mut bytes).await? == 0 {
                return Ok(());
            }
            continue;
        };
        match frame {
            Frame::SynStream { id, headers, fin } => {
                frames.send(Frame::SynReply { id, headers: Headers::new(), fin: false }).await?;
                let (sender, reader) = mpsc::channel(QUEUE);
                if !fin {
                    streams.insert(id, sender);
                }
                open.send(Stream { headers, reader, writer: Writer { id, frames: frames.clone() } }).await?;
            }
            Frame::Data { id, data, fin } => {
                if let Some(stream) = streams.get(&id).filter(|_| !data.is_empty()) {
                    // Data that nobody reads any more is dropped.
                    let _ = stream.send(data).await;
                }
                if fin {
                    streams.remove(&id);
                }
            }
            Frame::Headers { id, fin: true, .. } | Frame::RstStream { id, .. } => drop(streams.remove(&id)),
            // Clients' pings have odd numbers; the rest would be answers to our own.
            Frame::Ping { id } if id % 2 == 1 => frames.send(Frame::Ping { id }).await?,
            Frame::Ping { .. }
            | Frame::Headers { .. }
            | Frame::SynReply { .. }
            | Frame::GoAway { .. }
            | Frame::WindowUpdate { .. }
            | Frame::Settings => {}
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn headers(pairs: &[(&str, &str)]) -> Headers {
        pairs.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned())).collect()
    }

    /// RFC 1950.
    fn adler32(bytes: &[u8]) -> u32 {
        let (mut a, mut b) = (1u32, 0u32);
        for byte in bytes {
            a = (a + u32::from(*byte)) % 65521;
            b = (b + a) % 65521;
        }
        b << 16 | a
    }

    #[test]
    fn the_dictionary_is_that_of_spdy_3() {
        assert_eq!(DICTIONARY.len(), 1423);
        assert_eq!(adler32(&DICTIONARY), 0xe3c6_a7c2);
    }

    #[test]
    fn every_frame_comes_back_however_it_is_cut() {
        let frames = [
            Frame::SynStream { id: 1, headers: headers(&[("streamtype", "stdin")]), fin: false },
            Frame::SynStream { id: 3, headers: headers(&[("streamtype", "stdout"), ("x", "")]), fin: true },
            Frame::SynReply { id: 1, headers: headers(&[]), fin: false },
            // These are longer than a buffer, one compressed and one not.
            Frame::Headers { id: 1, headers: headers(&[("long", &"ab".repeat(10_000))]), fin: true },
            Frame::Headers {
                id: 1,
                headers: headers(&[(
                    "random",
                    &(0..9000u64)
                        .map(|i| char::from(33 + (i.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 58) as u8))
                        .collect::<String>(),
                )]),
                fin: false,
            },
            Frame::Data { id: 5, data: Bytes::from_static(b"bytes"), fin: false },
            Frame::Data { id: 0x7fff_ffff, data: Bytes::new(), fin: true },
            Frame::RstStream { id: 7, status: 5 },
            Frame::Ping { id: 9 },
            Frame::GoAway { last: 7, status: 0 },
            Frame::WindowUpdate { id: 1, delta: 0x7fff_ffff },
            Frame::Settings,
        ];
        let (mut encoder, mut all) = (Encoder::default(), BytesMut::new());
        for frame in &frames {
            encoder.encode(frame, &mut all);
        }
        for piece in [1, 7, 1000, all.len()] {
            let (mut decoder, mut bytes, mut read) = (Decoder::default(), BytesMut::new(), Vec::new());
            for piece in all.chunks(piece) {
                bytes.put_slice(piece);
                while let Some(frame) = decoder.decode(&mut bytes).unwrap() {
                    read.push(frame);
                }
            }
            assert_eq!(read, frames);
            assert!(bytes.is_empty());
        }
    }

    #[test]
    fn frames_that_are_none_are_errors() {
        let decode = |bytes: &[u8]| Decoder::default().decode(&mut BytesMut::from(bytes));
        assert!(decode(&[0x80, 2, 0, 6, 0, 0, 0, 4, 0, 0, 0, 1]).is_err(), "version 2");
        assert!(decode(&[0x80, 3, 0, 5, 0, 0, 0, 0]).is_err(), "type 5");
        assert!(decode(&[0x80, 3, 0, 6, 0, 0, 0, 0]).is_err(), "a ping without its number");
        assert!(decode(&[0, 0, 0, 1, 0, 0xff, 0xff, 0xff]).is_err(), "too long");
        assert!(decode(&[0x80, 3, 0, 2, 0, 0, 0, 8, 0, 0, 0, 1, 1, 2, 3, 4]).is_err(), "no zlib");
        assert!(decode(&[0x80, 3, 0, 6, 0, 0, 0, 4, 0, 0, 0]).unwrap().is_none(), "not all of it yet");
    }

    /// The peer of a session: frames as they are.
    struct Peer {
        socket: tokio::io::DuplexStream,
        encoder: Encoder,
        decoder: Decoder,
        read: BytesMut,
    }

    impl Peer {
        fn new(socket: tokio::io::DuplexStream) -> Self {
            let (encoder, decoder) = (Encoder::default(), Decoder::default());
            Self { socket, encoder, decoder, read: BytesMut::new() }
        }

        async fn send(&mut self, frame: Frame) {
            let mut bytes = BytesMut::new();
            self.encoder.encode(&frame, &mut bytes);
            self.socket.write_all(&bytes).await.unwrap();
        }

        async fn next(&mut self) -> Frame {
            loop {
                if let Some(frame) = self.decoder.decode(&mut self.read).unwrap() {
                    return frame;
                }
                assert_ne!(
                    self.socket.read_buf(&mut self.read).await.unwrap(),
                    0,
                    "the connection has ended"
                );
            }
        }
    }

    #[tokio::test]
    async fn a_session_answers_streams_and_pings_and_ends_each_direction_alone() {
        let (near, far) = tokio::io::duplex(1024);
        let (mut peer, mut session) = (Peer::new(far), Session::new(near));
        peer.send(Frame::SynStream { id: 1, headers: headers(&[("streamtype", "stdin")]), fin: false }).await;
        let mut stream = session.accept().await.unwrap();
        assert_eq!(stream.header("streamtype"), "stdin");
        assert_eq!(peer.next().await, Frame::SynReply { id: 1, headers: Vec::new(), fin: false });
        peer.send(Frame::Ping { id: 1 }).await;
        assert_eq!(peer.next().await, Frame::Ping { id: 1 });
        peer.send(Frame::Data { id: 1, data: Bytes::from_static(b"in"), fin: true }).await;
        assert_eq!(stream.reader.recv().await.unwrap(), &b"in"[..]);
        assert_eq!(stream.reader.recv().await, None);
        stream.writer.write(Bytes::from_static(b"out")).await.unwrap();
        stream.writer.finish().await.unwrap();
        assert_eq!(peer.next().await, Frame::Data { id: 1, data: Bytes::from_static(b"out"), fin: false });
        assert_eq!(peer.next().await, Frame::Data { id: 1, data: Bytes::new(), fin: true });
        let writer = stream.writer.clone();
        let (closed, ()) = tokio::join!(session.close(), async {
            assert_eq!(peer.next().await, Frame::GoAway { last: 0, status: 0 });
            drop(peer);
        });
        let () = closed;
        // The sender's task notices at the latest with what it can't send.
        while writer.write(Bytes::from_static(b"x")).await.is_ok() {
            tokio::task::yield_now().await;
        }
    }
}
