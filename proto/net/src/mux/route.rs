//! The connection over which the bytes of one direction of a stream go.

use std::sync::Arc;

use bytes::Bytes;
use proto::mux::order::Runs;

use super::{connection::Connection, endpoint::Mux, further::HeavyMark};
use crate::gate::{Reservation, Turn};

/// Small exchanges use the first connection of a session, and heavy streams the further ones, so that nothing small waits
/// behind a transfer.
pub(super) struct Route {
    connection: Arc<Connection>,
    turn: Turn,
    mark: HeavyMark,
    /// The bytes that were sent since the last change of the connection, and the runs before.
    since_change: usize,
    runs: Runs<Arc<Connection>>,
}

/// The bytes after which a stream may change to another further connection. Each change costs the receiver a little, but
/// one connection that takes little must not keep the stream from the others.
const LEAST_RUN: usize = 64 * 1024;

impl Route {
    pub(super) fn new(mux: &Mux) -> Self {
        let connection = mux.0.first.clone();
        let turn = connection.gate.turn();
        let (mark, runs) = (HeavyMark::new(&mux.0.further), Runs::default());
        Self { connection, turn, mark, since_change: 0, runs }
    }

    /// How many bytes should be sent at once.
    pub(super) fn share(&self) -> usize {
        self.connection.gate.share()
    }

    /// Waits until there is room for `bytes` bytes; `None` once the session is gone.
    pub(super) async fn reserve(&mut self, mux: &Mux, bytes: usize) -> Option<Reservation> {
        loop {
            self.choose(mux);
            if let Some(reserved) = self.connection.gate.reserve(&mut self.turn, bytes).await {
                self.since_change = self.since_change.saturating_add(bytes);
                return Some(reserved);
            }
            // A further connection that is gone is not chosen again.
            if self.connection.number == 0 {
                return None;
            }
        }
    }

    fn choose(&mut self, mux: &Mux) {
        let is_heavy = self.turn.is_heavy();
        self.mark.set(is_heavy);
        let arrived = |connection: &Arc<Connection>| connection.gate.sent_and_arrived().1;
        let stays = self.since_change < LEAST_RUN || !self.runs.may_end(arrived);
        let further = if is_heavy { mux.0.further.choose(&self.connection, stays) } else { None };
        let connection = further.unwrap_or_else(|| mux.0.first.clone());
        if !Arc::ptr_eq(&connection, &self.connection) {
            let turn = connection.gate.turn();
            let former = std::mem::replace(&mut self.turn, turn);
            self.turn.inherit(former);
            let former = std::mem::replace(&mut self.connection, connection);
            let sent = former.gate.sent_and_arrived().0;
            self.runs.end(former, sent);
            self.since_change = 0;
        }
    }

    /// Sends an encoded frame; `false` once the connection is gone.
    pub(super) async fn send(&self, frame: Bytes) -> bool {
        self.connection.send(frame).await
    }

    pub(super) fn is_lost(&self) -> bool {
        self.connection.is_lost()
    }

    /// The number of the connection, and what has been sent on it in all, if it is a further one.
    pub(super) fn further(&self) -> Option<(u32, u64)> {
        let connection = &self.connection;
        (connection.number > 0).then(|| (connection.number, connection.gate.sent_and_arrived().0))
    }
}
