//! Puts the bytes of one direction of a stream in order, which may come over several connections.

use std::collections::{BTreeMap, VecDeque};

use bytes::{Buf, BytesMut};

use super::window::WindowError;

/// The most gaps that there may be at a time. A sender leaves one whenever it changes to another connection, and it closes
/// as soon as the other one's bytes are there.
const MOST_GAPS: usize = 256;

/// The most runs in front of the present one that a sender leaves under way. The receiver has fewer gaps than there are
/// runs.
const MOST_RUNS: usize = MOST_GAPS / 2;

/// The runs of one direction that may not have arrived, each on another connection (`C`) than the one before.
#[derive(Debug)]
pub struct Runs<C> {
    /// The connection of each, and the number of bytes that had been sent on it in all at the end of the run.
    under_way: VecDeque<(C, u64)>,
}

impl<C> Default for Runs<C> {
    fn default() -> Self {
        Self { under_way: VecDeque::new() }
    }
}

impl<C> Runs<C> {
    /// A run has ended on a connection on which `sent` bytes have been sent in all.
    pub fn end(&mut self, connection: C, sent: u64) {
        self.under_way.push_back((connection, sent));
    }

    /// Whether the present run may end, so that another one begins. `arrived` tells how many bytes have arrived on a
    /// connection.
    pub fn may_end(&mut self, arrived: impl Fn(&C) -> u64) -> bool {
        while self.under_way.front().is_some_and(|(connection, sent)| arrived(connection) >= *sent) {
            self.under_way.pop_front();
        }
        self.under_way.len() < MOST_RUNS
    }
}

/// Bytes that have come before those in front of them.
#[derive(Debug, Default)]
pub struct Early {
    /// By their offset. No two of them overlap.
    parts: BTreeMap<u64, BytesMut>,
    /// The number of bytes of the direction, once the sender has said it.
    end: Option<u64>,
}

impl Early {
    /// Takes bytes that begin `offset` bytes after the beginning, of which the first `received` have come. Returns whether
    /// they are next. If they are not, they are kept.
    pub fn on_data(&mut self, offset: u64, bytes: &[u8], received: u64) -> Result<bool, WindowError> {
        let end = offset.saturating_add(bytes.len() as u64);
        let after = self.parts.range(offset..).next().map(|(at, _)| *at);
        let too_far = self.end.is_some_and(|last| end > last) || after.is_some_and(|at| end > at);
        if offset < received || too_far {
            return Err(WindowError::Offset);
        }
        if offset == received {
            return Ok(true);
        }
        if let Some((at, before)) = self.parts.range_mut(..offset).next_back() {
            let before_ends = at.saturating_add(before.len() as u64);
            if before_ends > offset {
                return Err(WindowError::Offset);
            }
            if before_ends == offset {
                before.extend_from_slice(bytes);
                return Ok(false);
            }
        }
        if self.parts.len() >= MOST_GAPS {
            return Err(WindowError::Gaps);
        }
        if !bytes.is_empty() {
            self.parts.insert(offset, BytesMut::from(bytes));
        }
        Ok(false)
    }

    /// The bytes behind the first `received`, if they have come early. `received` is then behind them.
    pub fn next(&mut self, received: &mut u64) -> Option<BytesMut> {
        let bytes = self.parts.remove(received)?;
        *received = received.saturating_add(bytes.len() as u64);
        Some(bytes)
    }

    /// The sender has sent `end` bytes in all, of which the first `received` have come.
    pub fn on_end(&mut self, end: u64, received: u64) -> Result<(), WindowError> {
        let last = self.parts.last_key_value().map_or(received, |(at, bytes)| at + bytes.remaining() as u64);
        if self.end.is_some() || end < last {
            return Err(WindowError::Offset);
        }
        self.end = Some(end);
        Ok(())
    }

    /// Whether the sender has said how many bytes there are, and all of them have come.
    pub fn is_complete(&self, received: u64) -> bool {
        self.end == Some(received)
    }

    /// Whether the sender has said how many bytes there are.
    pub fn has_end(&self) -> bool {
        self.end.is_some()
    }
}

#[cfg(test)]
mod tests {
    use rand::{RngExt, SeedableRng, rngs::StdRng, seq::SliceRandom};

