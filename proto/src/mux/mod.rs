//! The stream multiplexer inside a tunnel.
//!
//! One SSH channel carries the frames of many streams. Each stream has a window of its own in each direction, which opens
//! again only as the far socket drains. A reader that stops reading therefore stops its own stream and no other. The SSH
//! channel below always drains at once, so its own window never closes (RFC 4254 §5.2 leaves a receiver free to do so).
//! Streams that send much may use further SSH connections of the same two agents.
//!
//! Both agents open streams: the master to targets, and the node, for calls from the cluster to the master's front end, to
//! [`FRONT_END`]. `proto/STREAMS.md` specifies the wire. A node-agent of an earlier release refuses [`Version::V2`], and has a
//! channel for each direction: [`Version::V1`] for the master's streams, and [`FRONT_END_SUBSYSTEM`], the same wire with the
//! roles reversed, for its own.
//!
//! [`frame`] is the codec, [`window`] is the flow control of streams, and [`budget`] is what their windows share. [`order`] puts
//! bytes in order that came over several connections, [`flow`] limits what is under way on a connection, [`load`] knows which
//! streams send much, and how many connections they are worth, and [`ids`] knows which streams there have been. None of them
//! does I/O or reads a clock; `proto_net::mux` moves the bytes.

pub mod budget;
mod demand;
pub mod flow;
pub mod frame;
pub mod ids;
pub mod load;
pub mod order;
pub mod window;

/// The version of the wire.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Version {
    /// What the first release speaks: one side opens the streams.
    V1,
    V2,
}

impl Version {
    /// All versions, the best one first.
    pub const ALL: [Self; 2] = [Self::V2, Self::V1];

    /// The SSH subsystem (RFC 4254 §6.5) under which a node-agent serves the multiplexer.
    pub fn subsystem(self) -> &'static str {
        match self {
            Self::V1 => "streams-v1",
            Self::V2 => "streams-v2",
        }
    }
}

/// The SSH subsystem under which a node-agent opens streams to the master's front end, where both speak
/// [`Version::V1`].
pub const FRONT_END_SUBSYSTEM: &str = "front-end-v1";
/// The only target of the streams that a node opens.
pub const FRONT_END: &str = "front-end:443";
