//! Why a session ended.

use std::time::Duration;

use proto::revocation::ListError;
use proto_net::mux::ProtocolError;

#[derive(Debug, thiserror::Error)]
pub enum SessionError {
    #[error("the peer did not authenticate within {}", humantime::format_duration(*.0))]
    HandshakeTimeout(Duration),
    #[error("evicted to make room for a newer handshake")]
    Evicted,
    #[error("this node-agent is stopping")]
    Stopping,
    #[error("the master refused the link: {0}")]
    RefusedByMaster(String),
    #[error("refused the certificate of a master: {0}")]
    MasterCertificate(String),
    #[error(transparent)]
    Ssh(#[from] russh::Error),
    #[error(transparent)]
    Multiplexer(#[from] ProtocolError),
    #[error("the master made no further connection of the link that it had called for")]
    NotFurther,
    #[error("the master closed the multiplexer's channel")]
    MultiplexerClosed,
    #[error(transparent)]
    RevocationList(#[from] ListError),
    #[error("a list of revoked certificates came unasked")]
    UnaskedRevocationList,
}