    use super::*;

    /// One direction of a stream.
    #[derive(Default)]
    struct Direction {
        early: Early,
        received: u64,
        bytes: Vec<u8>,
    }

    impl Direction {
        fn take(&mut self, offset: u64, bytes: &[u8]) -> Result<(), WindowError> {
            if self.early.on_data(offset, bytes, self.received)? {
                self.bytes.extend_from_slice(bytes);
                self.received += bytes.len() as u64;
                while let Some(more) = self.early.next(&mut self.received) {
                    self.bytes.extend_from_slice(&more);
                }
            }
            Ok(())
        }
    }

    #[test]
    fn bytes_come_out_in_order_whatever_the_order_in_which_they_came() {
        let mut rng = StdRng::seed_from_u64(9);
        let sent: Vec<u8> = (0..20_000u32).map(|i| (i * 31 / 7) as u8).collect();
        for _ in 0..50 {
            let mut pieces = Vec::new();
            let mut at = 0;
            while at < sent.len() {
                let n = rng.random_range(1..400).min(sent.len() - at);
                pieces.push((at as u64, &sent[at..at + n]));
                at += n;
            }
            // Neighbours change places, and a few come much later.
            for chunk in pieces.chunks_mut(100) {
                chunk.shuffle(&mut rng);
            }
            let mut direction = Direction::default();
            let end = rng.random_range(0..pieces.len());
            for (number, (offset, bytes)) in pieces.into_iter().enumerate() {
                if number == end {
                    direction.early.on_end(sent.len() as u64, direction.received).unwrap();
                }
                assert!(!direction.early.is_complete(direction.received));
                direction.take(offset, bytes).unwrap();
            }
            assert!(direction.bytes == sent && direction.early.is_complete(sent.len() as u64));
            assert!(direction.early.parts.is_empty());
        }
    }

    #[test]
    fn a_sender_never_leaves_as_many_gaps_as_a_receiver_refuses() {
        // The first connection delivers nothing, and the others everything, until it delivers all.
        let (mut runs, mut direction, mut offset) = (Runs::default(), Direction::default(), 0);
        let mut changes = 0;
        while runs.may_end(|connection| if *connection == 0 { 0 } else { u64::MAX }) {
            runs.end(changes % 2, offset + 1);
            if changes % 2 > 0 {
                direction.take(offset, b"x").unwrap();
            }
            (offset, changes) = (offset + 1, changes + 1);
        }
        assert_eq!((changes as usize, direction.early.parts.len()), (MOST_RUNS, MOST_RUNS / 2));
        assert!(runs.may_end(|_| u64::MAX) && runs.under_way.is_empty());
    }

    #[test]
    fn no_byte_comes_twice_and_none_after_the_end() {
        let mut direction = Direction::default();
        direction.take(0, b"0123").unwrap();
        direction.take(8, b"89").unwrap();
        direction.take(10, b"ab").unwrap();
        for (offset, bytes) in
            [(3, &b"3"[..]), (0, b""), (7, b"78"), (8, b"8"), (9, b"9"), (11, b"b"), (4, b"45678")]
        {
            assert_eq!(direction.take(offset, bytes), Err(WindowError::Offset), "{offset}");
        }
        assert_eq!(direction.early.on_end(11, direction.received), Err(WindowError::Offset));
        direction.early.on_end(12, direction.received).unwrap();
        assert_eq!(direction.early.on_end(12, direction.received), Err(WindowError::Offset));
        assert_eq!(direction.take(12, b"c"), Err(WindowError::Offset));
        assert!(!direction.early.is_complete(direction.received));
        direction.take(4, b"4567").unwrap();
        assert_eq!(direction.bytes, b"0123456789ab");
        assert!(direction.early.is_complete(direction.received) && direction.early.has_end());
    }

    #[test]
    fn a_sender_that_leaves_gaps_everywhere_is_found_out() {
        let mut early = Early::default();
        let mut offsets = (1..).map(|i| 2 * i);
        assert!(offsets.by_ref().take(MOST_GAPS).all(|offset| early.on_data(offset, b"x", 0) == Ok(false)));
        assert_eq!(early.on_data(offsets.next().unwrap(), b"x", 0), Err(WindowError::Gaps));
    }
}
