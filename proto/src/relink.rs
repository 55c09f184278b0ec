//! When a link is made anew because the certificate that its session was authenticated with comes to its end.
//!
//! A session can't be authenticated twice, so whoever dials a node's links makes a second one in time, new streams go
//! over that, and the old one ends when its streams have.

use std::time::Duration;

/// Streams may still be opened for so long after the certificate's end: who dials the next link and who refuses streams
/// look at different clocks.
pub const GRACE: Duration = Duration::from_secs(5);
/// The least time until the next link.
const LEAST: Duration = Duration::from_secs(1);

/// How long until the next link is made, of a session that began with `left` of the certificate's life: about half of
/// that, by which time a master has a new certificate, as it makes one in every third of their life. `random` in 0..1
/// keeps all nodes from doing so at once.
pub fn due(left: Duration, random: f64) -> Duration {
    left.mul_f64(0.4 + 0.2 * random.clamp(0.0, 1.0)).max(LEAST)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_new_certificate_is_there_before_the_next_link_and_the_old_one_is_still_good() {
        let life = Duration::from_secs(86_400);
        // A session begins when its certificate has between two thirds of its life left and all of it.
        for left in [life, life * 5 / 6, life * 2 / 3] {
            let renewed = left - life * 2 / 3;
            for random in [0.0, 0.5, 1.0] {
                let due = due(left, random);
                assert!(renewed < due && due < left * 2 / 3, "{left:?} {due:?}");
            }
        }
        assert_eq!(due(Duration::ZERO, 0.5), LEAST);
    }
}
