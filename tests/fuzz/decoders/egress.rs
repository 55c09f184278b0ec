//! The egress listeners: the frames of HTTP/2 in which an invalid `:authority` is replaced, and the login of SOCKS5.

use std::{
    io,
    pin::Pin,
    task::{Context, Poll},
};

use futures_util::FutureExt;
use hyper::http::uri::Authority;
use loona_hpack::huffman::HuffmanDecoder;
use master_agent::egress::{konnectivity::authority::WithAuthority, socks5::login::Login};
use tokio::io::{AsyncRead, AsyncReadExt, ReadBuf};

const PREFACE: &[u8] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";
const HEADERS: u8 = 1;
const CONTINUATION: u8 = 9;
const END_STREAM: u8 = 0x1;
const END_HEADERS: u8 = 0x4;
const PADDED: u8 = 0x8;
const PRIORITY: u8 = 0x20;
/// The largest frame that a server must take (RFC 9113 §4.2).
const MAX_FRAME: usize = 16 * 1024;

/// The frames of an HTTP/2 client. In whatever pieces they arrive, the server sees the same frames but for header blocks,
/// and such a block is the same but for one `:authority`.
pub fn authority(bytes: &[u8]) {
    let sent = [PREFACE, bytes].concat();
    let seen = through(&sent, sent.len(), sent.len());
    for (written, read) in [(1, 4096), (7, 5)] {
        assert!(through(&sent, written, read) == seen, "the frames depend on the pieces");
    }
    let (mut sent, mut seen) = (bytes, seen.strip_prefix(PREFACE).expect("the preface passes"));
    while let Some(was) = Message::read(sent) {
        let is = Message::read(seen).expect("as many frames come out as went in");
        if sent[..was.len()] != seen[..is.len()] {
            was.assert_replaced_by(&is);
        }
        (sent, seen) = (&sent[was.len()..], &seen[is.len()..]);
    }
    assert!(sent == seen, "what is no whole frame passes");
}

/// What the server reads, at most `read` bytes at once, if at most `written` bytes arrive at once.
fn through(bytes: &[u8], written: usize, read: usize) -> Vec<u8> {
    let mut socket = WithAuthority::new(Pieces { rest: bytes, size: written });
    let (mut seen, mut buffer) = (Vec::new(), vec![0; read]);
    loop {
        match socket.read(&mut buffer).now_or_never() {
            Some(Ok(0)) => return seen,
            Some(Ok(n)) => seen.extend_from_slice(&buffer[..n]),
            failed => panic!("{failed:?}"),
        }
    }
}

/// Bytes that arrive at once, a few at a time.
struct Pieces<'a> {
    rest: &'a [u8],
    size: usize,
}

impl AsyncRead for Pieces<'_> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        _: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let all = self.rest;
        let (piece, rest) = all.split_at(self.size.min(all.len()).min(buf.remaining()));
        buf.put_slice(piece);
        self.rest = rest;
        Poll::Ready(Ok(()))
    }
}

struct Frame<'a> {
    kind: u8,
    flags: u8,
    stream: [u8; 4],
    payload: &'a [u8],
}

impl<'a> Frame<'a> {
    fn read(bytes: &'a [u8]) -> Option<Self> {
        let [a, b, c, kind, flags, s0, s1, s2, s3, rest @ ..] = bytes else { return None };
        let len = u32::from_be_bytes([0, *a, *b, *c]) as usize;
        let payload = rest.get(..len)?;
        Some(Self { kind: *kind, flags: *flags, stream: [*s0, *s1, *s2, *s3], payload })
    }

    fn len(&self) -> usize {
        9 + self.payload.len()
    }

    /// The priority fields and the fragment of a header block in a HEADERS frame.
    fn fragment(&self) -> Option<(&'a [u8], &'a [u8])> {
        let mut payload = self.payload;
        if self.flags & PADDED != 0 {
            let (padding, rest) = payload.split_first()?;
            payload = rest.get(..rest.len().checked_sub(usize::from(*padding))?)?;
        }
        payload.split_at_checked(if self.flags & PRIORITY == 0 { 0 } else { 5 })
    }
}

/// A frame, or the frames of one header block.
struct Message<'a>(Vec<Frame<'a>>);

impl<'a> Message<'a> {
    fn read(bytes: &'a [u8]) -> Option<Self> {
        let first = Frame::read(bytes)?;
        let (kind, stream) = (first.kind, first.stream);
        let (mut at, mut ended) = (first.len(), first.flags & END_HEADERS != 0);
        let mut frames = vec![first];
        while kind == HEADERS && !ended {
            let next = Frame::read(&bytes[at..])?;
            if (next.kind, next.stream) != (CONTINUATION, stream) {
                return None;
            }
            (at, ended) = (at + next.len(), next.flags & END_HEADERS != 0);
            frames.push(next);
        }
        Some(Self(frames))
    }

