//! The list against ssh-keygen, and against hostile bytes.

use std::{path::PathBuf, process::Command};

use rand::{RngExt, SeedableRng, rngs::StdRng};
use russh::keys::{Certificate, PublicKey};
use sha2::Digest;

use super::{
    Entry, Krl, KrlError, MAX_LIST, Revoked, blob,
    codec::{
        CERTIFICATES, CERTIFICATES_EXTENSION, EXTENSION, KEY_IDS, MAGIC, SERIAL_BITMAP, SERIAL_LIST,
        SERIAL_RANGE, SHA1, SHA256, SIGNATURE, put, put_section,
    },
};

pub(crate) struct TempDir(pub PathBuf);

impl TempDir {
    pub(crate) fn new() -> Self {
        let path = std::env::temp_dir().join(format!("proto-krl-{:016x}", rand::random::<u64>()));
        std::fs::create_dir(&path).unwrap();
        Self(path)
    }
}

impl Drop for TempDir {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

pub(crate) fn keygen(options: &[&str], files: &[&PathBuf]) -> String {
    let output = Command::new("ssh-keygen").args(options).args(files).output().unwrap();
    assert!(output.status.success(), "{options:?}: {}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).unwrap()
}

/// A CA and certificates by ssh-keygen.
struct World {
    dir: TempDir,
    ca: PublicKey,
}

impl World {
    fn new() -> Self {
        let dir = TempDir::new();
        for name in ["ca", "other"] {
            keygen(&["-q", "-t", "ed25519", "-N", "", "-C", name, "-f"], &[&dir.0.join(name)]);
        }
        let ca = PublicKey::read_openssh_file(dir.0.join("ca.pub")).unwrap();
        Self { dir, ca }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.0.join(name)
    }

    fn certificate(&self, name: &str, ca: &str, serial: u64, key_id: &str) -> Certificate {
        let key = self.path(name);
        keygen(&["-q", "-t", "ed25519", "-N", "", "-C", name, "-f"], &[&key]);
        let (ca, serial) = (self.path(ca), serial.to_string());
        let ca = ca.to_str().unwrap();
        keygen(
            &["-q", "-s", ca, "-I", key_id, "-n", "u", "-z", &serial],
            &[&self.path(&format!("{name}.pub"))],
        );
        Certificate::read_file(&self.path(&format!("{name}-cert.pub"))).unwrap()
    }

    /// What `ssh-keygen -k` makes of a specification.
    fn made(&self, specification: &str) -> Krl {
        std::fs::write(self.path("specification"), specification).unwrap();
        let (ca, krl) = (self.path("ca.pub"), self.path("krl"));
        let options = ["-q", "-k", "-z", "7", "-s", ca.to_str().unwrap(), "-f", krl.to_str().unwrap()];
        keygen(&options, &[&self.path("specification")]);
        Krl::decode(&std::fs::read(krl).unwrap()).unwrap()
    }

    /// Whether ssh-keygen finds a certificate in a list of ours.
    fn finds(&self, list: &Krl, name: &str) -> bool {
        std::fs::write(self.path("ours"), list.encode().unwrap()).unwrap();
        let mut query = Command::new("ssh-keygen");
        query.arg("-Q").arg("-f").arg(self.path("ours")).arg(self.path(&format!("{name}-cert.pub")));
        let output = query.output().unwrap();
        let text = String::from_utf8(output.stdout).unwrap();
        assert!(text.contains(": ok") || text.contains("REVOKED"), "{text}{:?}", output.stderr);
        assert_eq!(text.contains("REVOKED"), !output.status.success());
        text.contains("REVOKED")
    }
}

#[test]
fn what_ssh_keygen_makes_is_read_and_means_the_same() {
    let world = World::new();
    let a = world.certificate("a", "ca", 1000, "alice");
    let foreign = world.certificate("f", "other", 1000, "alice");
    let bare = world.certificate("z", "ca", 0, "zero");
    let (hash, own_key) = (keygen(&["-l", "-f"], &[&world.path("a.pub")]), world.path("a.pub"));
    let sha256 = hash.split_whitespace().nth(1).unwrap();
    let key = std::fs::read_to_string(own_key).unwrap();
    let even: String = (500..700).map(|i| format!("serial: {}\n", i * 2)).collect();
    for (specification, by) in [
        ("serial: 1000", Some(Revoked::Serial)),
        ("serial: 999\nserial: 1001", None),
        ("serial: 900-1000", Some(Revoked::Serial)),
        ("serial: 1-18446744073709551615", Some(Revoked::Serial)),
        (even.as_str(), Some(Revoked::Serial)),
        (even.replace("serial: 1000\n", "").as_str(), None),
        ("id: alice", Some(Revoked::KeyId)),
        ("id: alic", None),
        (format!("key: {key}").as_str(), Some(Revoked::Key)),
        (format!("sha1: {key}").as_str(), Some(Revoked::Key)),
        (format!("sha256: {key}").as_str(), Some(Revoked::Key)),
        (format!("hash: {sha256}").as_str(), Some(Revoked::Key)),
        (format!("key: {}", world.ca.to_openssh().unwrap()).as_str(), Some(Revoked::Authority)),
    ] {
        let list = world.made(specification);
        assert_eq!(list.version, 7);
        assert_eq!(list.revokes(&a), by, "{specification}");
        assert_eq!(world.finds(&list, "a"), by.is_some(), "{specification}");
        assert_eq!(Krl::decode(&list.encode().unwrap()).as_ref(), Ok(&list), "{specification}");
        if by != Some(Revoked::Key) {
            assert_eq!(list.revokes(&foreign), None, "{specification}");
        }
        assert!(!matches!(list.revokes(&bare), Some(Revoked::Serial)), "serial 0 is none");
    }
}

#[test]
fn a_list_with_a_bitmap_of_ssh_keygen_has_the_same_serials() {
    let world = World::new();
    let even: String = (1..3000).map(|i| format!("serial: {}\n", i * 2)).collect();
    let list = world.made(&even);
    let raw = std::fs::read(world.path("krl")).unwrap();
    assert!(raw.len() < 2000, "ssh-keygen wrote {} bytes, and so no bitmap", raw.len());
    let serials = &list.certificates[&blob(world.ca.key_data())].serials;
    for serial in 1..6001 {
        assert_eq!(serials.contains(serial), serial % 2 == 0 && serial < 6000, "{serial}");
    }
}

#[test]
fn ssh_keygen_finds_what_we_add_and_not_what_we_take_out() {
    let world = World::new();
    let a = world.certificate("a", "ca", u64::MAX, "alice");
    world.certificate("f", "other", u64::MAX, "alice");
    let key = blob(a.public_key());
    let sha1: [u8; 20] = sha1::Sha1::digest(&key).into();
    let sha256: [u8; 32] = sha2::Sha256::digest(&key).into();
    for entry in [
        Entry::Serials(u64::MAX, u64::MAX),
        Entry::Serials(5, u64::MAX),
        Entry::KeyId(b"alice".to_vec()),
        Entry::Key(key),
        Entry::Sha1(sha1),
        Entry::Sha256(sha256),
    ] {
        let mut list = Krl { version: 9, comment: b"test".to_vec(), ..Krl::default() };
        assert!(!world.finds(&list, "a"));
        assert!(list.add(&world.ca, entry.clone()).unwrap());
        assert!(!list.add(&world.ca, entry.clone()).unwrap(), "{entry:?} twice");
        assert!(list.revokes(&a).is_some() && world.finds(&list, "a"), "{entry:?}");
        assert!(!world.finds(&list, "f"), "{entry:?} of another CA");
        assert!(list.remove(&world.ca, &entry) && !list.remove(&world.ca, &entry));
        assert!(list.revokes(&a).is_none() && !world.finds(&list, "a"), "{entry:?} taken out");
    }
}

fn ca() -> PublicKey {
    let key = russh::keys::PrivateKey::random(&mut rand::rng(), russh::keys::Algorithm::Ed25519);
    key.unwrap().public_key().clone()
}

#[test]
fn ranges_stay_ranges_and_can_be_divided() {
    let (ca, mut list) = (ca(), Krl::default());
    let serials = |list: &Krl| list.entries().collect::<Vec<_>>();
    assert!(list.add(&ca, Entry::Serials(10, u64::MAX)).unwrap());
    assert!(!list.add(&ca, Entry::Serials(11, 12)).unwrap());
    assert!(list.add(&ca, Entry::Serials(5, 9)).unwrap());
    assert_eq!(serials(&list), [Entry::Serials(5, u64::MAX)]);
    assert!(list.remove(&ca, &Entry::Serials(7, 8)));
    assert_eq!(serials(&list), [Entry::Serials(5, 6), Entry::Serials(9, u64::MAX)]);
    assert!(list.remove(&ca, &Entry::Serials(1, u64::MAX)));
    assert_eq!((serials(&list), list), (vec![], Krl::default()));
    let mut list = Krl::default();
    for (first, last) in [(0, 1), (0, 0), (2, 1)] {
        assert_eq!(list.add(&ca, Entry::Serials(first, last)), Err(KrlError::Serial));
    }
    assert_eq!(list.add(&ca, Entry::KeyId(b"a\0b".to_vec())), Err(KrlError::KeyId));
}

#[test]
fn what_is_of_other_cas_is_not_merged() {
    let (ours, theirs) = (ca(), ca());
    let (mut list, mut other) = (Krl::default(), Krl::default());
    other.add(&ours, Entry::Serials(3, 3)).unwrap();
    other.add(&theirs, Entry::Serials(4, 4)).unwrap();
    other.certificates.entry(Vec::new()).or_default().serials.extend([(5, 5)]).unwrap();
    assert_eq!(list.merge(&ours, other), Ok(1));
    let got: Vec<_> = list.entries().collect();
    assert_eq!(got, [Entry::Serials(3, 3), Entry::Serials(5, 5)]);
}

fn with(sections: &[(u8, &[u8])]) -> Vec<u8> {
    let mut bytes = Krl::default().encode().unwrap();
    for (kind, contents) in sections {
        put_section(&mut bytes, *kind, contents);
    }
    bytes
}

fn of_any_ca(kind: u8, contents: &[u8]) -> Vec<u8> {
    let mut section = vec![0; 8];
    put_section(&mut section, kind, contents);
    with(&[(CERTIFICATES, &section)])
}

#[test]
fn what_can_not_be_understood_is_refused() {
    let string = |bytes: &[u8]| {
        let mut out = Vec::new();
        put(&mut out, bytes);
        out
    };
    let critical = [string(b"new"), vec![1], string(b"")].concat();
    let optional = [string(b"new"), vec![0], string(b"")].concat();
    let range = |a: u64, b: u64| [a.to_be_bytes(), b.to_be_bytes()].concat();
    let beyond = [&u64::MAX.to_be_bytes()[..], &string(&[0xff])].concat();
    let from_zero = [&0u64.to_be_bytes()[..], &string(&[1])].concat();
    for (bytes, want) in [
        (b"SSHKRL".to_vec(), KrlError::Magic),
        (vec![], KrlError::Magic),
        (vec![0; MAX_LIST + 1], KrlError::TooLarge(MAX_LIST + 1)),
        ([&MAGIC[..], &2u32.to_be_bytes()].concat(), KrlError::Format(2)),
        (with(&[(9, b"")]), KrlError::Section(9)),
        (with(&[(SIGNATURE, b"")]), KrlError::Signature),
        (with(&[(EXTENSION, &critical)]), KrlError::Extension("new".into())),
        (of_any_ca(CERTIFICATES_EXTENSION, &critical), KrlError::Extension("new".into())),
        (of_any_ca(0x24, b""), KrlError::Section(0x24)),
        (of_any_ca(SERIAL_LIST, &[0; 8]), KrlError::Serial),
        (of_any_ca(SERIAL_LIST, &[1; 9]), KrlError::Truncated),
        (of_any_ca(SERIAL_RANGE, &range(2, 1)), KrlError::Serial),
        (of_any_ca(SERIAL_RANGE, &[range(1, 2), vec![0]].concat()), KrlError::Truncated),
        (of_any_ca(SERIAL_BITMAP, &beyond), KrlError::Serial),
        (of_any_ca(SERIAL_BITMAP, &from_zero), KrlError::Serial),
        (of_any_ca(KEY_IDS, &string(b"a\0")), KrlError::KeyId),
        (with(&[(SHA1, &string(&[0; 21]))]), KrlError::Truncated),
        (with(&[(SHA256, &string(&[0; 31]))]), KrlError::Truncated),
    ] {
        assert_eq!(Krl::decode(&bytes), Err(want), "{:?}", &bytes[..bytes.len().min(80)]);
    }
    assert_eq!(Krl::decode(&with(&[(EXTENSION, &optional)])), Ok(Krl::default()));
}

#[test]
fn a_hostile_bitmap_costs_no_more_than_its_bound() {
    // Every other bit of a mebibyte would be four million ranges.
    let bits = vec![0x55; MAX_LIST - 200];
    let mut bitmap = 1u64.to_be_bytes().to_vec();
    put(&mut bitmap, &bits);
    assert_eq!(Krl::decode(&of_any_ca(SERIAL_BITMAP, &bitmap)), Err(KrlError::Ranges));
    let mut full = 1u64.to_be_bytes().to_vec();
    put(&mut full, &vec![0xff; MAX_LIST - 200]);
    let list = Krl::decode(&of_any_ca(SERIAL_BITMAP, &full)).unwrap();
    assert_eq!(list.entries().collect::<Vec<_>>(), [Entry::Serials(1, (MAX_LIST as u64 - 200) * 8)]);
}

#[test]
fn no_bytes_make_it_panic() {
    let ca = ca();
    let mut list = Krl { version: 3, comment: b"c".to_vec(), ..Krl::default() };
    for entry in [
        Entry::Serials(3, 3),
        Entry::Serials(100, 200),
        Entry::KeyId(b"alice".to_vec()),
        Entry::Key(blob(ca.key_data())),
        Entry::Sha1([1; 20]),
        Entry::Sha256([2; 32]),
    ] {
        list.add(&ca, entry).unwrap();
    }
    let mut bitmap = 9u64.to_be_bytes().to_vec();
    put(&mut bitmap, &[0x5a; 40]);
    let samples = [list.encode().unwrap(), of_any_ca(SERIAL_BITMAP, &bitmap)];
    for sample in &samples {
        for len in 0..sample.len() {
            let _ = Krl::decode(&sample[..len]);
        }
    }
    let mut rng = StdRng::seed_from_u64(11);
    for _ in 0..50_000 {
        let mut bytes = samples[rng.random_range(0..samples.len())].clone();
        for _ in 0..rng.random_range(1..6) {
            let at = rng.random_range(0..bytes.len());
            bytes[at] = if rng.random() { rng.random() } else { 0xff };
        }
        if let Ok(list) = Krl::decode(&bytes) {
            assert_eq!(Krl::decode(&list.encode().unwrap()), Ok(list));
        }
    }
}
