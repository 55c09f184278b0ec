//! The beginning of a connection, up to the peer's HELLO.

use proto::mux::{
    Version,
    frame::{Decoder, Frame, Hello},
};

use super::error::ProtocolError;

/// Reads what a peer says first.
pub struct Greeting(Decoder);

impl Default for Greeting {
    fn default() -> Self {
        Self(Decoder::new(Version::V2))
    }
}

impl Greeting {
    /// Takes bytes in the order in which they came, up to the end of HELLO. What is left of `bytes` then is for the
    /// multiplexer.
    pub fn take(&mut self, bytes: &mut &[u8]) -> Result<Option<Hello>, ProtocolError> {
        match self.0.decode(bytes)? {
            Some(Frame::Hello(hello)) => Ok(Some(hello)),
            Some(_) => Err(ProtocolError::Hello),
            None => Ok(None),
        }
    }
}
