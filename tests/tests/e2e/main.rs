//! Whole agents against real peers: one folder for each area, and in it one module for each thing that has to hold.
#![allow(clippy::disallowed_methods, reason = "a test owns its tasks by its runtime")]

mod alone;
mod egress;
mod front_end;
mod identity;
mod operations;
mod routing;
mod tunnels;
mod ui;
