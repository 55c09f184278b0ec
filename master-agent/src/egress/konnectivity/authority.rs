//! Lets HTTP/2 connections of kube-apiserver through to an HTTP/2 server that would refuse them.
//!
//! On a Unix socket, gRPC's Go client sends the socket's path percent-encoded as `:authority`
//! (`%2Frun%2Fegress.sock`). That is no authority (RFC 3986 §3.2), so the server's library answers every
//! request with PROTOCOL_ERROR. [`WithAuthority`] stands between the socket and the server and replaces such a
//! value by one that is valid and **just as long**.
//!
//! The length is the point: what HPACK (RFC 7541) keeps of a field in its dynamic table is addressed by order
//! and evicted by size, so with a value of the same size, the server's table stays aligned with the client's and
//! nothing else needs to be decoded or encoded again. So there is no table here, and nothing that a small
//! block could blow up. Nothing goes by what an authority says either, so a Huffman-coded value is replaced whatever it
//! is, and only its decoded length is counted. Whatever is not understood, or is larger than a header block of any client is, passes
//! untouched from then on: the server is the judge of it.

use std::{
    io,
    pin::Pin,
    task::{Context, Poll, ready},
};

use bytes::{Buf, BufMut, BytesMut};
use hyper::http::uri::Authority;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};

/// The largest frame that is looked into; the server must allow no larger ones.
pub(super) const MAX_FRAME: u32 = 16 * 1024;

const PREFACE: usize = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n".len();
/// Length, type, flags, stream (RFC 9113 §4.1).
const FRAME_HEADER: usize = 9;
const HEADERS: u8 = 1;
const CONTINUATION: u8 = 9;
const END_STREAM: u8 = 0x1;
const END_HEADERS: u8 = 0x4;
const PADDED: u8 = 0x8;
const PRIORITY: u8 = 0x20;
const PRIORITY_FIELDS: usize = 5;
/// The most that is held of one header block, its frames' headers included.
const MAX_BLOCK: usize = 64 * 1024;
/// Frames of one header block.
const MAX_FRAMES: usize = 32;
/// The longest encoded value that is looked at. A socket's path has 108 bytes, encoded at most three times that.
const MAX_VALUE: usize = 1024;
/// The index of `:authority` in HPACK's static table (RFC 7541 appendix A).
const AUTHORITY: usize = 1;

/// A socket whose reader sees valid `:authority` fields. Payload goes from the socket to the reader directly.
#[derive(Debug)]
pub(super) struct WithAuthority<S> {
    inner: S,
    /// Bytes that pass before the next frame begins; `None` once everything does.
    pass: Option<usize>,
    /// An incomplete frame header or header block.
    held: BytesMut,
    /// What is to be read next.
    ready: BytesMut,
}

impl<S> WithAuthority<S> {
    pub(super) fn new(inner: S) -> Self {
        Self { inner, pass: Some(PREFACE), held: BytesMut::new(), ready: BytesMut::new() }
    }

    /// The number of bytes at the beginning of what was read that may be given on as they are.
    fn passing(&mut self, bytes: &[u8]) -> usize {
        let mut rest = bytes;
        while let Some(pass) = &mut self.pass {
            let skip = (*pass).min(rest.len());
            rest = rest.get(skip..).unwrap_or_default();
            *pass -= skip;
            match Header::parse(rest) {
                Some(header) if *pass == 0 && header.kind != HEADERS => *pass = header.frame_len(),
                _ => return bytes.len() - rest.len(),
            }
        }
        bytes.len()
    }

    /// Gives on what is held, as far as it is complete. Gives the number of bytes needed to go on.
    fn sort(&mut self) -> usize {
        loop {
            let pass = self.passing_held();
            self.ready.unsplit(self.held.split_to(pass));
            if self.held.is_empty() {
                return 0;
            }
            match look(&self.held) {
                Look::More(bytes) => return bytes,
                Look::Block { len, replaced: Some(frames) } => {
                    self.held.advance(len);
                    self.ready.extend_from_slice(&frames);
                }
                Look::Block { len, replaced: None } => self.ready.unsplit(self.held.split_to(len)),
                Look::Strange => self.pass = None,
            }
        }
    }

