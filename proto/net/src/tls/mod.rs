//! TLS that both agents use: whom a client trusts and what it shows, what is verified of a peer, and PEM files.

mod bounds;
mod client;
mod files;
mod server;
mod verifiers;

pub use bounds::{ChainError, MAX_CHAIN, MAX_INTERMEDIATES, check_chain};
pub use client::{ClientTls, believe_any, client_config, verify_by};
pub use files::{FileError, chain, private_key, revocation_lists, roots};
pub use server::accept;
pub use verifiers::{AnyCertificate, Possession, ServerPolicy, ServerVerifier, WebPki};
