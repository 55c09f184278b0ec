//! The `metrics` section of the configuration.

use proto_config::Section;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MetricsConfig {
    /// Serve some series of each node.
    pub per_node: bool,
    /// Also serve the names of a Konnectivity server.
    pub konnectivity_names: bool,
}

impl MetricsConfig {
    pub(crate) fn read(s: &Section<'_>) -> Self {
        Self { per_node: s.or("per_node", true), konnectivity_names: s.or("konnectivity_names", false) }
    }
}