    fn passing_held(&mut self) -> usize {
        let held = std::mem::take(&mut self.held);
        let pass = self.passing(&held);
        self.held = held;
        pass
    }
}

impl<S: AsyncRead + Unpin> AsyncRead for WithAuthority<S> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let this = &mut *self;
        if buf.remaining() == 0 {
            return Poll::Ready(Ok(()));
        }
        loop {
            if !this.ready.is_empty() {
                let n = this.ready.len().min(buf.remaining());
                buf.put_slice(&this.ready.split_to(n));
                if this.ready.is_empty() {
                    this.ready = BytesMut::new();
                }
                return Poll::Ready(Ok(()));
            }
            let wanted = this.sort();
            if !this.ready.is_empty() {
                continue;
            }
            if this.held.is_empty() {
                this.held = BytesMut::new();
                let before = buf.filled().len();
                ready!(Pin::new(&mut this.inner).poll_read(cx, buf))?;
                let read = buf.filled().get(before..).unwrap_or_default();
                if read.is_empty() {
                    return Poll::Ready(Ok(()));
                }
                let pass = this.passing(read);
                this.held.extend_from_slice(read.get(pass..).unwrap_or_default());
                buf.set_filled(before + pass);
                if pass > 0 {
                    return Poll::Ready(Ok(()));
                }
            } else {
                this.held.reserve(wanted);
                let mut room = (&mut this.held).limit(wanted);
                let n = ready!(tokio_util::io::poll_read_buf(Pin::new(&mut this.inner), cx, &mut room))?;
                if n == 0 {
                    // The end in the middle of a frame, which the server is to see.
                    this.pass = None;
                }
            }
        }
    }
}

impl<S: AsyncWrite + Unpin> AsyncWrite for WithAuthority<S> {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.inner).poll_write(cx, buf)
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.inner).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.inner).poll_shutdown(cx)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.inner).poll_write_vectored(cx, bufs)
    }

    fn is_write_vectored(&self) -> bool {
        self.inner.is_write_vectored()
    }
}

#[derive(Clone, Copy, Debug)]
struct Header {
    len: usize,
    kind: u8,
    flags: u8,
    stream: u32,
}

impl Header {
    fn parse(bytes: &[u8]) -> Option<Self> {
        let mut bytes = bytes.get(..FRAME_HEADER)?;
        let len = usize::try_from(bytes.get_uint(3)).ok()?;
        Some(Self { len, kind: bytes.get_u8(), flags: bytes.get_u8(), stream: bytes.get_u32() })
    }

    fn frame_len(&self) -> usize {
        FRAME_HEADER + self.len
    }

    fn write(&self, out: &mut Vec<u8>) {
        out.put_uint(self.len as u64, 3);
        out.put_u8(self.kind);
        out.put_u8(self.flags);
        out.put_u32(self.stream);
    }
}

/// What bytes begin with that are not just passed on.
#[derive(Debug, PartialEq, Eq)]
enum Look {
    /// To tell, so many bytes more are needed.
    More(usize),
    /// A whole header block of `len` bytes, and the frames to be read in its place.
    Block { len: usize, replaced: Option<Vec<u8>> },
    /// Nothing that a client sends.
    Strange,
}

/// Looks at a HEADERS frame and the CONTINUATION frames behind it (RFC 9113 §6.2, §6.10).
fn look(bytes: &[u8]) -> Look {
    let mut fragments = Vec::new();
    let mut first: Option<(Header, &[u8])> = None;
    let mut at = 0;
    for _ in 0..MAX_FRAMES {
        let rest = bytes.get(at..).unwrap_or_default();
        let Some(header) = Header::parse(rest) else {
            return Look::More(FRAME_HEADER.saturating_sub(rest.len()));
        };
        let fits = header.len <= MAX_FRAME as usize && at + header.frame_len() <= MAX_BLOCK;
        let in_place = match &first {
            None => header.kind == HEADERS,
            Some((first, _)) => header.kind == CONTINUATION && header.stream == first.stream,
        };
        if !fits || !in_place {
            return Look::Strange;
        }
        let Some(payload) = rest.get(FRAME_HEADER..header.frame_len()) else {
            return Look::More(header.frame_len() - rest.len());
        };
        at += header.frame_len();
        if first.is_none() {
            let Some((priority, fragment)) = headers_payload(header.flags, payload) else {
                return Look::Strange;
            };
            first = Some((header, priority));
            fragments.push(fragment);
        } else {
            fragments.push(payload);
        }
        let (Some((first, priority)), true) = (first, header.flags & END_HEADERS != 0) else { continue };
        let block = match fragments.as_slice() {
            [only] => replace(only),
            several => replace(&several.concat()),
        };
        return Look::Block { len: at, replaced: block.map(|block| frames(&first, priority, &block)) };
    }
    Look::Strange
}

