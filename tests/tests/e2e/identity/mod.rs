//! The identities of nodes, masters and people: joining, certificates, impostors, revocation.

mod impostor;
mod join_tokens;
mod joining;
mod refusals;
mod renewal;
mod revocation;
mod turned_master;
