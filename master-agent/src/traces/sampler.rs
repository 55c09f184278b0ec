//! Which traces are sampled.

use std::hash::{BuildHasher, RandomState};

use opentelemetry::{
    Context, KeyValue, TraceId,
    trace::{Link, SpanKind, TraceState},
};
use opentelemetry_sdk::trace::{SamplingDecision, SamplingResult, ShouldSample};

/// Samples a share of all traces. The decision depends on the trace's identifier, so that a trace is sent as a whole, and on
/// a key that only this process has, so that nobody can choose an identifier that is sampled.
#[derive(Clone, Debug)]
pub(super) struct Sampler {
    ratio: f64,
    key: RandomState,
}

impl Sampler {
    pub(super) fn new(ratio: f64) -> Self {
        Self { ratio, key: RandomState::new() }
    }

    fn sends(&self, trace: TraceId) -> bool {
        // A number from 0 to 1 with the precision of a float.
        let fraction = (self.key.hash_one(trace.to_bytes()) >> 11) as f64 / (1_u64 << 53) as f64;
        fraction < self.ratio
    }
}

impl ShouldSample for Sampler {
    fn should_sample(
        &self,
        _: Option<&Context>,
        trace: TraceId,
        _: &str,
        _: &SpanKind,
        _: &[KeyValue],
        _: &[Link],
    ) -> SamplingResult {
        let decision =
            if self.sends(trace) { SamplingDecision::RecordAndSample } else { SamplingDecision::Drop };
        SamplingResult { decision, attributes: Vec::new(), trace_state: TraceState::default() }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_share_is_sampled_that_nobody_can_choose() {
        let traces = || (1..=10_000_u128).map(TraceId::from);
        for (ratio, expected) in [(0.0, 0..=0), (0.1, 700..=1300), (1.0, 10_000..=10_000)] {
            let sampler = Sampler::new(ratio);
            let sent: Vec<_> = traces().filter(|trace| sampler.sends(*trace)).collect();
            assert!(expected.contains(&sent.len()), "{ratio}: {}", sent.len());
            assert!(sent.iter().all(|trace| sampler.sends(*trace)));
        }
        let (one, other) = (Sampler::new(0.5), Sampler::new(0.5));
        assert!(traces().any(|trace| one.sends(trace) != other.sends(trace)));
    }
}