/// The priority fields and the part of the header block in a HEADERS frame.
fn headers_payload(flags: u8, mut payload: &[u8]) -> Option<(&[u8], &[u8])> {
    if flags & PADDED != 0 {
        let (padding, rest) = payload.split_first()?;
        payload = rest.get(..rest.len().checked_sub(usize::from(*padding))?)?;
    }
    payload.split_at_checked(if flags & PRIORITY != 0 { PRIORITY_FIELDS } else { 0 })
}

/// A header block in frames, without padding.
fn frames(first: &Header, priority: &[u8], block: &[u8]) -> Vec<u8> {
    let mut out = Vec::with_capacity(block.len() + 64);
    let room = MAX_FRAME as usize - priority.len();
    let (mut part, mut rest) = block.split_at_checked(room).unwrap_or((block, &[]));
    let (mut kind, mut flags, mut priority) = (HEADERS, first.flags & (END_STREAM | PRIORITY), priority);
    loop {
        if rest.is_empty() {
            flags |= END_HEADERS;
        }
        Header { len: priority.len() + part.len(), kind, flags, stream: first.stream }.write(&mut out);
        out.extend_from_slice(priority);
        out.extend_from_slice(part);
        if rest.is_empty() {
            return out;
        }
        (kind, flags, priority) = (CONTINUATION, 0, &[]);
        (part, rest) = rest.split_at_checked(MAX_FRAME as usize).unwrap_or((rest, &[]));
    }
}

/// The block with a valid `:authority`; `None` if it may stay as it is, or is none.
fn replace(block: &[u8]) -> Option<Vec<u8>> {
    let mut rest = block;
    while let Some(first) = rest.first() {
        // RFC 7541 §6: how many bits of the first byte are an index or a size, and whether a value follows.
        let (bits, literal) = match first {
            0x80.. => (7, false),
            0x40..0x80 => (6, true),
            0x20..0x40 => (5, false),
            0x00..0x20 => (4, true),
        };
        let index = integer(&mut rest, bits)?;
        if !literal {
            continue;
        }
        if index == 0 {
            string(&mut rest)?;
        }
        let before = block.len() - rest.len();
        let value = string(&mut rest)?;
        if index == AUTHORITY {
            let len = refused_len(&value)?;
            let mut out = Vec::with_capacity(block.len() + len);
            out.extend_from_slice(block.get(..before)?);
            put_string(&mut out, len);
            out.extend_from_slice(rest);
            return Some(out);
        }
    }
    None
}

/// The decoded length of a value to be replaced: one that the server would refuse, or may refuse.
fn refused_len(value: &Text<'_>) -> Option<usize> {
    let len = match value {
        Text::Huffman(bytes) | Text::Raw(bytes) if bytes.len() > MAX_VALUE => return None,
        Text::Huffman(bytes) => huffman_len(bytes)?,
        Text::Raw(bytes) if Authority::try_from(*bytes).is_ok() => return None,
        Text::Raw(bytes) => bytes.len(),
    };
    (len > 0).then_some(len)
}

/// The number of bytes that a Huffman-coded string decodes to; `None` for what decoders must refuse. The code is
/// canonical, so how many codes there are of each length says where each of them ends.
fn huffman_len(bytes: &[u8]) -> Option<usize> {
    let bits = bytes.iter().flat_map(|byte| (0..8).rev().map(move |at| u32::from(byte >> at & 1)));
    let mut symbols = 0;
    // The bits since the last symbol, and the first code of that length.
    let (mut code, mut first, mut length) = (0, 0, 0);
    for bit in bits {
        (code, first, length) = (code << 1 | bit, first << 1, length + 1);
        let codes = *HUFFMAN_CODES.get(length)?;
        if code < first + codes {
            symbols += 1;
            (code, first, length) = (0, 0, 0);
        } else {
            first += codes;
        }
    }
    // The rest of the last byte is filled with ones (RFC 7541 §5.2).
    (length < 8 && code + 1 == 1 << length).then_some(symbols)
}

