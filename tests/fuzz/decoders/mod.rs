//! What must hold for every decoder of a peer's bytes, whatever the bytes are: nothing panics, what was decoded means the
//! same after it has been encoded again, and where two readings of the same bytes would be a gap, a second reading that
//! shares no code with the first agrees with it.
//!
//! The fuzz targets call these functions with new inputs, and `tests/tests/corpora.rs` with those that are kept in
//! `corpora/`, in a folder for each function.

#![allow(dead_code, reason = "each fuzz target uses one function")]

mod credentials;
mod egress;
mod heads;
mod nodes;
mod requests;
mod tunnels;

pub use credentials::{
    bearer_token, bootstrap_token, client_chain, identity_headers, json_web_token, known_hosts,
};
pub use egress::{authority, socks5_login};
pub use nodes::{front_end_answer, proxy_answer};
pub use requests::{proxy_path, request_info, traceparent};
pub use tunnels::{
    call_home, connect, frames, join_request, join_response, join_token, konnectivity, multiplexer, refusal,
    revocation_list, revocation_report, signed_list, target,
};

/// A function that is given a peer's bytes.
pub type Check = fn(&[u8]);

/// All functions by name.
pub const ALL: &[(&str, Check)] = &[
    ("frames", frames),
    ("multiplexer", multiplexer),
    ("connect", connect),
    ("konnectivity", konnectivity),
    ("join_request", join_request),
    ("join_response", join_response),
    ("join_token", join_token),
    ("revocation_list", revocation_list),
    ("signed_list", signed_list),
    ("revocation_report", revocation_report),
    ("target", target),
    ("call_home", call_home),
    ("refusal", refusal),
    ("authority", authority),
    ("socks5_login", socks5_login),
    ("request_info", request_info),
    ("proxy_path", proxy_path),
    ("traceparent", traceparent),
    ("identity_headers", identity_headers),
    ("bearer_token", bearer_token),
    ("bootstrap_token", bootstrap_token),
    ("json_web_token", json_web_token),
    ("client_chain", client_chain),
    ("known_hosts", known_hosts),
    ("front_end_answer", front_end_answer),
    ("proxy_answer", proxy_answer),
];
