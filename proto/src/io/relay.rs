//! Joins a stream of a tunnel with a local socket: both directions at once, each closing on its own.

use std::{
    io,
    pin::Pin,
    sync::atomic::{AtomicU64, Ordering},
    task::{Context, Poll, ready},
    time::Duration,
};

use bytes::BytesMut;
use tokio::io::{AsyncRead, AsyncWrite, AsyncWriteExt};

use super::stream::{Reader, Stream, StreamError, Writer};
use crate::mux::frame::MAX_DATA;

/// Bytes carried so far, by direction as seen from the master: `up` to the target, `down` from it.
#[derive(Debug, Default)]
pub struct Counters {
    pub up: AtomicU64,
    pub down: AtomicU64,
}

/// How a relay ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Outcome {
    /// Both directions ended in order.
    Closed,
    /// The local socket failed, or closed both its directions.
    Socket(io::ErrorKind),
    /// The stream was reset, or its tunnel was lost.
    Stream(StreamError),
    /// One direction had ended and the other stayed silent for too long.
    HalfClosedTimeout,
}

impl Outcome {
    /// A short, fixed word for logs and metric labels.
    pub fn kind(&self) -> &'static str {
        match self {
            Self::Closed => "closed",
            Self::Socket(_) => "socket_error",
            Self::Stream(_) => "stream_reset",
            Self::HalfClosedTimeout => "half_closed_timeout",
        }
    }
}

enum Broken {
    Socket(io::Error),
    Stream(StreamError),
}

impl From<StreamError> for Broken {
    fn from(e: StreamError) -> Self {
        Self::Stream(e)
    }
}

/// Relays until both directions have ended or either failed; the stream is reset unless it closed in order.
/// `from_socket` and `to_socket` count bytes. After one direction has ended, the other may be silent for
/// `half_closed_timeout`.
pub async fn relay<R, W>(
    socket_read: R,
    socket_write: W,
    stream: Stream,
    from_socket: &AtomicU64,
    to_socket: &AtomicU64,
    half_closed_timeout: Duration,
) -> Outcome
where
    R: AsyncRead + Unpin,
    W: AsyncWrite + Unpin,
{
    let Stream { reader, mut writer } = stream;
    let outcome = {
        let outbound = outbound(socket_read, &mut writer, from_socket);
        let inbound = inbound(reader, socket_write, to_socket);
        tokio::pin!(outbound, inbound);
        let first = tokio::select! {
            r = &mut outbound => r.map(|()| true),
            r = &mut inbound => r.map(|()| false),
        };
        match first {
            Err(e) => Err(e),
            Ok(true) => quiet(inbound, to_socket, half_closed_timeout).await,
            Ok(false) => quiet(outbound, from_socket, half_closed_timeout).await,
        }
    };
    let outcome = match outcome {
        Ok(true) => return Outcome::Closed,
        Ok(false) => Outcome::HalfClosedTimeout,
        Err(Broken::Socket(e)) => Outcome::Socket(e.kind()),
        Err(Broken::Stream(e)) => Outcome::Stream(e),
    };
    writer.reset(match &outcome {
        Outcome::Socket(io::ErrorKind::ConnectionReset) => "connection reset by the far socket",
        Outcome::Socket(_) => "the far socket failed",
        Outcome::HalfClosedTimeout => "half-closed and silent for too long",
        Outcome::Closed | Outcome::Stream(_) => "",
    });
    outcome
}

/// Runs the second direction to its end; `false` when it carried nothing for a whole `timeout`.
async fn quiet<F>(mut direction: Pin<&mut F>, carried: &AtomicU64, timeout: Duration) -> Result<bool, Broken>
where
    F: Future<Output = Result<(), Broken>>,
{
    loop {
        let before = carried.load(Ordering::Relaxed);
        match tokio::time::timeout(timeout, direction.as_mut()).await {
            Ok(result) => return result.map(|()| true),
            Err(_) if carried.load(Ordering::Relaxed) == before => return Ok(false),
            Err(_) => {}
        }
    }
}

async fn outbound<R: AsyncRead + Unpin>(
    mut socket: R,
    writer: &mut Writer,
    carried: &AtomicU64,
) -> Result<(), Broken> {
    loop {
        let room = writer.room().await?;
        let frame = std::future::poll_fn(|cx| read_frame(&mut socket, writer, room, cx)).await;
        match frame.map_err(Broken::Socket)? {
            Some((frame, n)) => {
                writer.send(frame).await?;
                carried.fetch_add(n as u64, Ordering::Relaxed);
            }
            None => return Ok(writer.finish().await?),
        }
    }
}

/// Reads into a buffer that exists only while there is something to read, so that an idle stream has none.
fn read_frame<R: AsyncRead + Unpin>(
    socket: &mut R,
    writer: &Writer,
    room: usize,
    cx: &mut Context<'_>,
) -> Poll<io::Result<Option<(BytesMut, usize)>>> {
    let max = room.min(MAX_DATA);
    let mut buffer = writer.buffer(max);
    let n = {
        let mut limited = bytes::BufMut::limit(&mut buffer, max);
        ready!(tokio_util::io::poll_read_buf(Pin::new(socket), cx, &mut limited))?
    };
    Poll::Ready(Ok((n > 0).then_some((buffer, n))))
}

async fn inbound<W: AsyncWrite + Unpin>(
    mut reader: Reader,
    mut socket: W,
    carried: &AtomicU64,
) -> Result<(), Broken> {
    loop {
        let bytes = reader.fill().await?;
        if bytes.is_empty() {
            // A socket that is gone already has nothing left to be told.
            let _ = socket.shutdown().await;
            return Ok(());
        }
        socket.write_all(bytes).await.map_err(Broken::Socket)?;
        socket.flush().await.map_err(Broken::Socket)?;
        carried.fetch_add(bytes.len() as u64, Ordering::Relaxed);
        reader.taken().await?;
    }
}
