//! The caller of a stream, as records, metrics and traces show it.

use proto_net::dialer::Origin;

use crate::traces::SpanContext;

/// Who asks for a stream, and through which listener.
#[derive(Clone, Debug)]
pub struct Caller {
    /// The listener's name in records and in the metric label `egress`, for instance `connect-unix`.
    pub listener: &'static str,
    pub origin: Origin,
    /// The span that the caller's streams are part of.
    pub span: Option<SpanContext>,
}

impl Caller {
    pub fn new(listener: &'static str, origin: Origin) -> Self {
        Self { listener, origin, span: None }
    }
}
