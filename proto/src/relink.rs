//! When a link is replaced because the certificate that authenticated its session is about to expire.
//!
//! A session can't be authenticated twice. Whoever dials a node's links therefore makes a second one in time; new streams
//! use that one, and the old one ends with the last of its streams.

use std::time::Duration;

/// How long after the certificate's expiry streams may still be opened: the side that dials the next link and the side that
/// refuses streams look at different clocks.
pub const GRACE: Duration = Duration::from_secs(5);
/// The least time until the next link is made.
const LEAST: Duration = Duration::from_secs(1);

/// How long after the beginning of a session, when the certificate was valid for another `left`, the next link is made:
/// about half of that. By then the master has a new certificate, since it makes one in every third of a certificate's
/// lifetime. `random` in 0..1 keeps all nodes from doing so at the same time.
pub fn due(left: Duration, random: f64) -> Duration {
    left.mul_f64(0.4 + 0.2 * random.clamp(0.0, 1.0)).max(LEAST)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_new_certificate_is_there_before_the_next_link_and_the_old_one_is_still_good() {
        let life = Duration::from_secs(86_400);
        // When a session begins, its certificate has between two thirds and all of its lifetime left.
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
