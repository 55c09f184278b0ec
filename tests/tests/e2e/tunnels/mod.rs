//! Links, tunnels and their streams: faults, hostile peers, isolation, the node's policy.

mod call_home_443;
mod call_home_443_hostile;
mod chaos;
mod further_connections;
mod hostile;
mod hostile_node;
mod interop;
mod isolation;
mod outages;
mod policy;
mod storms;
mod traffic;
