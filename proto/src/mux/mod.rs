//! The stream multiplexer inside a tunnel.
//!
//! One SSH channel (subsystem [`SUBSYSTEM`]) carries the frames of many streams, each with a window of its
//! own in both directions, granted again only as the far socket drains. A reader that stops reading
//! therefore stops its own stream and no other: the SSH channel below always drains at once, so its own
//! window never closes (RFC 4254 §5.2 leaves a receiver free to do so).
//!
//! The master opens these streams. For calls from the cluster to the master's front end it asks for the same
//! once more, the other way round (subsystem [`FRONT_END_SUBSYSTEM`]): on that channel the node opens streams, all
//! to [`FRONT_END`]. A peer that does not know it, or has nothing to do with it, refuses the subsystem.
//!
//! [`frame`] is the codec, [`window`] the flow control, [`ids`] tells which streams there have been; all are pure.
//! `proto_net::mux` moves the bytes.

pub mod frame;
pub mod ids;
pub mod window;

/// The SSH subsystem (RFC 4254 §6.5) that a node-agent serves the multiplexer under.
pub const SUBSYSTEM: &str = "streams-v1";
/// The SSH subsystem under which a node-agent opens streams to the master's front end.
pub const FRONT_END_SUBSYSTEM: &str = "front-end-v1";
/// The one target of those streams.
pub const FRONT_END: &str = "front-end:443";
