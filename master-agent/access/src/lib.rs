//! Authentication, authorization and limits of the front end's callers.
//!
//! - [`authn`] finds out who a caller is from the [certificates and tokens](authn::Presented) of a request.
//! - [`request_info`] reads what a request asks for, as kube-apiserver does.
//! - [`authz`] decides whether a [`user`] may do that.
//! - [`limits`] bounds the resources that one caller can take from the others.
//!
//! This crate takes plain values: headers, certificates, the [`peer`] and the [`moment`] of a call. It accepts no
//! connections and knows nothing about tunnels. It asks other servers through [`proto_net::https_client`], and the
//! cluster through the traits in [`authn::cluster`], which the agent implements.

pub mod authn;
pub mod authz;
mod cache;
pub mod client_certificates;
pub mod limits;
pub mod moment;
pub mod peer;
pub mod rates;
pub mod request_info;
pub mod secret;
mod shards;
pub mod user;
pub mod x509_expiry;
