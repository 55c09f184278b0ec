//! Relays between a stream and a local socket, or between two sockets: both directions at once, each closing on its own.

use std::{
    future::poll_fn,
    io,
    pin::Pin,
    sync::atomic::{AtomicU64, Ordering},
    task::{Context, Poll, ready},
    time::{Duration, Instant},
};

use bytes::BytesMut;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};

use super::{
    burst::Burst,
    stream::{Reader, Stream, StreamError, Watch, Writer},
};
use proto::mux::frame::MAX_DATA;

/// A read of fewer bytes counts as small.
const SMALL: usize = 2 * 1024;
/// The least size of the buffer for a read. It grows for sockets that fill it.
const LEAST_READ: usize = 4 * 1024;
/// The number of small reads in a row that make a flood: each comes within [`AT_ONCE`] of the one before, and none is
/// answered.
const FLOOD: u32 = 32;
const AT_ONCE: Duration = Duration::from_micros(500);
/// How long the bytes of a flood are gathered before the next read.
const GATHER: Duration = Duration::from_millis(5);
/// How long a socket whose stream has failed may take nothing of what arrived before, until it is given up.
const LAST_BYTES: Duration = Duration::from_secs(2);
/// The size of the buffer between two sockets in each direction.
const BUFFER: usize = 16 * 1024;

/// Bytes carried so far, by direction as seen from the master: `up` to the target, `down` from it.
#[derive(Debug, Default)]
pub struct Counters {
    pub up: AtomicU64,
    pub down: AtomicU64,
}

/// How a relay ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Outcome {
    /// Both directions ended regularly.
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

