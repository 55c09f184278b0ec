//! Bytes that can be checked cheaply. Every 8 bytes are their own offset, scrambled, so that loss, repetition and
//! reordering are all noticed.

const MULTIPLIER: u64 = 0x9e37_79b9_7f4a_7c15;

/// Fills `buffer` with the bytes that stand at `offset`, a multiple of 8.
pub fn fill(buffer: &mut [u8], offset: u64) {
    for (i, word) in buffer.chunks_mut(8).enumerate() {
        let value = (offset / 8 + i as u64 + 1).wrapping_mul(MULTIPLIER).to_le_bytes();
        word.copy_from_slice(&value[..word.len()]);
    }
}

/// Checks bytes as they come.
#[derive(Debug, Default)]
pub struct Checker {
    offset: u64,
}

impl Checker {
    /// Panics at the first wrong byte.
    pub fn check(&mut self, bytes: &[u8]) {
        assert!(self.matches(bytes), "wrong bytes at offset {}", self.offset);
    }

    /// Whether these are the next bytes. If not, the offset stays at the first word that is wrong.
    pub fn matches(&mut self, mut bytes: &[u8]) -> bool {
        while !bytes.is_empty() {
            let skip = (self.offset % 8) as usize;
            let expected = (self.offset / 8 + 1).wrapping_mul(MULTIPLIER).to_le_bytes();
            let n = bytes.len().min(8 - skip);
            if bytes[..n] != expected[skip..skip + n] {
                return false;
            }
            self.offset += n as u64;
            bytes = &bytes[n..];
        }
        true
    }

    pub fn offset(&self) -> u64 {
        self.offset
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn finds_loss_and_exchange() {
        let mut bytes = vec![0; 100_003];
        fill(&mut bytes, 0);
        let mut checker = Checker::default();
        for piece in bytes.chunks(777) {
            checker.check(piece);
        }
        assert_eq!(checker.offset(), bytes.len() as u64);
        for broken in
            [[&bytes[..5000], &bytes[5001..]].concat(), [&bytes[8..16], &bytes[..8], &bytes[16..]].concat()]
        {
            assert!(std::panic::catch_unwind(|| Checker::default().check(&broken)).is_err());
        }
    }
}
