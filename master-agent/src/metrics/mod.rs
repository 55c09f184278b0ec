//! What the metrics of several parts have in common. Each part registers its own metrics and keeps their handles:
//! `stream/metrics/`, `tunnels/`, `front_end/` and `kubernetes/`. All names begin with `master_agent_`, except those
//! that dashboards made for other programs know.

mod certificates;
mod config;
mod gauge;
mod reason;

pub use certificates::{Certificates, Expiry};
pub use config::MetricsConfig;
pub use gauge::signed;
pub use reason::ReasonLabel;
