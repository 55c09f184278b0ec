//! The connection over which the bytes of one direction of a stream go.

use std::sync::Arc;

use bytes::Bytes;

use super::{connection::Connection, endpoint::Mux, further::HeavyMark};
use crate::gate::{Reservation, Turn};

/// Small exchanges use the first connection of a session, and heavy streams the further ones, so that nothing small waits
/// behind a transfer.
pub(super) struct Route {
    connection: Arc<Connection>,
    turn: Turn,
    mark: HeavyMark,
}

impl Route {
    pub(super) fn new(mux: &Mux) -> Self {
        let connection = mux.0.first.clone();
        let turn = connection.gate.turn();
        Self { connection, turn, mark: HeavyMark::new(&mux.0.further) }
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
        let further = if is_heavy { mux.0.further.choose(&self.connection) } else { None };
        let connection = further.unwrap_or_else(|| mux.0.first.clone());
        if !Arc::ptr_eq(&connection, &self.connection) {
            let turn = connection.gate.turn();
            let former = std::mem::replace(&mut self.turn, turn);
            self.turn.inherit(former);
            self.connection = connection;
        }
    }

    /// Sends an encoded frame; `false` once the connection is gone.
    pub(super) async fn send(&self, frame: Bytes) -> bool {
        self.connection.send(frame).await
    }

    /// The number of the connection, and what has been sent on it in all, if it is a further one.
    pub(super) fn further(&self) -> Option<(u32, u64)> {
        let connection = &self.connection;
        (connection.number > 0).then(|| (connection.number, connection.gate.sent_and_arrived().0))
    }
}