    fn len(&self) -> usize {
        self.0.iter().map(Frame::len).sum()
    }

    /// The priority fields and the whole header block.
    fn block(&self) -> Option<(&'a [u8], Vec<u8>)> {
        let (first, others) = self.0.split_first()?;
        let (priority, fragment) = first.fragment()?;
        let others = others.iter().flat_map(|frame| frame.payload);
        Some((priority, fragment.iter().chain(others).copied().collect()))
    }

    fn assert_replaced_by(&self, seen: &Message<'_>) {
        let (was, is) = (&self.0[0], &seen.0[0]);
        assert_eq!((was.kind, is.kind, was.stream), (HEADERS, HEADERS, is.stream));
        let kept = END_STREAM | PRIORITY;
        assert_eq!(is.flags & !END_HEADERS, was.flags & kept, "other flags than before, or padding");
        assert!(seen.0.iter().all(|frame| frame.payload.len() <= MAX_FRAME));
        let (old_priority, old) = self.block().expect("only a whole block is replaced");
        let (priority, new) = seen.block().expect("a replaced block is whole");
        assert_eq!(priority, old_priority);

        let at = authority_at(&old).expect("only a block with an authority is replaced");
        let (mut old_rest, mut new_rest) = (&old[at..], &new[at..]);
        assert_eq!(old[..at], new[..at]);
        let (old_coded, old_value) = string(&mut old_rest).expect("the old value is whole");
        let (coded, value) = string(&mut new_rest).expect("the new value is whole");
        assert!(old_rest == new_rest && !coded && Authority::try_from(value).is_ok());
        if old_coded {
            let decoded = HuffmanDecoder::new().decode(old_value).expect("only what decodes is replaced");
            assert_eq!(value.len(), decoded.len(), "the dynamic tables differ from here on");
        } else {
            assert_eq!(value.len(), old_value.len(), "the dynamic tables differ from here on");
            assert!(Authority::try_from(old_value).is_err(), "a valid value was replaced");
        }
    }
}

/// Where the value of the first literal `:authority` of a header block begins (RFC 7541 §6).
fn authority_at(block: &[u8]) -> Option<usize> {
    let mut rest = block;
    loop {
        let (bits, literal) = match rest.first()?.leading_zeros() {
            0 => (7, false),
            1 => (6, true),
            2 => (5, false),
            _ => (4, true),
        };
        let index = integer(&mut rest, bits)?;
        if !literal {
            continue;
        }
        if index == 0 {
            string(&mut rest)?;
        }
        if index == 1 {
            return Some(block.len() - rest.len());
        }
        string(&mut rest)?;
    }
}

/// A string literal (RFC 7541 §5.2), and whether it is Huffman-coded.
fn string<'a>(bytes: &mut &'a [u8]) -> Option<(bool, &'a [u8])> {
    let coded = bytes.first()? & 0x80 != 0;
    let len = integer(bytes, 7)?;
    let (text, rest) = bytes.split_at_checked(len)?;
    *bytes = rest;
    Some((coded, text))
}

/// An integer in the last `bits` bits of a byte and those that follow (RFC 7541 §5.1).
fn integer(bytes: &mut &[u8], bits: u32) -> Option<usize> {
    let (first, mut rest) = bytes.split_first()?;
    let most = (1 << bits) - 1;
    let mut value = usize::from(*first) & most;
    if value == most {
        let end = rest.iter().position(|byte| *byte < 0x80)?;
        for (at, byte) in rest[..=end].iter().enumerate() {
            let part = usize::from(byte & 0x7f).checked_shl(7 * u32::try_from(at).ok()?)?;
            value = value.checked_add(part)?;
        }
        rest = &rest[end + 1..];
    }
    *bytes = rest;
    Some(value)
}

/// A login of RFC 1929 has one encoding, and nothing behind it is read.
pub fn socks5_login(bytes: &[u8]) {
    let mut rest = bytes;
    let read = Login::read(&mut rest).now_or_never().expect("all bytes have arrived");
    match read {
        Ok(Some(Login { name, password })) => {
            let mut again = vec![1];
            for text in [&name, &*password] {
                again.push(u8::try_from(text.len()).expect("a length of one byte"));
                again.extend_from_slice(text);
            }
            assert_eq!([&again[..], rest].concat(), bytes);
        }
        Ok(None) => assert_ne!(bytes[0], 1),
        Err(error) => {
            assert_eq!(error.kind(), io::ErrorKind::UnexpectedEof);
            assert!(rest.is_empty() && bytes.len() < 3 + 2 * 255);
        }
    }
}