/// How many codes of RFC 7541 appendix B have each length in bits; EOS, the fourth of 30 bits, may not occur.
const HUFFMAN_CODES: [u32; 31] =
    [0, 0, 0, 0, 0, 10, 26, 32, 6, 0, 5, 3, 2, 6, 2, 3, 0, 0, 0, 3, 8, 13, 26, 29, 12, 4, 15, 19, 29, 0, 3];

/// A string literal (RFC 7541 §5.2) of so many bytes that are a host's name.
fn put_string(out: &mut Vec<u8>, len: usize) {
    let mut left = len;
    if left < 127 {
        out.put_u8(left as u8);
    } else {
        out.put_u8(127);
        left -= 127;
        while left >= 128 {
            out.put_u8((left % 128) as u8 | 128);
            left /= 128;
        }
        out.put_u8(left as u8);
    }
    out.extend(b"localhost".iter().cycle().take(len));
}

enum Text<'a> {
    Huffman(&'a [u8]),
    Raw(&'a [u8]),
}

fn string<'a>(bytes: &mut &'a [u8]) -> Option<Text<'a>> {
    let huffman = bytes.first()? & 0x80 != 0;
    let len = integer(bytes, 7)?;
    let (text, rest) = bytes.split_at_checked(len)?;
    *bytes = rest;
    Some(if huffman { Text::Huffman(text) } else { Text::Raw(text) })
}

/// An integer in the last `bits` bits of a byte and those that follow (RFC 7541 §5.1).
fn integer(bytes: &mut &[u8], bits: u32) -> Option<usize> {
    let mut next = || {
        let (first, rest) = bytes.split_first()?;
        *bytes = rest;
        Some(usize::from(*first))
    };
    let mask = (1 << bits) - 1;
    let mut value = next()? & mask;
    if value < mask {
        return Some(value);
    }
    for shift in [0, 7, 14, 21] {
        let byte = next()?;
        value += (byte & 127) << shift;
        if byte < 128 {
            return Some(value);
        }
    }
    None
}

#[cfg(test)]
mod tests {
    use loona_hpack::huffman::HuffmanDecoder;
    use rand::{Rng, RngExt, SeedableRng, rngs::StdRng};
    use tokio::io::{AsyncReadExt, AsyncWriteExt};

    use super::*;

    const PREFACE_BYTES: &[u8] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";
    const BAD: &[u8] = b"%2Frun%2Fegress.sock";
    const GOOD: &[u8] = b"localhostlocalhostlo";

    fn capture(name: &str) -> Vec<u8> {
        std::fs::read(format!("{}/../tests/data/captures/{name}", env!("CARGO_MANIFEST_DIR"))).unwrap()
    }

    fn frame(kind: u8, flags: u8, stream: u32, payload: &[u8]) -> Vec<u8> {
        let mut out = Vec::new();
        Header { len: payload.len(), kind, flags, stream }.write(&mut out);
        out.extend_from_slice(payload);
        out
    }

    /// `:method: POST`, `:authority` with incremental indexing, `:path: /`.
    fn block(authority: &[u8]) -> Vec<u8> {
        let mut out = vec![0x83, 0x41, authority.len() as u8];
        out.extend_from_slice(authority);
        out.push(0x84);
        out
    }

    /// What a reader gets, when both sides use pieces of these sizes.
    async fn through(bytes: &[u8], written: usize, read: usize) -> Vec<u8> {
        let (mut client, server) = tokio::io::duplex(written);
        let mut server = WithAuthority::new(server);
        let send = async move {
            for piece in bytes.chunks(written) {
                client.write_all(piece).await.unwrap();
            }
        };
        let receive = async {
            let (mut all, mut buffer) = (Vec::new(), vec![0; read]);
            loop {
                match server.read(&mut buffer).await.unwrap() {
                    0 => return all,
                    n => all.extend_from_slice(&buffer[..n]),
                }
            }
        };
        tokio::join!(send, receive).1
    }

