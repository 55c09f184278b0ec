//! Whole agents against real peers: one module for each thing that has to hold.
#![allow(clippy::disallowed_methods, reason = "a test owns its tasks by its runtime")]

mod authorization;
mod call_home_443;
mod chaos;
mod commands;
mod compare;
mod examples;
mod front_end;
mod front_end_bootstrap;
mod front_end_credentials;
mod front_end_h2;
mod front_end_held;
mod front_end_hostile;
mod front_end_kubectl;
mod front_end_smuggling;
mod front_end_upstream;
mod hostile;
mod impostor;
mod interop;
mod isolation;
mod joining;
mod konnectivity;
mod kubectl;
mod kubernetes;
mod local_endpoint;
mod memory;
mod monitoring;
mod operate;
mod policy;
mod proxy_urls;
mod socks5;
mod socks5_clients;
mod top;
mod traffic;
