//! The error for an ambiguous request.

/// Why a request is ambiguous or malformed. The answer is 400.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the request's {0}")]
pub struct Unreadable(pub(super) &'static str);