/// Relays until both directions have ended or one has failed, and resets the stream unless both ended regularly.
/// `from_socket` and `to_socket` count bytes. After one direction has ended, the other may be silent for
/// `half_closed_timeout`.
///
/// A node has one of these futures for each of its streams, most of which are idle. So it holds everything once, and what is
/// needed only at the end of a stream is boxed.
pub fn relay<'a, R, W>(
    mut socket_read: R,
    mut socket_write: W,
    stream: Stream,
    from_socket: &'a AtomicU64,
    to_socket: &'a AtomicU64,
    half_closed_timeout: Duration,
) -> impl Future<Output = Outcome> + use<'a, R, W>
where
    R: AsyncRead + Unpin,
    W: AsyncWrite + Unpin,
{
    let watch = stream.watch();
    let Stream { mut reader, mut writer } = stream;
    async move {
        let outcome = carry(
            (&mut socket_read, &mut writer, from_socket),
            (&mut reader, &mut socket_write, to_socket),
            watch,
            half_closed_timeout,
        );
        let outcome = match outcome.await {
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
}

/// Carries both directions until both have ended or one has failed; `false` if one was silent for too long.
async fn carry<R, W>(
    (socket_read, writer, from_socket): (&mut R, &mut Writer, &AtomicU64),
    (reader, socket_write, to_socket): (&mut Reader, &mut W, &AtomicU64),
    watch: Watch,
    half_closed_timeout: Duration,
) -> Result<bool, Broken>
where
    R: AsyncRead + Unpin,
    W: AsyncWrite + Unpin,
{
    let outbound = outbound(socket_read, writer, from_socket, to_socket);
    let inbound = inbound(reader, socket_write, to_socket);
    tokio::pin!(outbound, inbound);
    let both = async {
        let outbound_first = tokio::select! {
            r = &mut outbound => r.map(|()| true)?,
            r = &mut inbound => r.map(|()| false)?,
        };
        if outbound_first {
            Box::pin(finish_second(inbound, to_socket, half_closed_timeout)).await
        } else {
            Box::pin(finish_second(outbound, from_socket, half_closed_timeout)).await
        }
    };
    // While the socket can be neither read nor written, neither direction would notice that the stream has failed.
    let abandoned = async {
        watch.failed().await;
        let mut taken = None;
        while taken != Some(to_socket.load(Ordering::Relaxed)) {
            taken = Some(to_socket.load(Ordering::Relaxed));
            Box::pin(tokio::time::sleep(LAST_BYTES)).await;
        }
    };
    tokio::select! {
        outcome = both => outcome,
        () = abandoned => Err(Broken::Stream(StreamError("the stream was reset".to_owned()))),
    }
}

/// Relays between two sockets until both directions have ended or one has failed. After one direction has ended, the
/// other may be silent for `half_closed_timeout`; if it is silent for longer, the result is `false`. `up` counts what `a`
/// has sent.
pub async fn relay_sockets<A, B>(
    a: A,
    b: B,
    counters: &Counters,
    half_closed_timeout: Duration,
) -> io::Result<bool>
where
    A: AsyncRead + AsyncWrite,
    B: AsyncRead + AsyncWrite,
{
    let ((read_a, write_a), (read_b, write_b)) = (tokio::io::split(a), tokio::io::split(b));
    let (there, back) = (copy(read_a, write_b, &counters.up), copy(read_b, write_a, &counters.down));
    tokio::pin!(there, back);
    let there_first = tokio::select! {
        result = &mut there => result.map(|()| true)?,
        result = &mut back => result.map(|()| false)?,
    };
    if there_first {
        finish_second(back, &counters.down, half_closed_timeout).await
    } else {
        finish_second(there, &counters.up, half_closed_timeout).await
    }
}

/// Relays as [`relay_sockets`] does, but when `until` completes, gives up the rest, closes `a` and returns `false`.
pub async fn relay_until<A, B>(
    mut a: A,
    b: B,
    counters: &Counters,
    half_closed_timeout: Duration,
    until: impl Future<Output = ()>,
) -> io::Result<bool>
where
    A: AsyncRead + AsyncWrite + Unpin,
    B: AsyncRead + AsyncWrite,
{
    tokio::select! {
        relayed = relay_sockets(&mut a, b, counters, half_closed_timeout) => return relayed,
        () = until => {}
    }
    a.shutdown().await.map(|()| false)
}

async fn copy<R, W>(mut from: R, mut to: W, carried: &AtomicU64) -> io::Result<()>
where
    R: AsyncRead + Unpin,
    W: AsyncWrite + Unpin,
{
    let (mut buffer, mut burst) = (BytesMut::with_capacity(BUFFER), Burst::default());
    while from.read_buf(&mut buffer).await? > 0 {
        to.write_all(&buffer).await?;
        to.flush().await?;
        carried.fetch_add(buffer.len() as u64, Ordering::Relaxed);
        burst.add(buffer.len());
        buffer.clear();
        poll_fn(|cx| burst.poll_pause(cx)).await;
    }
    to.shutdown().await
}

/// Runs the second direction to its end, or until it has carried nothing for a whole `timeout`, which gives `false`.
async fn finish_second<F, E>(
    mut direction: Pin<&mut F>,
    carried: &AtomicU64,
    timeout: Duration,
) -> Result<bool, E>
where
    F: Future<Output = Result<(), E>>,
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
    socket: &mut R,
    writer: &mut Writer,
    carried: &AtomicU64,
    answered: &AtomicU64,
) -> Result<(), Broken> {
    let mut flood = Flood::default();
    let mut size = LEAST_READ;
    let mut burst = Burst::default();
    loop {
        poll_fn(|cx| burst.poll_pause(cx)).await;
        let room = writer.room().await?.min(size);
        let began = Instant::now();
        let frame = poll_fn(|cx| read_frame(socket, writer, room, cx)).await;
        let Some((frame, n)) = frame.map_err(Broken::Socket)? else { return Ok(writer.finish().await?) };
        if n == size {
            size = (size * 2).min(MAX_DATA);
        } else if n < size / 4 {
            size = (size / 2).max(LEAST_READ);
        }
        writer.send(frame).await?;
        burst.add(n);
        carried.fetch_add(n as u64, Ordering::Relaxed);
        if flood.after(n, began.elapsed(), answered.load(Ordering::Relaxed)) {
            Box::pin(tokio::time::sleep(GATHER)).await;
        }
    }
}

/// Detects a socket that is fed by endless tiny writes. A frame costs the same whatever its size, so such a stream would
/// take the time of all others.
#[derive(Debug, Default)]
struct Flood {
    run: u32,
    gathered: bool,
    answered: u64,
}

impl Flood {
    /// Whether to pause after a read of `n` bytes that took `waited`, when `answered` bytes have come back in all.
    fn after(&mut self, n: usize, waited: Duration, answered: u64) -> bool {
        let alone = self.answered == answered;
        self.answered = answered;
        if !alone || waited > AT_ONCE || n > 16 * SMALL {
            self.run = 0;
        } else if n < SMALL {
            self.run = self.run.saturating_add(1);
        } else if !self.gathered {
            self.run = 0;
        }
        self.gathered = self.run >= FLOOD;
        self.gathered
    }
}

/// Reads into a buffer that exists only while there is something to read, so that an idle stream holds no memory.
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
    reader: &mut Reader,
    socket: &mut W,
    carried: &AtomicU64,
) -> Result<(), Broken> {
    loop {
        let bytes = reader.fill().await?;
        if bytes.is_empty() {
            // If this fails, the socket is closed already.
            let _ = socket.shutdown().await;
            return Ok(());
        }
        socket.write_all(bytes).await.map_err(Broken::Socket)?;
        socket.flush().await.map_err(Broken::Socket)?;
        carried.fetch_add(bytes.len() as u64, Ordering::Relaxed);
        reader.taken().await?;
    }
}

