//! A stream as the [`relay`](super::relay) sees it, whether the multiplexer, an SSH channel or a TCP socket carries it.

use std::time::Duration;

use bytes::BytesMut;
use tokio::{
    io::AsyncWriteExt,
    net::{
        TcpStream,
        tcp::{OwnedReadHalf, OwnedWriteHalf},
    },
};

use super::{
    channel::{self, Channels, WriteHalf},
    mux::{self, Incoming, Mux},
};
use proto::{DialError, Target};

pub(super) mod error;

pub use error::StreamError;

/// How many bytes are read at once from a socket without a tunnel.
const READ: usize = 16 * 1024;

/// A proxied connection.
#[derive(Debug)]
pub struct Stream {
    pub reader: Reader,
    pub writer: Writer,
}

/// What comes from the peer.
#[derive(Debug)]
pub enum Reader {
    Mux(mux::Reader),
    Channel(channel::Reader),
    Tcp(OwnedReadHalf, BytesMut),
}

/// What goes to the peer. Dropping it before [`Writer::finish`] resets the stream.
#[derive(Debug)]
pub enum Writer {
    Mux(mux::Writer),
    Channel(channel::Writer),
    Tcp(OwnedWriteHalf),
}

/// Tells when a stream has failed, even while its socket keeps both directions waiting.
pub enum Watch {
    Mux(mux::Watch),
    Channel(channel::Watch),
    Tcp,
}

impl Watch {
    /// Completes once the stream was reset or its tunnel was lost.
    pub async fn failed(&self) {
        match self {
            Self::Mux(watch) => watch.failed().await,
            Self::Channel(watch) => watch.failed().await,
            Self::Tcp => std::future::pending().await,
        }
    }
}

impl Stream {
    pub fn watch(&self) -> Watch {
        match &self.reader {
            Reader::Mux(r) => Watch::Mux(r.watch()),
            Reader::Channel(r) => Watch::Channel(r.watch()),
            Reader::Tcp(..) => Watch::Tcp,
        }
    }
}

impl Mux {
    /// Opens a stream to `target`. `origin` names the caller in the node's records. Dropping the future also cancels the
    /// dial on the node.
    pub async fn open(&self, target: &Target, origin: &str, timeout: Duration) -> Result<Stream, DialError> {
        self.open_halves(target, origin, timeout).await.map(Stream::from)
    }
}

impl Incoming {
    /// Accepts the stream; `None` if the tunnel was lost in the meantime.
    pub async fn accept(self) -> Option<Stream> {
        self.accept_halves().await.map(Stream::from)
    }
}

impl Channels {
    /// Turns an open channel into a stream.
    pub fn stream(&self, half: WriteHalf) -> Stream {
        Stream::from(self.halves(half))
    }
}

impl From<(mux::Reader, mux::Writer)> for Stream {
    fn from((reader, writer): (mux::Reader, mux::Writer)) -> Self {
        Self { reader: Reader::Mux(reader), writer: Writer::Mux(writer) }
    }
}

impl From<(channel::Reader, channel::Writer)> for Stream {
    fn from((reader, writer): (channel::Reader, channel::Writer)) -> Self {
        Self { reader: Reader::Channel(reader), writer: Writer::Channel(writer) }
    }
}

/// A connection without a tunnel, as a dialer that connects by itself returns it.
impl From<TcpStream> for Stream {
    fn from(socket: TcpStream) -> Self {
        let (reader, writer) = socket.into_split();
        Self { reader: Reader::Tcp(reader, BytesMut::new()), writer: Writer::Tcp(writer) }
    }
}

impl Reader {
    /// Waits for bytes; an empty slice is the end of this direction. The bytes stay with the reader until the next call.
    /// Cancel-safe.
    pub async fn fill(&mut self) -> Result<&[u8], StreamError> {
        match self {
            Self::Mux(r) => r.fill().await,
            Self::Channel(r) => r.fill().await,
            Self::Tcp(socket, buffer) => {
                buffer.clear();
                socket.readable().await?;
                // Without room of its own, a buffer grows by 64 bytes at a time.
                buffer.reserve(READ);
                std::future::poll_fn(|cx| {
                    tokio_util::io::poll_read_buf(std::pin::Pin::new(&mut *socket), cx, buffer)
                })
                .await?;
                Ok(buffer)
            }
        }
    }

    /// Says that the bytes of the last [`fill`](Self::fill) have been delivered, so that the peer may send as many again.
    pub async fn taken(&mut self) -> Result<(), StreamError> {
        match self {
            Self::Mux(r) => r.taken().await,
            Self::Channel(_) | Self::Tcp(..) => Ok(()),
        }
    }
}

impl Writer {
    /// Waits until at least one byte may be sent, and returns the number of bytes that may.
    pub async fn room(&mut self) -> Result<usize, StreamError> {
        match self {
            Self::Mux(w) => w.room().await,
            Self::Channel(w) => w.room(),
            Self::Tcp(_) => Ok(proto::mux::frame::MAX_DATA),
        }
    }

    /// A buffer for [`Self::send`]. Up to `max` bytes may be appended to what it already holds.
    pub fn buffer(&self, max: usize) -> BytesMut {
        match self {
            Self::Mux(w) => w.buffer(max),
            Self::Channel(_) | Self::Tcp(_) => BytesMut::with_capacity(max),
        }
    }

    /// Sends a [`Self::buffer`] with at most as many bytes as [`Self::room`] allowed.
    pub async fn send(&mut self, buffer: BytesMut) -> Result<(), StreamError> {
        match self {
            Self::Mux(w) => w.send(buffer).await,
            // Boxed, so that the streams of a multiplexer do not keep room for it.
            Self::Channel(w) => Box::pin(w.send(buffer)).await,
            Self::Tcp(socket) => Ok(socket.write_all(&buffer).await?),
        }
    }

    /// Ends this direction; the other one goes on.
    pub async fn finish(&mut self) -> Result<(), StreamError> {
        match self {
            Self::Mux(w) => w.finish().await,
            Self::Channel(w) => Box::pin(w.finish()).await,
            Self::Tcp(socket) => Ok(socket.shutdown().await?),
        }
    }

    /// Ends both directions, and tells the peer why if the protocol can.
    pub fn reset(&mut self, reason: &str) {
        match self {
            Self::Mux(w) => w.reset(reason),
            Self::Channel(w) => w.reset(),
            // Dropping both halves closes the socket.
            Self::Tcp(_) => {}
        }
    }
}
