//! What both agents offer in an SSH handshake. Post-quantum key exchange and AEAD ciphers come first, and nothing is weaker
//! than OpenSSH's own defaults.

use std::{borrow::Cow, time::Duration};

use russh::{
    Limits, Preferred, cipher, compression, kex,
    keys::{Algorithm, EcdsaCurve},
    mac,
};

/// SSH's window for a tunnel's channel, in bytes. The multiplexer's windows bound what is on the way, so this one must
/// only be large enough never to close. It also bounds what a peer can send during a key exchange, when nothing is
/// answered.
pub const TUNNEL_WINDOW: u32 = 64 << 20;
/// The window of an ordinary channel in bytes, which is OpenSSH's.
pub const CHANNEL_WINDOW: u32 = 2 * 1024 * 1024;
/// The largest packet in bytes, which has room for a full DATA frame.
pub const MAX_PACKET: u32 = 65535;

const KEY_EXCHANGES: &[kex::Name] = &[
    kex::MLKEM768X25519_SHA256,
    kex::CURVE25519,
    kex::CURVE25519_PRE_RFC_8731,
    // For an sshd in FIPS mode. Finite-field groups are left out: one exchange with group 18 takes a good part of a second
    // of CPU time before the peer has authenticated.
    kex::ECDH_SHA2_NISTP256,
    kex::ECDH_SHA2_NISTP384,
    kex::EXTENSION_SUPPORT_AS_CLIENT,
    kex::EXTENSION_SUPPORT_AS_SERVER,
    kex::EXTENSION_OPENSSH_STRICT_KEX_AS_CLIENT,
    kex::EXTENSION_OPENSSH_STRICT_KEX_AS_SERVER,
];

const KEYS: &[Algorithm] = &[
    Algorithm::Ed25519,
    Algorithm::Ecdsa { curve: EcdsaCurve::NistP256 },
    Algorithm::Ecdsa { curve: EcdsaCurve::NistP384 },
    Algorithm::Ecdsa { curve: EcdsaCurve::NistP521 },
];

const CIPHERS: &[cipher::Name] = &[
    cipher::AES_256_GCM,
    cipher::AES_128_GCM,
    cipher::CHACHA20_POLY1305,
    cipher::AES_256_CTR,
    cipher::AES_192_CTR,
    cipher::AES_128_CTR,
];

const MACS: &[mac::Name] = &[mac::HMAC_SHA256_ETM, mac::HMAC_SHA512_ETM, mac::HMAC_SHA256, mac::HMAC_SHA512];

/// The algorithms offered, most preferred first.
pub fn preferred() -> Preferred {
    Preferred {
        kex: Cow::Borrowed(KEY_EXCHANGES),
        key: Cow::Borrowed(KEYS),
        host_key_certificates: Cow::Borrowed(KEYS),
        cipher: Cow::Borrowed(CIPHERS),
        mac: Cow::Borrowed(MACS),
        compression: Cow::Borrowed(&[compression::NONE]),
    }
}

/// When the master exchanges keys again: after `time`, or after 32 GiB. OpenSSH allows AES-GCM 2^32 blocks, which are
/// 64 GiB.
pub fn master_limits(time: Duration) -> Limits {
    Limits { rekey_write_limit: 32 << 30, rekey_read_limit: 32 << 30, rekey_time_limit: time }
}

/// When the node exchanges keys again: later than the master, so that it is always the master who begins. What is on its
/// way to the side that begins has to fit into that side's window, and the node's is small.
pub fn node_limits() -> Limits {
    Limits {
        rekey_write_limit: 48 << 30,
        rekey_read_limit: 48 << 30,
        rekey_time_limit: Duration::from_secs(26 * 3600),
    }
}
