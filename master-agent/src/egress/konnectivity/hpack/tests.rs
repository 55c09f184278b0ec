//! HPACK beside another implementation of it.

use loona_hpack::huffman::HuffmanDecoder;
use rand::{Rng, RngExt, SeedableRng, rngs::StdRng};

use super::*;

/// Another implementation is the judge of which strings decode.
#[test]
fn huffman_coded_strings_have_the_length_that_a_decoder_gives_them() {
    let mut random = StdRng::seed_from_u64(7541);
    let mut decoder = HuffmanDecoder::new();
    let mut decoded = |bytes: &[u8]| decoder.decode(bytes).ok().map(|text| text.len());
    let (mut good, mut bad) = (0, 0);
    for round in 0..4000 {
        let mut bytes = vec![0; round % 40];
        random.fill_bytes(&mut bytes);
        if round % 3 == 0 {
            // Long codes begin with ones.
            bytes.iter_mut().for_each(|byte| *byte |= 0xfc);
        }
        let expected = decoded(&bytes);
        assert_eq!(huffman_len(&bytes), expected, "{bytes:x?}");
        *(if expected.is_some() { &mut good } else { &mut bad }) += 1;
    }
    assert!(good > 300 && bad > 300, "{good} {bad}");
    for byte in 0..=u8::MAX {
        for next in 0..=u8::MAX {
            assert_eq!(huffman_len(&[byte, next]), decoded(&[byte, next]), "{byte:x} {next:x}");
        }
    }
    // Nothing, only padding, a byte of padding, padding with zeros, EOS, EOS after a symbol.
    for (bytes, expected) in [
        (&[][..], Some(0)),
        (&[0xff], None),
        (&[0x07], Some(1)),
        (&[0x00], None),
        (&[0x07, 0xff], None),
        (&[0xff, 0xff, 0xff, 0xff], None),
        (&[0x07, 0xff, 0xff, 0xff, 0xff], None),
    ] {
        assert_eq!(huffman_len(bytes), expected, "{bytes:x?}");
    }
}

/// A client that refers to its dynamic table finds the same entries on the server, also after evictions.
#[test]
fn the_dynamic_tables_stay_aligned() {
    let (mut client, mut server) = (loona_hpack::Decoder::new(), loona_hpack::Decoder::new());
    let mut random = StdRng::seed_from_u64(1);
    for round in 0..500 {
        let mut fields = vec![0x83, 0x41];
        let authority = format!("%2F{}", "x".repeat(random.random_range(0..300)));
        put_len(&mut fields, authority.len());
        fields.extend_from_slice(authority.as_bytes());
        // A new entry, and references to the last few.
        fields.extend_from_slice(&[0x40, 1, b'k', 2]);
        fields.extend_from_slice(format!("{:02}", round % 100).as_bytes());
        fields.extend_from_slice(&[0x80 | 62, 0x80 | 63, 0x80 | (62 + round.min(9) as u8)]);
        let replaced = replace_authority(&fields).unwrap();
        let (sent, seen) = (client.decode(&fields).unwrap(), server.decode(&replaced).unwrap());
        assert_eq!(sent.len(), seen.len());
        for ((name, sent), (same, seen)) in sent.iter().zip(&seen) {
            assert_eq!(name, same);
            if name == b":authority" {
                assert!(seen.len() == sent.len() && Authority::try_from(seen.as_slice()).is_ok());
            } else {
                assert_eq!(sent, seen);
            }
        }
    }
}

fn put_len(out: &mut Vec<u8>, len: usize) {
    if len < 127 {
        out.push(len as u8);
    } else {
        out.extend_from_slice(&[127, ((len - 127) as u8 % 128) | 128, ((len - 127) / 128) as u8]);
    }
}
