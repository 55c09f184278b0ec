//! A caller's socket that knows whether the head of a request is being sent, and for how long.

use std::{
    io,
    pin::Pin,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    task::{Context, Poll},
    time::Duration,
};

use tokio::{
    io::{AsyncRead, AsyncWrite, ReadBuf},
    time::{Instant, Sleep},
};

/// Counts the requests of one connection: those whose answers are not complete, and all of them.
#[derive(Clone, Debug, Default)]
pub struct Activity(Arc<(AtomicUsize, AtomicUsize)>);

/// A request whose answer is not complete. Dropping it completes the answer.
#[derive(Debug)]
pub struct Busy(Activity);

impl Activity {
    pub fn busy(&self) -> Busy {
        self.0.0.fetch_add(1, Ordering::Relaxed);
        self.0.1.fetch_add(1, Ordering::Relaxed);
        Busy(self.clone())
    }

    fn is_idle(&self) -> bool {
        self.0.0.load(Ordering::Relaxed) == 0
    }

    /// Completes when no request has begun within `first`, or when there has been none for `idle`. The latter may take
    /// up to twice as long.
    pub async fn unused(&self, first: Duration, idle: Duration) {
        tokio::time::sleep(first).await;
        let mut begun = 0;
        while self.begun() > begun || !self.is_idle() {
            begun = self.begun();
            tokio::time::sleep(idle).await;
        }
    }

    fn begun(&self) -> usize {
        self.0.1.load(Ordering::Relaxed)
    }
}

impl Drop for Busy {
    fn drop(&mut self) {
        self.0.0.0.fetch_sub(1, Ordering::Relaxed);
    }
}

/// Fails to read once a head has taken longer than the timeout. The time runs from the head's first byte, and for the
/// first head from the beginning of the connection.
pub struct Watched<S> {
    socket: S,
    deadline: Pin<Box<Sleep>>,
    activity: Activity,
    timeout: Duration,
    /// Whether a head has to be complete by the deadline.
    awaits_head: bool,
    /// The number of requests whose heads have been read.
    begun: usize,
}

impl<S> Watched<S> {
    pub fn new(socket: S, activity: Activity, timeout: Duration) -> Self {
        Self {
            socket,
            deadline: Box::pin(tokio::time::sleep(timeout)),
            activity,
            timeout,
            awaits_head: true,
            begun: 0,
        }
    }

    pub fn get_mut(&mut self) -> &mut S {
        &mut self.socket
    }
}

impl<S: AsyncRead + Unpin> AsyncRead for Watched<S> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let this = &mut *self;
        if this.begun != this.activity.begun() {
            this.begun = this.activity.begun();
            this.awaits_head = false;
        }
        let read = Pin::new(&mut this.socket).poll_read(cx, buf);
        if !this.activity.is_idle() {
            return read;
        }
        if read.is_ready() && !this.awaits_head {
            this.awaits_head = true;
            this.deadline.as_mut().reset(Instant::now() + this.timeout);
        }
        if this.awaits_head && this.deadline.as_mut().poll(cx).is_ready() {
            let message = "the request's head did not arrive in time";
            return Poll::Ready(Err(io::Error::new(io::ErrorKind::TimedOut, message)));
        }
        read
    }
}

impl<S: AsyncWrite + Unpin> AsyncWrite for Watched<S> {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.socket).poll_write(cx, buf)
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.socket).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.socket).poll_shutdown(cx)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.socket).poll_write_vectored(cx, bufs)
    }

    fn is_write_vectored(&self) -> bool {
        self.socket.is_write_vectored()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn a_connection_without_requests_is_unused() {
        let activity = Activity::default();
        let (first, idle) = (Duration::from_secs(10), Duration::from_secs(100));
        let began = Instant::now();
        activity.unused(first, idle).await;
        assert_eq!(began.elapsed(), first);
        let busy = activity.busy();
        let until = async {
            tokio::time::sleep(Duration::from_secs(1000)).await;
            drop(busy);
        };
        let began = Instant::now();
        tokio::join!(activity.unused(first, idle), until);
        assert!(began.elapsed() >= Duration::from_secs(1000), "{:?}", began.elapsed());
        assert!(began.elapsed() <= Duration::from_secs(1200), "{:?}", began.elapsed());
    }
}