    async fn assert_becomes(frames: &[u8], expected: &[u8]) {
        let (bytes, expected) = ([PREFACE_BYTES, frames].concat(), [PREFACE_BYTES, expected].concat());
        for (written, read) in [(1, 1), (1, 4096), (7, 5), (9, 4096), (100_000, 1), (100_000, 100_000)] {
            let got = through(&bytes, written, read).await;
            assert_eq!(got.len(), expected.len(), "written by {written}, read by {read}");
            assert!(got == expected, "written by {written}, read by {read}");
        }
    }

    #[tokio::test]
    async fn the_recorded_bytes_of_kube_apiserver_get_a_valid_authority() {
        for name in ["grpc-uds-1.client.bin", "grpc-uds-2.client.bin"] {
            let bytes = capture(name);
            let rewritten = through(&bytes, 1000, 1000).await;
            let at = PREFACE + 9 + 9;
            let Look::Block { len, replaced: Some(frames) } = look(&bytes[at..]) else { panic!("{name}") };
            assert_eq!(rewritten, [&bytes[..at], &frames, &bytes[at + len..]].concat());
            let decode = |frame: &[u8]| loona_hpack::Decoder::new().decode(&frame[9..]).unwrap();
            let (before, after) = (decode(&bytes[at..at + len]), decode(&frames));
            let mut changed = before.iter().zip(&after).filter(|(before, after)| before != after);
            let ((name, was), (_, is)) = changed.next().unwrap();
            assert_eq!((name.as_slice(), changed.next()), (b":authority".as_slice(), None));
            assert!(Authority::try_from(was.as_slice()).is_err());
            assert!(Authority::try_from(is.as_slice()).is_ok());
            assert_eq!(was.len(), is.len());
        }
    }

    #[tokio::test]
    async fn padding_priority_and_continuations_are_understood() {
        let (bad, good) = (block(BAD), block(GOOD));
        let priority = [0, 0, 0, 0, 16];
        let data = frame(0, 0, 1, &[7; 5000]);
        let whole = frame(HEADERS, END_HEADERS, 1, &good);
        let padded = [&[3], bad.as_slice(), &[0; 3]].concat();
        let with_priority = [&priority, bad.as_slice()].concat();
        let with_both = [&[2], priority.as_slice(), &bad, &[0; 2]].concat();
        let good_with_priority =
            frame(HEADERS, END_HEADERS | PRIORITY, 1, &[&priority, good.as_slice()].concat());
        let split = |at: usize| {
            let (a, b) = bad.split_at(at);
            [frame(HEADERS, 0, 1, a), frame(CONTINUATION, 0, 1, &[]), frame(CONTINUATION, END_HEADERS, 1, b)]
                .concat()
        };
        for (from, to) in [
            (frame(HEADERS, END_HEADERS, 1, &bad), &whole),
            (frame(HEADERS, END_HEADERS | PADDED, 1, &padded), &whole),
            (frame(HEADERS, END_HEADERS | PRIORITY, 1, &with_priority), &good_with_priority),
            (frame(HEADERS, END_HEADERS | PRIORITY | PADDED, 1, &with_both), &good_with_priority),
            (split(0), &whole),
            (split(10), &whole),
            (split(bad.len()), &whole),
        ] {
            let from = [from, data.clone(), frame(HEADERS, END_HEADERS | END_STREAM, 3, &bad)].concat();
            let to = [to.clone(), data.clone(), frame(HEADERS, END_HEADERS | END_STREAM, 3, &good)].concat();
            assert_becomes(&from, &to).await;
        }
    }

