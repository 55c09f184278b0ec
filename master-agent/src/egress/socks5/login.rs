//! The request of RFC 1929, with which a caller of SOCKS5 presents a user name and a password.

use std::io;

use tokio::io::{AsyncRead, AsyncReadExt};
use zeroize::Zeroizing;

/// The version of the subnegotiation (RFC 1929 §2).
const VERSION: u8 = 1;

/// What a caller presents. Neither text need be UTF-8.
pub struct Login {
    pub name: Vec<u8>,
    pub password: Zeroizing<Vec<u8>>,
}

impl Login {
    /// Reads a request and no byte beyond it. `None` means that it is of another version.
    pub async fn read<R: AsyncRead + Unpin>(socket: &mut R) -> io::Result<Option<Self>> {
        if socket.read_u8().await? != VERSION {
            return Ok(None);
        }
        let name = read_text(socket).await?;
        let password = Zeroizing::new(read_text(socket).await?);
        Ok(Some(Self { name, password }))
    }
}

/// Reads a length and as many bytes.
async fn read_text<R: AsyncRead + Unpin>(socket: &mut R) -> io::Result<Vec<u8>> {
    let mut text = vec![0; usize::from(socket.read_u8().await?)];
    socket.read_exact(&mut text).await?;
    Ok(text)
}
