//! The order in which several ways to a target are tried. Distance is a preference and no more: a node that is near, or
//! makes itself look near, must not get all of a service's traffic.

use std::time::Duration;

use rand::{Rng, RngExt};

/// How much more likely a near node is to come first than a far one. Whatever the distances, each of N connected nodes
/// comes first with a probability of at most `PREFERENCE / (N - 1 + PREFERENCE)` and at least
/// `1 / (1 + PREFERENCE * (N - 1))`.
const PREFERENCE: f64 = 3.0;
/// Round trips that differ by less count as equal.
const NEAR: Duration = Duration::from_micros(500);

/// How a node is reached: `None` without a tunnel, `Some(None)` where the round trip is not measured.
pub type Reach = Option<Option<Duration>>;

/// The order in which to try nodes, as indices: the connected ones first, drawn at random by weight.
pub fn order(reach: &[Reach], rng: &mut impl Rng) -> Vec<usize> {
    // In a race of independent exponential times, the one with rate w comes first with probability w / sum.
    let race = |weight: Option<f64>| match weight {
        Some(weight) => (false, -(1.0 - rng.random::<f64>()).ln() / weight),
        None => (true, rng.random()),
    };
    let mut ranked: Vec<_> = weights(reach).map(race).enumerate().collect();
    ranked.sort_by(|(_, (a_away, a)), (_, (b_away, b))| a_away.cmp(b_away).then(a.total_cmp(b)));
    ranked.into_iter().map(|(index, _)| index).collect()
}

/// The weights of the nodes that are connected. An unknown distance earns no preference.
fn weights(reach: &[Reach]) -> impl Iterator<Item = Option<f64>> {
    let nearest = reach.iter().flatten().flatten().min().copied().unwrap_or_default();
    let near = nearest * 2 + NEAR;
    reach.iter().map(move |reach| {
        reach.map(|round_trip| match round_trip {
            Some(round_trip) if round_trip <= near => PREFERENCE,
            Some(_) | None => 1.0,
        })
    })
}

#[cfg(test)]
mod tests {
    use rand::{SeedableRng, rngs::StdRng};

    use super::*;

    const MS: Duration = Duration::from_millis(1);

    fn shares(reach: &[Reach]) -> Vec<f64> {
        let sum: f64 = weights(reach).flatten().sum();
        weights(reach).map(|weight| weight.unwrap_or_default() / sum).collect()
    }

    #[test]
    fn a_node_that_looks_near_gets_a_bounded_share() {
        let mut rng = StdRng::seed_from_u64(1);
        for count in 2..=16 {
            let n = f64::from(count);
            let (most, least) = (PREFERENCE / (n - 1.0 + PREFERENCE), 1.0 / (1.0 + PREFERENCE * (n - 1.0)));
            for _ in 0..1000 {
                let mut reach: Vec<Reach> = (1..count)
                    .map(|_| Some(rng.random_bool(0.8).then(|| MS.mul_f64(rng.random_range(0.0..100.0)))))
                    .collect();
                reach.push(Some(Some(Duration::ZERO)));
                for share in shares(&reach) {
                    assert!(share <= most + 1e-9 && share >= least - 1e-9, "{share} of {reach:?}");
                }
            }
        }
    }

    #[test]
    fn what_is_drawn_follows_the_weights() {
        let mut rng = StdRng::seed_from_u64(2);
        let reach = [
            Some(Some(Duration::ZERO)),
            None,
            Some(Some(MS * 2)),
            Some(None),
            Some(Some(MS * 90)),
            Some(Some(MS)),
        ];
        let draws = 50_000;
        let mut firsts = [0u32; 6];
        for _ in 0..draws {
            let order = order(&reach, &mut rng);
            assert_eq!(order.len(), reach.len());
            assert_eq!(order[5], 1, "without a tunnel it is the last one");
            firsts[order[0]] += 1;
        }
        for (first, share) in firsts.iter().zip(shares(&reach)) {
            let drawn = f64::from(*first) / f64::from(draws);
            assert!((drawn - share).abs() < 0.01, "{firsts:?}: {drawn} is not {share}");
        }
        assert!(firsts[0] < draws / 2, "{firsts:?}");
    }

    #[test]
    fn equals_are_equal_whether_measured_or_not() {
        assert_eq!(shares(&[Some(None); 4]), [0.25; 4]);
        assert_eq!(shares(&[Some(Some(MS)), Some(Some(MS * 2))]), [0.5; 2]);
        assert_eq!(shares(&[Some(Some(MS)), Some(Some(MS * 3))]), [0.75, 0.25]);
        let mut rng = StdRng::seed_from_u64(3);
        let mut away = order(&[None, None, None], &mut rng);
        away.sort_unstable();
        assert_eq!(away, [0, 1, 2]);
    }
}
