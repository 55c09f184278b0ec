//! Lingering close: a refused caller gets time to read its refusal, since closing a socket with unread bytes resets it.

use std::{io, time::Duration};

use tokio::io::{AsyncReadExt, AsyncWriteExt};

use super::socket::CallerSocket;

/// How long a refused caller has to read its refusal.
const LINGER: Duration = Duration::from_secs(2);
/// Bytes of the caller that are read and dropped meanwhile.
const MAX_DROPPED: usize = 64 * 1024;

/// Sends a refusal, shuts the sending direction down, and reads until the caller closes too.
pub(super) async fn refuse<S: CallerSocket>(socket: &mut S, refusal: &[u8]) {
    let send = async {
        socket.write_all(refusal).await?;
        socket.flush().await?;
        socket.shutdown().await?;
        let mut rest = [0; 1024];
        let mut left = MAX_DROPPED;
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
