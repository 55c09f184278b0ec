//! The parts of the agent that every session uses.

use std::{sync::Arc, time::Duration};

use proto_net::{clock::Clock, log_throttle::LogThrottle};

use super::{
    bounds::Bounds, config::LimitsConfig, masters::ConnectedMasters, multiplexers::Multiplexers,
    streams::StreamServer,
};
use crate::{
    identity::{current::CurrentIdentity, renewal::Renewals, trust::Trust},
    local_endpoint::front_ends::FrontEnds,
    metrics::Metrics,
    revocation::Revocations,
    shutdown::Shutdown,
};

pub struct SessionServices {
    pub identity: CurrentIdentity,
    pub trust: Trust,
    pub renewals: Renewals,
    pub revocations: Arc<Revocations>,
    pub streams: Arc<StreamServer>,
    /// Where callers of the local endpoint go, if there is one.
    pub front_ends: Option<Arc<FrontEnds>>,
    pub limits: LimitsConfig,
    pub bounds_of_masters: Bounds,
    pub bounds_of_people: Bounds,
    pub connected_masters: Arc<ConnectedMasters>,
    pub multiplexers: Arc<Multiplexers>,
    /// The channels of one session that this node may close before its peer does. Each leaves some memory behind.
    pub max_closed_first: usize,
    /// Bounds the log lines that peers cause with handshakes.
    pub log_throttle: LogThrottle,
    /// How long a session may outlive its certificate if its master makes no other link.
    pub shutdown_grace: Duration,
    pub metrics: Arc<Metrics>,
    pub clock: Clock,
    pub shutdown: Shutdown,
}

impl SessionServices {
    /// The streams that are open or about to be.
    pub fn streams_open(&self) -> u64 {
        let open = self.metrics.streams.get() + self.metrics.front_end_streams.get();
        u64::try_from(open).unwrap_or_default() + self.shutdown.dials.len() as u64
    }
}
