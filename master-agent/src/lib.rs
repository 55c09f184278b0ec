//! master-agent: runs beside kube-apiserver, keeps SSH tunnels to every node, carries connections over them.

pub mod activity;
pub mod agent;
pub mod app;
pub mod cli;
pub mod compare;
pub mod config;
pub mod dialer;
pub mod directory;
pub mod front_door;
pub mod front_end;
pub mod http;
pub mod identity;
pub mod inventory;
pub mod join;
pub mod kubernetes;
pub mod links;
pub mod metrics;
pub mod page;
pub mod registry;
pub mod routing;
pub mod sshd_config;
pub mod store;
pub mod token;
pub mod top;
pub mod trust;
pub mod tunnel;
