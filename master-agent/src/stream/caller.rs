//! Who calls an egress listener, as records, metrics and traces know it.

use proto_net::dialer::Origin;

use crate::traces::SpanContext;

/// Who has come, and through which listener.
#[derive(Clone, Debug)]
pub struct Caller {
    /// The listener's name in records and metrics, for instance `connect-unix`.
    pub door: &'static str,
    pub origin: Origin,
    /// Of what its streams are part.
    pub span: Option<SpanContext>,
}

impl Caller {
    pub fn new(door: &'static str, origin: Origin) -> Self {
        Self { door, origin, span: None }
    }
}
