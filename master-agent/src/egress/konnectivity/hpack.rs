//! HPACK (RFC 7541), as far as it takes to replace one value in a header block without a dynamic table.

use bytes::BufMut;
use hyper::http::uri::Authority;

/// The longest encoded value that is replaced. The path of a socket has 108 bytes, and at most three times as many encoded.
const MAX_VALUE: usize = 1024;
/// The index of `:authority` in HPACK's static table (RFC 7541 appendix A).
const AUTHORITY: usize = 1;

/// Replaces an invalid `:authority` by a valid one of the same length. Returns `None` if the block is to stay as it is, also
/// because it is malformed.
pub(super) fn replace_authority(block: &[u8]) -> Option<Vec<u8>> {
    let mut rest = block;
    while let Some(first) = rest.first() {
        // RFC 7541 §6: the bits of the first byte that are an index or a size, and whether a value follows.
        let (bits, literal) = match first {
            0x80.. => (7, false),
            0x40..0x80 => (6, true),
            0x20..0x40 => (5, false),
            0x00..0x20 => (4, true),
        };
        let index = integer(&mut rest, bits)?;
        if !literal {
            continue;
        }
        if index == 0 {
            string(&mut rest)?;
        }
        let before = block.len() - rest.len();
        let value = string(&mut rest)?;
        if index == AUTHORITY {
            let len = refused_len(&value)?;
            let mut out = Vec::with_capacity(block.len() + len);
            out.extend_from_slice(block.get(..before)?);
            put_host(&mut out, len);
            out.extend_from_slice(rest);
            return Some(out);
        }
    }
    None
}

/// The decoded length of a value that the server refuses, or may refuse.
fn refused_len(value: &Text<'_>) -> Option<usize> {
    let len = match value {
        Text::Huffman(bytes) | Text::Raw(bytes) if bytes.len() > MAX_VALUE => return None,
        Text::Huffman(bytes) => huffman_len(bytes)?,
        Text::Raw(bytes) if Authority::try_from(*bytes).is_ok() => return None,
        Text::Raw(bytes) => bytes.len(),
    };
    (len > 0).then_some(len)
}

/// The number of bytes that a Huffman-coded string decodes to; `None` for what decoders must refuse. The code is canonical,
/// so the number of codes of each length tells where each code ends.
fn huffman_len(bytes: &[u8]) -> Option<usize> {
    let bits = bytes.iter().flat_map(|byte| (0..8).rev().map(move |at| u32::from(byte >> at & 1)));
    let mut symbols = 0;
    // The bits since the last symbol, and the first code of that length.
    let (mut code, mut first, mut length) = (0, 0, 0);
    for bit in bits {
        (code, first, length) = (code << 1 | bit, first << 1, length + 1);
        let codes = *HUFFMAN_CODES.get(length)?;
        if code < first + codes {
            symbols += 1;
            (code, first, length) = (0, 0, 0);
        } else {
            first += codes;
        }
    }
    // The rest of the last byte is filled with ones (RFC 7541 §5.2).
    (length < 8 && code + 1 == 1 << length).then_some(symbols)
}

/// The number of codes of RFC 7541 appendix B with each length in bits. EOS, the fourth of 30 bits, must not occur.
const HUFFMAN_CODES: [u32; 31] =
    [0, 0, 0, 0, 0, 10, 26, 32, 6, 0, 5, 3, 2, 6, 2, 3, 0, 0, 0, 3, 8, 13, 26, 29, 12, 4, 15, 19, 29, 0, 3];

/// Writes a string literal (RFC 7541 §5.2) of `len` bytes that is the name of a host.
fn put_host(out: &mut Vec<u8>, len: usize) {
    let mut left = len;
    if left < 127 {
        out.put_u8(left as u8);
    } else {
        out.put_u8(127);
        left -= 127;
        while left >= 128 {
            out.put_u8((left % 128) as u8 | 128);
            left /= 128;
        }
        out.put_u8(left as u8);
    }
    out.extend(b"localhost".iter().cycle().take(len));
}

enum Text<'a> {
    Huffman(&'a [u8]),
    Raw(&'a [u8]),
}

/// Reads a string literal (RFC 7541 §5.2).
fn string<'a>(bytes: &mut &'a [u8]) -> Option<Text<'a>> {
    let huffman = bytes.first()? & 0x80 != 0;
    let len = integer(bytes, 7)?;
    let (text, rest) = bytes.split_at_checked(len)?;
    *bytes = rest;
    Some(if huffman { Text::Huffman(text) } else { Text::Raw(text) })
}

/// Reads an integer in the last `bits` bits of a byte and those that follow (RFC 7541 §5.1).
fn integer(bytes: &mut &[u8], bits: u32) -> Option<usize> {
    let mut next = || {
        let (first, rest) = bytes.split_first()?;
        *bytes = rest;
        Some(usize::from(*first))
    };
    let mask = (1 << bits) - 1;
    let mut value = next()? & mask;
    if value < mask {
        return Some(value);
    }
    for shift in [0, 7, 14, 21] {
        let byte = next()?;
        value += (byte & 127) << shift;
        if byte < 128 {
            return Some(value);
        }
    }
    None
}

#[cfg(test)]
mod tests;
