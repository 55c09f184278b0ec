//! Lets HTTP/2 connections of kube-apiserver through to an HTTP/2 server that would refuse them.
//!
//! On a Unix socket, gRPC's Go client sends the socket's path percent-encoded as `:authority` (`%2Frun%2Fegress.sock`).
//! That is not a valid authority (RFC 3986 §3.2), so the server's library answers every request with PROTOCOL_ERROR.
//! [`WithAuthority`] stands between the socket and the server and replaces such a value by a valid one of the **same
//! length**.
//!
//! The length matters because HPACK (RFC 7541) addresses the entries of its dynamic table by their order and evicts them by
//! their size. With a value of the same size, the server's table stays aligned with the client's, and nothing else needs to
//! be decoded or encoded again. This module therefore keeps no table that a small header block could inflate. Nothing
//! depends on the value of an authority, so a Huffman-coded value is always replaced, and only its decoded length is
//! computed. What this module does not understand, or what is larger than a header block of any client, passes through
//! unchanged from then on, and the server judges it.

use std::{
    io,
    pin::Pin,
    task::{Context, Poll, ready},
};

use bytes::{Buf, BufMut, BytesMut};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};

use super::hpack;

/// The largest frame that is inspected; the server must allow no larger ones.
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
/// Bytes that are buffered of one header block, including the headers of its frames.
const MAX_BLOCK: usize = 64 * 1024;
/// Frames that one header block may have.
const MAX_FRAMES: usize = 32;

/// A socket whose reader sees valid `:authority` fields. Payload goes directly from the socket to the reader.
#[derive(Debug)]
pub struct WithAuthority<S> {
    inner: S,
    /// Bytes that pass through before the next frame begins; `None` once everything passes through.
    pass: Option<usize>,
    /// An incomplete frame header or header block.
    held: BytesMut,
    /// What the reader gets next.
    ready: BytesMut,
}

impl<S> WithAuthority<S> {
    pub fn new(inner: S) -> Self {
        Self { inner, pass: Some(PREFACE), held: BytesMut::new(), ready: BytesMut::new() }
    }

    /// The number of leading bytes that pass through as they are.
    fn pass_through(&mut self, bytes: &[u8]) -> usize {
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

    /// Releases what is held and complete. Returns the number of bytes that are needed to go on.
    fn release(&mut self) -> usize {
        loop {
            let pass = self.pass_through_held();
            self.ready.unsplit(self.held.split_to(pass));
            if self.held.is_empty() {
                return 0;
            }
            match inspect(&self.held) {
                Inspected::Incomplete(bytes) => return bytes,
                Inspected::Block { len, replaced: Some(frames) } => {
                    self.held.advance(len);
                    self.ready.extend_from_slice(&frames);
                }
                Inspected::Block { len, replaced: None } => self.ready.unsplit(self.held.split_to(len)),
                Inspected::Unknown => self.pass = None,
            }
        }
    }

    fn pass_through_held(&mut self) -> usize {
        let held = std::mem::take(&mut self.held);
        let pass = self.pass_through(&held);
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
            let wanted = this.release();
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
                let pass = this.pass_through(read);
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
                    // The connection ended within a frame, which the server has to see.
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

/// What the held bytes begin with.
#[derive(Debug, PartialEq, Eq)]
enum Inspected {
    /// At least so many further bytes are needed.
    Incomplete(usize),
    /// A whole header block of `len` bytes, and the frames that replace it, if any.
    Block { len: usize, replaced: Option<Vec<u8>> },
    /// Something that no client sends.
    Unknown,
}

/// Inspects a HEADERS frame and the CONTINUATION frames behind it (RFC 9113 §6.2, §6.10).
fn inspect(bytes: &[u8]) -> Inspected {
    let mut fragments = Vec::new();
    let mut first: Option<(Header, &[u8])> = None;
    let mut at = 0;
    for _ in 0..MAX_FRAMES {
        let rest = bytes.get(at..).unwrap_or_default();
        let Some(header) = Header::parse(rest) else {
            return Inspected::Incomplete(FRAME_HEADER.saturating_sub(rest.len()));
        };
        let fits = header.len <= MAX_FRAME as usize && at + header.frame_len() <= MAX_BLOCK;
        let in_sequence = match &first {
            None => header.kind == HEADERS,
            Some((first, _)) => header.kind == CONTINUATION && header.stream == first.stream,
        };
        if !fits || !in_sequence {
            return Inspected::Unknown;
        }
        let Some(payload) = rest.get(FRAME_HEADER..header.frame_len()) else {
            return Inspected::Incomplete(header.frame_len() - rest.len());
        };
        at += header.frame_len();
        if first.is_none() {
            let Some((priority, fragment)) = headers_payload(header.flags, payload) else {
                return Inspected::Unknown;
            };
            first = Some((header, priority));
            fragments.push(fragment);
        } else {
            fragments.push(payload);
        }
        let (Some((first, priority)), true) = (first, header.flags & END_HEADERS != 0) else { continue };
        let block = match fragments.as_slice() {
            [only] => hpack::replace_authority(only),
            several => hpack::replace_authority(&several.concat()),
        };
        return Inspected::Block { len: at, replaced: block.map(|block| frames(&first, priority, &block)) };
    }
    Inspected::Unknown
}

/// The priority fields of a HEADERS frame, and its part of the header block.
fn headers_payload(flags: u8, mut payload: &[u8]) -> Option<(&[u8], &[u8])> {
    if flags & PADDED != 0 {
        let (padding, rest) = payload.split_first()?;
        payload = rest.get(..rest.len().checked_sub(usize::from(*padding))?)?;
    }
    payload.split_at_checked(if flags & PRIORITY != 0 { PRIORITY_FIELDS } else { 0 })
}

/// Divides a header block into frames without padding.
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

#[cfg(test)]
mod tests;
