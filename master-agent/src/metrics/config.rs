//! The `metrics` section of the configuration.

use proto_config::{Meanings, Section};

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MetricsConfig {
    /// Whether each node has series of its own.
    pub per_node: bool,
    /// Whether the metrics of a Konnectivity server are served as well.
    pub konnectivity_names: bool,
}

const FIELDS: Meanings = &[
    ("per_node", "Serves series for individual nodes, at most 13 each."),
    ("konnectivity_names", "Also serves the metrics of a Konnectivity server that have an equivalent here."),
];

impl MetricsConfig {
    pub(crate) fn read(s: &Section<'_>) -> Self {
        s.document(FIELDS);
        Self { per_node: s.or("per_node", true), konnectivity_names: s.or("konnectivity_names", false) }
    }
}
