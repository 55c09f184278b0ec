//! The error of a stream, whatever carries it.

/// Why a stream ended before both of its directions did.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub struct StreamError(pub String);

impl From<std::io::Error> for StreamError {
    fn from(e: std::io::Error) -> Self {
        Self(e.to_string())
    }
}
