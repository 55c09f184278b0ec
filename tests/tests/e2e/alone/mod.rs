//! Tests that measure what other work on the machine would change: memory over very many streams, CPU time, throughput.
//! `tests/run.sh` runs them one at a time, and all other tests several at once.

mod bursts;
mod chaos;
mod client_chains;
mod compare;
mod front_end_hostile;
mod isolation;
mod memory;
mod packet_path;
mod reload;
mod systemd;
mod traffic;