#[cfg(test)]
mod tests {
    use tokio::{io::DuplexStream, task::JoinHandle};

    use super::*;

    #[test]
    fn only_a_flood_of_tiny_writes_is_gathered() {
        let now = Duration::ZERO;
        let mut flood = Flood::default();
        let waits = (0..100).filter(|_| flood.after(1, now, 0)).count();
        assert_eq!(waits, 100 - FLOOD as usize + 1);
        // What gathered meanwhile is larger, and the flood goes on.
        assert!(flood.after(5000, now, 0) && flood.after(1, now, 0));
        // An answer, a pause and bulk each end it.
        for (n, waited, answered) in [(1, now, 9), (1, GATHER, 0), (60_000, now, 0)] {
            let mut flood = Flood { run: 99, gathered: true, answered: 0 };
            assert!(!flood.after(n, waited, answered));
        }
        let mut flood = Flood::default();
        assert!((0..1000).all(|i| !flood.after(100, now, i)), "requests and answers");
        assert!((0..1000).all(|_| !flood.after(100, GATHER, 0)), "a log that is written now and then");
        assert!((0..1000).all(|_| !flood.after(60_000, now, 0)), "a download");
    }

    const TIMEOUT: Duration = Duration::from_secs(60);

    /// Two sockets that are relayed, and their other ends.
    fn relayed() -> (DuplexStream, DuplexStream, JoinHandle<io::Result<bool>>) {
        let ((a, near_a), (b, near_b)) = (tokio::io::duplex(1000), tokio::io::duplex(1000));
        #[allow(clippy::disallowed_methods, reason = "a test owns its tasks by its runtime")]
        let relay =
            tokio::spawn(async move { relay_sockets(near_a, near_b, &Counters::default(), TIMEOUT).await });
        (a, b, relay)
    }

    #[tokio::test(start_paused = true)]
    async fn sockets_are_relayed_until_both_directions_have_ended() {
        let (mut a, mut b, relay) = relayed();
        let said = vec![7; 100_000];
        let (mut heard, mut answer) = (Vec::new(), Vec::new());
        let says = async {
            a.write_all(&said).await.unwrap();
            a.shutdown().await.unwrap();
            a.read_to_end(&mut answer).await.unwrap();
        };
        let hears = async {
            b.read_to_end(&mut heard).await.unwrap();
            // This side is slow, but never silent for long.
            for byte in 0..10 {
                tokio::time::sleep(TIMEOUT - Duration::from_secs(1)).await;
                b.write_all(&[byte]).await.unwrap();
            }
            b.shutdown().await.unwrap();
        };
        tokio::join!(says, hears);
        assert!(heard == said && answer == (0..10).collect::<Vec<_>>());
        assert!(relay.await.unwrap().unwrap());
    }

    #[tokio::test(start_paused = true)]
    async fn a_silent_half_is_given_up_and_a_whole_connection_is_not() {
        for first_ends in [true, false] {
            let (mut a, mut b, relay) = relayed();
            tokio::time::sleep(TIMEOUT * 100).await;
            assert!(!relay.is_finished());
            if first_ends { &mut a } else { &mut b }.shutdown().await.unwrap();
            let ended = tokio::time::Instant::now();
            assert!(!relay.await.unwrap().unwrap());
            assert_eq!(ended.elapsed(), TIMEOUT);
            // Both are closed.
            assert_eq!(a.read_to_end(&mut Vec::new()).await.unwrap(), 0);
            assert_eq!(b.read_to_end(&mut Vec::new()).await.unwrap(), 0);
        }
    }
}
