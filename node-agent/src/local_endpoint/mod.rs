//! The local endpoint: callers on this node use it in place of the front end's port, to which they may have no route.
//! Their bytes, which are TLS from end to end, go through a tunnel to the front end of the master at its other end. This
//! agent can't read them, and the master lets nothing else be reached that way.

pub mod config;
pub mod front_ends;
pub mod listener;
