//! A socket to a target, for listeners that are themselves clients of the target, as proxies of HTTP are.

use std::{
    io,
    pin::{Pin, pin},
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    task::{Context, Poll, ready},
    time::Duration,
};

use tokio::{
    io::{AsyncRead, AsyncWrite, DuplexStream, ReadBuf},
    sync::oneshot,
};

/// Bytes that are buffered in each direction between the stream and its user.
const BUFFER: usize = 64 * 1024;
/// How long the target may take to end its direction after a socket has been shut down and dropped.
const LINGER: Duration = Duration::from_secs(5);

/// A connection to a target. Dropping it resets the connection, unless it has been shut down: then the target has a few
/// seconds to end its direction. A broken connection ends with an error, so that a truncated response never looks complete.
pub struct TargetSocket {
    io: DuplexStream,
    broken: Arc<AtomicBool>,
    shut_down: bool,
    dropped: Option<oneshot::Sender<()>>,
}

/// The stream's end of the socket.
pub struct FarEnd {
    pub io: DuplexStream,
    broken: Arc<AtomicBool>,
    dropped: oneshot::Receiver<()>,
}

pub fn pair() -> (TargetSocket, FarEnd) {
    pair_of(BUFFER)
}

/// A pair with a buffer of so many bytes in each direction.
pub fn pair_of(buffer: usize) -> (TargetSocket, FarEnd) {
    let (near, far) = tokio::io::duplex(buffer);
    let broken = Arc::<AtomicBool>::default();
    let (sender, dropped) = oneshot::channel();
    (
        TargetSocket { io: near, broken: broken.clone(), shut_down: false, dropped: Some(sender) },
        FarEnd { io: far, broken, dropped },
    )
}

impl FarEnd {
    /// Runs `relay` for as long as the socket is wanted. `relay` returns whether both directions have ended in order.
    pub async fn carry<F>(self, relay: impl FnOnce(DuplexStream) -> F)
    where
        F: Future<Output = (DuplexStream, bool)>,
    {
        let Self { io, broken, dropped } = self;
        let unwanted = async {
            if dropped.await.is_ok() {
                tokio::time::sleep(LINGER).await;
            }
        };
        let mut relayed = pin!(relay(io));
        // This is dropped before `relayed`, so the end of a relay that is cancelled does not look like the target's.
        let mut relay_end = RelayEnd { broken: &broken, in_order: false };
        tokio::select! {
            (io, in_order) = relayed.as_mut() => {
                relay_end.in_order = in_order;
                drop(relay_end);
                drop(io);
            }
            () = unwanted => {}
        }
    }
}

/// Marks the socket as broken when it is dropped, unless the relay has ended in order.
struct RelayEnd<'a> {
    broken: &'a AtomicBool,
    in_order: bool,
}

impl Drop for RelayEnd<'_> {
    fn drop(&mut self) {
        self.broken.store(!self.in_order, Ordering::Release);
    }
}

impl Drop for TargetSocket {
    fn drop(&mut self) {
        if let Some(dropped) = self.dropped.take().filter(|_| self.shut_down) {
            let _ = dropped.send(());
        }
    }
}

impl AsyncRead for TargetSocket {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let before = buf.filled().len();
        ready!(Pin::new(&mut self.io).poll_read(cx, buf))?;
        let ended = buf.filled().len() == before && buf.remaining() > 0;
        Poll::Ready(match ended && self.broken.load(Ordering::Acquire) {
            true => {
                Err(io::Error::new(io::ErrorKind::ConnectionReset, "the connection to the target was lost"))
            }
            false => Ok(()),
        })
    }
}

impl AsyncWrite for TargetSocket {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.io).poll_write(cx, buf)
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.io).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.shut_down = true;
        Pin::new(&mut self.io).poll_shutdown(cx)
    }
}

#[cfg(test)]
mod tests {
    use tokio::io::AsyncReadExt;

    use super::*;

    #[tokio::test]
    async fn only_a_relay_that_ends_in_order_ends_the_response() {
        for (ends, in_order, complete) in [(true, true, true), (true, false, false), (false, true, false)] {
            let (mut near, far) = pair();
            let mut carried = Box::pin(far.carry(|io| async move {
                if !ends {
                    std::future::pending::<()>().await;
                }
                (io, in_order)
            }));
            tokio::select! {
                biased;
                () = &mut carried => {}
                () = std::future::ready(()) => {}
            }
            drop(carried);
            assert_eq!(near.read(&mut [0; 8]).await.is_ok(), complete, "{ends} {in_order}");
        }
    }
}
