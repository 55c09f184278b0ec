//! How the agents notice that the other one is gone.
//!
//! The master keeps a connection alive. It sends a PING whenever nothing has been sent to the node for a while, or nothing
//! has come from it, and the PONG measures the round trip. While messages pass in both directions, they are proof enough.
//! So each agent hears the other one at least every [`QUIET`]. An agent that hears nothing for longer asks by means of SSH,
//! which is also all that a plain sshd and a person's client know, and ends the connection if nothing comes then.

use std::time::Duration;

/// The longest time for which a master lets a connection be quiet in either direction. A node relies on it: by default, it
/// asks only after a longer time.
pub const QUIET: Duration = Duration::from_secs(6);

/// How long a master lets a connection be quiet if it would ask by means of SSH after `interval`. A PING comes a little
/// earlier, and its answer spares both agents that question.
pub fn quiet(interval: Duration) -> Duration {
    (interval / 7 * 6).min(QUIET)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_ping_comes_before_the_question_of_ssh_and_soon_enough_for_the_node() {
        for (interval, expected) in [(7000, 6000), (700, 600), (10, 8), (60_000, 6000)] {
            let interval = Duration::from_millis(interval);
            assert_eq!(quiet(interval).as_millis(), expected);
            assert!(quiet(interval) < interval);
        }
    }
}
