//! The label `reason`, whose value is a reason or a result.

use prometheus_client::encoding::EncodeLabelSet;

/// A set of labels with `reason` alone.
#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
pub struct ReasonLabel {
    pub reason: &'static str,
}
