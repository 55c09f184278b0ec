//! Sets of serial numbers, kept as ranges.

use super::error::{KrlError, MAX_RANGES};

/// First and last serial number.
pub(super) type Range = (u64, u64);

/// A set of serial numbers. The ranges are sorted, and they neither overlap nor touch.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Serials(Vec<Range>);

impl Serials {
    pub(super) fn contains(&self, serial: u64) -> bool {
        let after = self.0.partition_point(|(first, _)| *first <= serial);
        after.checked_sub(1).and_then(|i| self.0.get(i)).is_some_and(|(_, last)| serial <= *last)
    }

    pub(super) fn ranges(&self) -> impl Iterator<Item = Range> + '_ {
        self.0.iter().copied()
    }

    /// Adds ranges in any order. Each must have passed [`check_range`].
    pub(super) fn extend(&mut self, ranges: impl IntoIterator<Item = Range>) -> Result<(), KrlError> {
        self.0.extend(ranges);
        self.0.sort_unstable();
        self.0.dedup_by(|next, kept| {
            let joins = next.0 <= kept.1.saturating_add(1);
            if joins {
                kept.1 = kept.1.max(next.1);
            }
            joins
        });
        if self.0.len() > MAX_RANGES { Err(KrlError::Ranges) } else { Ok(()) }
    }

    /// Takes a range out.
    pub(super) fn remove(&mut self, range: Range) {
        self.0 = self.0.iter().flat_map(|kept| without(*kept, range)).flatten().collect();
    }
}

/// Serial number 0 means that a certificate has none.
pub(super) fn check_range((first, last): Range) -> Result<(), KrlError> {
    if first == 0 || first > last { Err(KrlError::Serial) } else { Ok(()) }
}

/// The runs of set bits in a number in big-endian form, first and last bit of each, from the lowest.
pub(super) fn runs(bits: &[u8]) -> impl Iterator<Item = Range> + '_ {
    let mut set = (0u64..).zip(bits.iter().rev()).flat_map(|(i, byte)| {
        let byte = *byte;
        (0..8u64).filter(move |bit| (byte >> bit) & 1 == 1).map(move |bit| i * 8 + bit)
    });
    let mut next = set.next();
    std::iter::from_fn(move || {
        let first = next?;
        let mut last = first;
        loop {
            next = set.next();
            if next != Some(last + 1) {
                return Some((first, last));
            }
            last += 1;
        }
    })
}

/// What is left of a range, below and above what is taken out of it.
fn without((first, last): Range, (from, to): Range) -> [Option<Range>; 2] {
    if to < first || last < from {
        return [Some((first, last)), None];
    }
    let below = from.checked_sub(1).filter(|end| first <= *end).map(|end| (first, end));
    let above = to.checked_add(1).filter(|begin| *begin <= last).map(|begin| (begin, last));
    [below, above]
}
