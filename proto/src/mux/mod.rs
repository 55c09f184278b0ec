//! The stream multiplexer inside a tunnel.
//!
//! One SSH channel (subsystem [`SUBSYSTEM`]) carries the frames of many streams, each with a window of its
//! own in both directions, granted again only as the far socket drains. A reader that stops reading
//! therefore stops its own stream and no other: the SSH channel below always drains at once, so its own
//! window never closes (RFC 4254 §5.2 leaves a receiver free to do so).
//!
//! [`frame`] is the codec, [`window`] the flow control; both are pure. `proto::io::mux` moves the bytes.

pub mod frame;
pub mod window;

/// The SSH subsystem (RFC 4254 §6.5) that a node-agent serves the multiplexer under.
pub const SUBSYSTEM: &str = "streams-v1";