    #[tokio::test]
    async fn what_needs_no_change_gets_none() {
        let bad = block(BAD);
        let far = [vec![0x00, 0x7f, 0xff, 0xff, 0x03], bad.clone()].concat();
        for from in [
            frame(HEADERS, END_HEADERS, 1, &block(b"localhost:8132")),
            frame(HEADERS, END_HEADERS | PADDED, 1, &[&[3], block(b"[::1]:1").as_slice(), &[0; 3]].concat()),
            frame(HEADERS, END_HEADERS, 1, &[0x82, 0x84, 0x86]),
            frame(HEADERS, END_HEADERS, 1, &block(b"")),
            // Not HPACK, padding beyond the frame, no room for the priority.
            frame(HEADERS, END_HEADERS, 1, &far),
            frame(HEADERS, END_HEADERS, 1, &[0x41, 0x90, 0x00]),
            frame(HEADERS, END_HEADERS | PADDED, 1, &[200, 0x84]),
            frame(HEADERS, END_HEADERS | PADDED, 1, &[]),
            frame(HEADERS, END_HEADERS | PRIORITY, 1, &[0; 4]),
            // A block that another frame breaks into, that belongs to two streams, that never ends.
            [frame(HEADERS, 0, 1, &bad), frame(0, 0, 1, b"x"), frame(CONTINUATION, END_HEADERS, 1, &[])]
                .concat(),
            [frame(HEADERS, 0, 1, &bad), frame(CONTINUATION, END_HEADERS, 3, &[])].concat(),
            [frame(HEADERS, 0, 1, &bad), frame(CONTINUATION, 0, 1, &[0; 10_000]).repeat(20)].concat(),
            [frame(HEADERS, 0, 1, &bad), frame(CONTINUATION, 0, 1, &[]).repeat(1000)].concat(),
            frame(CONTINUATION, END_HEADERS, 1, &bad),
            // Larger than the server allows; cut off.
            frame(HEADERS, END_HEADERS, 1, &[bad.as_slice(), &[0x84; 20_000]].concat()),
            frame(HEADERS, END_HEADERS, 1, &bad)[..20].to_vec(),
            frame(HEADERS, END_HEADERS, 1, &bad)[..4].to_vec(),
            b"GET / HTTP/1.1\r\n\r\n".to_vec(),
            Vec::new(),
        ] {
            assert_becomes(&from, &from).await;
        }
    }

    #[test]
    fn a_block_that_grows_is_put_in_as_many_frames_as_it_needs() {
        // 1,000 times `%` as Huffman code (6 bits, 010101) is 750 bytes.
        let coded: Vec<u8> = [0b0101_0101, 0b0101_0101, 0b0101_0101].repeat(250);
        let mut long = vec![0x41, 0xff, ((750 - 127) as u8 % 128) | 128, ((750 - 127) / 128) as u8];
        long.extend_from_slice(&coded);
        long.resize(MAX_FRAME as usize, 0x84);
        let Look::Block { len, replaced: Some(frames) } = look(&frame(HEADERS, END_HEADERS, 5, &long)) else {
            panic!("not replaced")
        };
        assert_eq!(len, FRAME_HEADER + long.len());
        let first = Header::parse(&frames).unwrap();
        let second = Header::parse(&frames[first.frame_len()..]).unwrap();
        assert_eq!((first.len, first.kind, first.flags), (MAX_FRAME as usize, HEADERS, 0));
        assert_eq!((second.kind, second.flags, second.stream), (CONTINUATION, END_HEADERS, 5));
        assert_eq!(frames.len(), first.frame_len() + second.frame_len());
        let block = [&frames[9..first.frame_len()], &frames[first.frame_len() + 9..]].concat();
        let fields = loona_hpack::Decoder::new().decode(&block).unwrap();
        assert_eq!(fields[0].1.len(), 1000);
        assert!(Authority::try_from(fields[0].1.as_slice()).is_ok());
    }

