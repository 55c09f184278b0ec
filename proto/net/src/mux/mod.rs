//! Runs the multiplexer of [`proto::mux`] over the SSH connections between two agents.
//!
//! There is no task between a stream and the SSH session: the session itself puts the bytes that arrive into their
//! stream's buffer ([`Feeder::feed`]), and a stream's frames go straight to the session's queue. What a peer can make
//! this side hold is bounded: data by the windows and the budget that they share, streams by `max_streams`, and answers by a short queue. A stream
//! counts until both of its halves have been dropped here, whatever the peer has said about it.
//!
//! A peer that does what no honest one does is found out ([`ProtocolError`]) and loses its tunnel. Frames may cross the
//! end of their stream on the way, so whatever comes for a stream that has ended is ignored.

mod by_opener;
mod connection;
mod credit;
mod endpoint;
mod error;
mod feeder;
mod further;
mod greeting;
mod halves;
mod open;
mod round_trip;
mod route;
mod state;

pub use connection::SendFrame;
pub use endpoint::{Mux, Settings, hello};
pub use error::{ProtocolError, Violation};
pub use feeder::{Events, Feeder, Notice};
pub use greeting::Greeting;
pub use halves::{Reader, Watch, Writer};
pub use open::Incoming;

#[cfg(test)]
mod hostile;
#[cfg(test)]
mod tests;
