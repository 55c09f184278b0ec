//! The peer of a session, once it has authenticated.

use std::time::{Duration, SystemTime};

use proto::relink::{self, GRACE};
use proto_net::clock::Clock;
use russh::keys::Certificate;

use crate::{identity::user::UserRole, shares::Share};

/// A peer that has proved who it is.
pub(super) struct AuthenticatedUser {
    pub(super) role: UserRole,
    pub(super) certificate: Certificate,
    pub(super) clock: Clock,
    /// The streams that it may have in all of its sessions.
    pub(super) streams: Share,
    /// The names that may be looked up for it at once.
    pub(super) lookups: Share,
}

impl AuthenticatedUser {
    pub(super) fn is_master(&self) -> bool {
        matches!(self.role, UserRole::Master)
    }

    /// The name that the records of its streams show.
    pub(super) fn origin(&self) -> String {
        match &self.role {
            UserRole::Master => "ssh master-agent".to_owned(),
            UserRole::Person { login, .. } => format!("ssh {login}"),
        }
    }

    /// Whether it may open no more streams.
    pub(super) fn has_expired(&self) -> bool {
        self.expires().is_some_and(|at| at <= self.clock.now())
    }

    /// Waits until it may open no more streams.
    pub(super) async fn expired(&self) {
        self.clock.reached(self.expires()).await;
    }

    /// How long until a master should have another link to this node.
    pub(super) fn relink_after(&self) -> Option<Duration> {
        let end = self.certificate.valid_before_time().filter(|_| self.is_master())?;
        let left = end.duration_since(self.clock.now()).unwrap_or_default();
        Some(relink::due(left, rand::random()))
    }

    fn expires(&self) -> Option<SystemTime> {
        self.certificate.valid_before_time()?.checked_add(GRACE)
    }
}
