//! Early data: the bytes that a caller sends while its dial is under way. They are kept for the target, and a caller that
//! leaves cancels its dial.

use std::{
    io,
    pin::Pin,
    task::{Context, Poll},
};

use bytes::BytesMut;
use proto::{DialError, Target};
use tokio::io::{AsyncRead, AsyncReadExt, ReadBuf};

use super::{
    outbound::{Dialled, Outbound},
    socket::CallerSocket,
};
use crate::stream::caller::Caller;

/// Early data beyond this size stays in the socket.
const MAX_EARLY_DATA: usize = 64 * 1024;

/// Dials while watching whether the caller is still there. `early` is what the caller has sent already; all early data
/// comes back with the connection.
pub(super) async fn dial<S: CallerSocket>(
    outbound: &Outbound,
    socket: &mut S,
    target: &Target,
    caller: &Caller,
    mut early: BytesMut,
) -> Result<(Dialled, BytesMut), DialError> {
    let dial = outbound.dial(target, caller);
    tokio::select! {
        biased;
        dialled = dial => dialled.map(|dialled| (dialled, early)),
        () = gone(socket, &mut early) => Err(DialError::Cancelled),
    }
}

/// Completes when the caller has left.
async fn gone<S: CallerSocket>(socket: &mut S, early: &mut BytesMut) {
    loop {
        if early.len() >= MAX_EARLY_DATA {
            return std::future::pending().await;
        }
        match socket.read_buf(early).await {
            Ok(0) => return socket.closed_after_eof().await,
            Ok(_) => {}
            Err(_) => return,
        }
    }
}

/// Reads the early data, then what follows it. An error that a caller's socket reported in place of early data is reported
/// again, since Linux reports each error once, and then the end.
pub(super) struct WithEarlyData<R> {
    pub early: io::Result<BytesMut>,
    pub inner: R,
}

impl<R: AsyncRead + Unpin> AsyncRead for WithEarlyData<R> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let mut early = std::mem::replace(&mut self.early, Ok(BytesMut::new()))?;
        if early.is_empty() {
            return Pin::new(&mut self.inner).poll_read(cx, buf);
        }
        let n = early.len().min(buf.remaining());
        buf.put_slice(&early.split_to(n));
        if !early.is_empty() {
            self.early = Ok(early);
        }
        Poll::Ready(Ok(()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn early_data_comes_before_what_follows() {
        let mut reader = WithEarlyData { early: Ok(BytesMut::from(&b"early"[..])), inner: &b" late"[..] };
        let mut all = String::new();
        reader.read_to_string(&mut all).await.unwrap();
        assert_eq!(all, "early late");
    }
}
