//! What operators rely on: commands, configuration, health, metrics, traces, signals, systemd units.

mod admin_strangers;
mod commands;
mod drain;
mod draining;
mod examples;
mod logs;
mod monitoring;
mod operate;
mod questions;
mod reload;
mod samples;
mod service;
mod state;
mod traces;
mod units;
mod ways_out;
