//! master-agent: runs beside kube-apiserver, keeps SSH tunnels to every node, carries connections over them.

pub mod activity;
pub mod admin;
pub mod admin_api;
pub mod admin_client;
pub mod app;
pub mod cli;
pub mod compare;
pub mod config;
pub mod directory;
pub mod egress;
pub mod fields;
pub mod front_end;
pub mod host_trust;
pub mod http;
pub mod identity;
pub mod input;
mod joined;
pub mod kubernetes;
pub mod metrics;
pub mod page;
pub mod routing;
pub mod sshd_config;
pub mod stream;
pub mod table;
pub mod top;
pub mod traces;
pub mod tunnels;
