//! The stream multiplexer inside a tunnel.
//!
//! One SSH channel (subsystem [`SUBSYSTEM`]) carries the frames of many streams. Each stream has a window of its own in
//! each direction, which opens again only as the far socket drains. A reader that stops reading therefore stops its own
//! stream and no other. The SSH channel below always drains at once, so its own window never closes (RFC 4254 §5.2
//! leaves a receiver free to do so).
//!
//! The master opens these streams. For calls from the cluster to the master's front end, it opens a second such channel in
//! which the roles are reversed (subsystem [`FRONT_END_SUBSYSTEM`]): there the node opens streams, all to [`FRONT_END`]. A
//! peer without a use for a subsystem refuses it.
//!
//! [`frame`] is the codec, [`window`] is the flow control of streams, [`flow`] limits what is under way on a connection, and
//! [`ids`] knows which streams there have been. None of them does I/O or reads a clock; `proto_net::mux` moves the bytes.

pub mod flow;
pub mod frame;
pub mod ids;
pub mod window;

/// The SSH subsystem (RFC 4254 §6.5) under which a node-agent serves the multiplexer.
pub const SUBSYSTEM: &str = "streams-v1";
/// The SSH subsystem under which a node-agent opens streams to the master's front end.
pub const FRONT_END_SUBSYSTEM: &str = "front-end-v1";
/// The only target of those streams.
pub const FRONT_END: &str = "front-end:443";