    /// Strings that decode and strings that do not, as another implementation has them.
    #[test]
    fn huffman_coded_strings_have_the_length_that_a_decoder_gives_them() {
        let mut random = StdRng::seed_from_u64(7541);
        let mut decoder = HuffmanDecoder::new();
        let mut decoded = |bytes: &[u8]| decoder.decode(bytes).ok().map(|text| text.len());
        let (mut good, mut bad) = (0, 0);
        for round in 0..4000 {
            let mut bytes = vec![0; round % 40];
            random.fill_bytes(&mut bytes);
            if round % 3 == 0 {
                // Long codes begin with ones.
                bytes.iter_mut().for_each(|byte| *byte |= 0xfc);
            }
            let expected = decoded(&bytes);
            assert_eq!(huffman_len(&bytes), expected, "{bytes:x?}");
            *(if expected.is_some() { &mut good } else { &mut bad }) += 1;
        }
        assert!(good > 300 && bad > 300, "{good} {bad}");
        for byte in 0..=u8::MAX {
            for next in 0..=u8::MAX {
                assert_eq!(huffman_len(&[byte, next]), decoded(&[byte, next]), "{byte:x} {next:x}");
            }
        }
        // Nothing, padding alone, padding of a byte, padding of zeros, EOS, EOS behind a symbol.
        for (bytes, expected) in [
            (&[][..], Some(0)),
            (&[0xff], None),
            (&[0x07], Some(1)),
            (&[0x00], None),
            (&[0x07, 0xff], None),
            (&[0xff, 0xff, 0xff, 0xff], None),
            (&[0x07, 0xff, 0xff, 0xff, 0xff], None),
        ] {
            assert_eq!(huffman_len(bytes), expected, "{bytes:x?}");
        }
    }

    /// A client that refers to its dynamic table meets the same entries behind the shim, evictions included.
    #[test]
    fn the_dynamic_tables_stay_aligned() {
        let (mut client, mut server) = (loona_hpack::Decoder::new(), loona_hpack::Decoder::new());
        let mut random = StdRng::seed_from_u64(1);
        for round in 0..500 {
            let mut fields = vec![0x83, 0x41];
            let authority = format!("%2F{}", "x".repeat(random.random_range(0..300)));
            put_len(&mut fields, authority.len());
            fields.extend_from_slice(authority.as_bytes());
            // A new entry, and the last few.
            fields.extend_from_slice(&[0x40, 1, b'k', 2]);
            fields.extend_from_slice(format!("{:02}", round % 100).as_bytes());
            fields.extend_from_slice(&[0x80 | 62, 0x80 | 63, 0x80 | (62 + round.min(9) as u8)]);
            let replaced = replace(&fields).unwrap();
            let (sent, seen) = (client.decode(&fields).unwrap(), server.decode(&replaced).unwrap());
            assert_eq!(sent.len(), seen.len());
            for ((name, sent), (same, seen)) in sent.iter().zip(&seen) {
                assert_eq!(name, same);
                if name == b":authority" {
                    assert!(seen.len() == sent.len() && Authority::try_from(seen.as_slice()).is_ok());
                } else {
                    assert_eq!(sent, seen);
                }
            }
        }
    }

    fn put_len(out: &mut Vec<u8>, len: usize) {
        if len < 127 {
            out.push(len as u8);
        } else {
            out.extend_from_slice(&[127, ((len - 127) as u8 % 128) | 128, ((len - 127) / 128) as u8]);
        }
    }

    /// Whatever comes, nothing panics, all is read, and what the shim is not about is unchanged.
    #[tokio::test]
    async fn rubbish_passes() {
        let mut random = StdRng::seed_from_u64(2026);
        let recorded = capture("grpc-uds-1.client.bin");
        for _ in 0..3000 {
            let mut bytes = recorded.clone();
            for _ in 0..random.random_range(1..8) {
                let at = random.random_range(PREFACE..bytes.len());
                bytes[at] = random.random();
            }
            if random.random_bool(0.3) {
                bytes.truncate(random.random_range(0..bytes.len()));
            }
            if random.random_bool(0.3) {
                let mut tail = vec![0; random.random_range(0..3000)];
                random.fill_bytes(&mut tail);
                bytes.extend_from_slice(&tail);
            }
            let (written, read) = (random.random_range(1..2000), random.random_range(1..2000));
            let got = through(&bytes, written, read).await;
            let same = through(&bytes, 100_000, 100_000).await;
            assert!(got == same, "depends on the pieces");
            let grown = got.len() as i64 - bytes.len() as i64;
            assert!((-600..600).contains(&grown), "{grown}");
        }
        for _ in 0..20_000 {
            let mut block = vec![0; random.random_range(0..200)];
            random.fill_bytes(&mut block);
            let _ = replace(&block);
            block[..].iter_mut().step_by(3).for_each(|b| *b &= 0x4f);
            let _ = look(&frame(HEADERS, random.random(), 1, &block));
        }
    }
}
