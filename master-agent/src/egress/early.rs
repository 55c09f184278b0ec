//! A caller while its dial is under way: bytes that it sends early are kept, and its leaving ends the dial.

use std::{
    io,
    pin::Pin,
    task::{Context, Poll},
    time::Duration,
};

use bytes::BytesMut;
use proto::{DialError, Target};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWriteExt, ReadBuf};

use super::{
    door::{Common, Dialled},
    socket::Socket,
};
use crate::stream::caller::Caller;

/// Bytes a caller may send before the dial has been answered.
const EARLY: usize = 64 * 1024;
/// How long a refused caller has to read its refusal.
const LINGER: Duration = Duration::from_secs(2);

/// Dials while watching whether the caller is still there; `early` is what it has sent already. Gives the
/// connection, and all that came early.
pub(super) async fn dial<S: Socket>(
    common: &Common,
    socket: &mut S,
    target: &Target,
    caller: &Caller,
    mut early: BytesMut,
) -> Result<(Dialled, BytesMut), DialError> {
    let dial = common.dial(target, caller);
    tokio::select! {
        biased;
        dialled = dial => dialled.map(|dialled| (dialled, early)),
        () = gone(socket, &mut early) => Err(DialError::Cancelled),
    }
}

/// Completes when the caller is no longer there; bytes that it sends early are kept.
async fn gone<S: Socket>(socket: &mut S, early: &mut BytesMut) {
    loop {
        if early.len() >= EARLY {
            return std::future::pending().await;
        }
        match socket.read_buf(early).await {
            Ok(0) => return socket.closed_after_eof().await,
            Ok(_) => {}
            Err(_) => return,
        }
    }
}

/// Sends a refusal and gives the caller time to read it: closing a socket with unread bytes resets it.
pub(super) async fn refuse<S: Socket>(socket: &mut S, bytes: &[u8]) {
    let send = async {
        socket.write_all(bytes).await?;
        socket.flush().await?;
        socket.shutdown().await?;
        let mut rest = [0; 1024];
        let mut left = EARLY;
        while left > 0 {
            match socket.read(&mut rest).await? {
                0 => break,
                n => left = left.saturating_sub(n),
            }
        }
        io::Result::Ok(())
    };
    let _ = tokio::time::timeout(LINGER, send).await;
}

/// Gives the bytes that came early before those that follow.
pub(super) struct WithEarly<R> {
    pub early: BytesMut,
    pub inner: R,
}

impl<R: AsyncRead + Unpin> AsyncRead for WithEarly<R> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        if self.early.is_empty() {
            return Pin::new(&mut self.inner).poll_read(cx, buf);
        }
        let n = self.early.len().min(buf.remaining());
        buf.put_slice(&self.early.split_to(n));
        if self.early.is_empty() {
            self.early = BytesMut::new();
        }
        Poll::Ready(Ok(()))
    }
}
