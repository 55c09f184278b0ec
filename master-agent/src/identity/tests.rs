//! Tables over real keys and certificates. `ssh-keygen` has the last word about what we sign.

use std::{
    collections::HashMap,
    os::unix::fs::PermissionsExt,
    path::{Path, PathBuf},
    process::Command,
    time::{Duration, SystemTime},
};

use proto::{NodeName, Target};
use russh::keys::{
    Algorithm, Certificate, HashAlg, PrivateKey, PublicKey, PublicKeyOrCertificate,
    ssh_key::{
        LineEnding,
        certificate::{Builder, CertType},
    },
};

use super::known_hosts::KnownHosts;
use super::*;

/// A directory that goes with the test.
pub(crate) struct TempDir(pub PathBuf);

impl TempDir {
    pub(crate) fn new() -> Self {
        let path = std::env::temp_dir().join(format!("master-agent-test-{:016x}", rand::random::<u64>()));
        std::fs::create_dir(&path).unwrap();
        Self(path)
    }
}

impl Drop for TempDir {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

pub(crate) fn new_key() -> PrivateKey {
    PrivateKey::random(&mut rand::rng(), Algorithm::Ed25519).unwrap()
}

const HOUR: Duration = Duration::from_secs(3600);

fn now() -> SystemTime {
    SystemTime::UNIX_EPOCH + Duration::from_secs(1_800_000_000)
}

fn name(s: &str) -> NodeName {
    s.parse().unwrap()
}

fn mode(path: &Path) -> u32 {
    std::fs::metadata(path).unwrap().permissions().mode() & 0o777
}

/// A certificate of any kind, as another CA or a careless one may make it.
struct Forge<'a> {
    ca: &'a PrivateKey,
    key: &'a PublicKey,
    kind: CertType,
    id: &'a str,
    principals: &'a [&'a str],
    option: Option<&'a str>,
}

impl Forge<'_> {
    fn make(&self) -> PublicKeyOrCertificate {
        let (from, to) = (1_800_000_000 - 60, 1_800_000_000 + 3600);
        let mut builder =
            Builder::new_with_random_nonce(&mut rand::rng(), self.key.key_data().clone(), from, to).unwrap();
        builder.cert_type(self.kind).unwrap().key_id(self.id).unwrap();
        if self.principals.is_empty() {
            builder.all_principals_valid().unwrap();
        }
        for principal in self.principals {
            builder.valid_principal(*principal).unwrap();
        }
        if let Some(option) = self.option {
            builder.critical_option(option, "x").unwrap();
        }
        builder.sign(self.ca).unwrap().into()
    }
}

fn tampered(certificate: &Certificate, from: &str, to: &str) -> PublicKeyOrCertificate {
    assert_eq!(from.len(), to.len());
    let mut bytes = certificate.to_bytes().unwrap();
    let at = bytes.windows(from.len()).position(|w| w == from.as_bytes()).unwrap();
    bytes[at..at + to.len()].copy_from_slice(to.as_bytes());
    Certificate::from_bytes(&bytes).unwrap().into()
}

fn plain(key: &PrivateKey) -> PublicKeyOrCertificate {
    key.public_key().clone().into()
}

#[test]
fn a_host_key_is_accepted_only_as_the_node_that_its_certificate_names() {
    let dir = TempDir::new();
    let authorities = Authorities::load_or_create(&dir.0).unwrap();
    let host_ca = PrivateKey::read_openssh_file(dir.0.join("host_ca")).unwrap();
    let (key, other_ca) = (new_key(), new_key());
    let sign = |node: &str, at: SystemTime| {
        authorities
            .sign_host(key.public_key(), &name(node), &["10.0.0.5".parse().unwrap()], at, HOUR)
            .unwrap()
    };
    let forge = Forge {
        ca: &host_ca,
        key: key.public_key(),
        kind: CertType::Host,
        id: "node:n1",
        principals: &["n1"],
        option: None,
    };
    let user = authorities.issue_user(now(), HOUR).unwrap().certificate.unwrap();

    // What is shown, what a dialled n1 makes of it, and what a call home does.
    type Row<'a> = (&'a str, PublicKeyOrCertificate, Result<(), &'a str>, Result<&'a str, &'a str>);
    let table: Vec<Row<'_>> = vec![
        ("right", sign("n1", now()).into(), Ok(()), Ok("n1")),
        ("another node's", sign("n2", now()).into(), Err("wrong_principal"), Ok("n2")),
        ("no certificate", plain(&key), Err("unknown_key"), Err("unknown_key")),
        ("expired", sign("n1", now() - 2 * HOUR).into(), Err("expired"), Err("expired")),
        ("expires this second", sign("n1", now() - HOUR).into(), Err("expired"), Err("expired")),
        ("last second", sign("n1", now() - HOUR + Duration::from_secs(1)).into(), Ok(()), Ok("n1")),
        ("clock five minutes behind", sign("n1", now() + Duration::from_secs(300)).into(), Ok(()), Ok("n1")),
        (
            "not yet",
            sign("n1", now() + Duration::from_secs(301)).into(),
            Err("not_yet_valid"),
            Err("not_yet_valid"),
        ),
        ("other CA", Forge { ca: &other_ca, ..forge }.make(), Err("wrong_ca"), Err("wrong_ca")),
        ("user CA", user.into(), Err("wrong_ca"), Err("wrong_ca")),
        (
            "user type of the host CA",
            Forge { kind: CertType::User, ..forge }.make(),
            Err("user_certificate"),
            Err("user_certificate"),
        ),
        (
            "critical option",
            Forge { option: Some("source-address"), ..forge }.make(),
            Err("critical_option"),
            Err("critical_option"),
        ),
        (
            "every principal",
            Forge { principals: &[], ..forge }.make(),
            Err("wrong_principal"),
            Err("wrong_principal"),
        ),
        (
            "only an address",
            Forge { principals: &["10.0.0.5"], ..forge }.make(),
            Err("wrong_principal"),
            Err("wrong_principal"),
        ),
        ("id is not a principal", Forge { id: "node:n2", ..forge }.make(), Ok(()), Err("wrong_principal")),
        ("id without a node", Forge { id: "n1", ..forge }.make(), Ok(()), Err("wrong_principal")),
        (
            "renamed",
            tampered(&sign("n2", now()), "node:n2", "node:n1"),
            Err("bad_signature"),
            Err("bad_signature"),
        ),
        (
            "another CA's name put in",
            tampered(&sign("n3", now()), "10.0.0.5", "10.0.0.9"),
            Err("bad_signature"),
            Err("bad_signature"),
        ),
    ];
    let n1 = name("n1");
    let dialled: Target = "10.0.0.5:22".parse().unwrap();
    for (what, shown, when_dialled, when_called) in table {
        let expected = Expected::Dialled { name: &n1, dialled: &dialled, proof: Proof::HostCa };
        let got = verify_host(&shown, &expected, authorities.host_ca(), now());
        if let Ok(host) = &got {
            assert_eq!((&host.node, host.key.key_data()), (&n1, key.public_key().key_data()), "{what}");
            assert!(host.not_after.is_some(), "{what}");
        }
        assert_eq!(got.as_ref().map(|_| ()).map_err(HostKeyError::kind), when_dialled, "{what}, dialled");
        let pins = HashMap::new();
        let got = verify_host(&shown, &Expected::CallHome { pins: &pins }, authorities.host_ca(), now());
        assert_eq!(
            got.as_ref().map(|h| h.node.as_str()).map_err(HostKeyError::kind),
            when_called,
            "{what}, call home"
        );
    }
}

#[test]
fn pins_and_the_first_use_decide_about_the_key_alone() {
    let dir = TempDir::new();
    let authorities = Authorities::load_or_create(&dir.0).unwrap();
    let (key, other) = (new_key(), new_key());
    let n1 = name("n1");
    let dialled: Target = "10.0.0.5:22".parse().unwrap();
    let pin = fingerprint(key.public_key());
    let check = |shown: &PrivateKey, proof: Proof<'_>| {
        let expected = Expected::Dialled { name: &n1, dialled: &dialled, proof };
        verify_host(&plain(shown), &expected, authorities.host_ca(), now()).map(|_| ()).map_err(|e| e.kind())
    };
    let pins = [pin.clone()];
    let pinned = Proof::Pins(&pins);
    assert_eq!(check(&key, pinned), Ok(()));
    assert_eq!(check(&other, pinned), Err("not_pinned"));
    assert_eq!(check(&other, Proof::FirstUse(None)), Ok(()));
    assert_eq!(check(&key, Proof::FirstUse(Some(&pin))), Ok(()));
    assert_eq!(check(&other, Proof::FirstUse(Some(&pin))), Err("key_changed"));

    let nodes = HashMap::from([(pin.clone(), n1.clone())]);
    let call = |shown| {
        let got =
            verify_host(&plain(shown), &Expected::CallHome { pins: &nodes }, authorities.host_ca(), now());
        got.map(|h| h.node).map_err(|e| e.kind())
    };
    assert_eq!(call(&key), Ok(n1.clone()));
    assert_eq!(call(&other), Err("unknown_key"));
    // A certificate does not stand in for the pinned key.
    let certified = authorities.sign_host(other.public_key(), &n1, &[], now(), HOUR).unwrap().into();
    let expected = Expected::Dialled { name: &n1, dialled: &dialled, proof: pinned };
    assert_eq!(
        verify_host(&certified, &expected, authorities.host_ca(), now()).unwrap_err().kind(),
        "not_pinned"
    );
}

#[test]
fn known_hosts_is_read_as_openssh_reads_it() {
    let dir = TempDir::new();
    let authorities = Authorities::load_or_create(&dir.0.join("state")).unwrap();
    let (key, other, ca) = (new_key(), new_key(), new_key());
    let file = dir.0.join("known_hosts");
    let text = |key: &PrivateKey| key.public_key().to_openssh().unwrap();
    let (key_text, other_text, ca_text) = (text(&key), text(&other), text(&ca));
    let by_ca = |principals| {
        Forge { ca: &ca, key: key.public_key(), kind: CertType::Host, id: "h", principals, option: None }
            .make()
    };
    let hashed = {
        std::fs::write(&file, format!("n1.example {key_text}\n")).unwrap();
        assert!(Command::new("ssh-keygen").arg("-H").arg("-f").arg(&file).output().unwrap().status.success());
        std::fs::read_to_string(&file).unwrap()
    };
    assert!(hashed.starts_with("|1|"));
    let ca_line = |patterns: &str| format!("@cert-authority {patterns} {ca_text}\n");

    let table: Vec<(String, &str, PublicKeyOrCertificate, Result<(), &str>)> = vec![
        (String::new(), "n1.example:22", plain(&key), Err("not_in_known_hosts")),
        (format!("n1.example {key_text}\n"), "n1.example:22", plain(&key), Ok(())),
        (format!("n1.example,10.0.0.5 {key_text}\n"), "10.0.0.5:22", plain(&key), Ok(())),
        (format!("n1.example {key_text}\n"), "n1.example:2222", plain(&key), Err("not_in_known_hosts")),
        (format!("[n1.example]:2222 {key_text}\n"), "n1.example:2222", plain(&key), Ok(())),
        (format!("n2.example {key_text}\n"), "n1.example:22", plain(&key), Err("not_in_known_hosts")),
        (format!("n1.example {other_text}\n"), "n1.example:22", plain(&key), Err("not_in_known_hosts")),
        (format!("#n1.example {key_text}\n"), "n1.example:22", plain(&key), Err("not_in_known_hosts")),
        (
            format!(" #n0.example,n1.example {key_text}\n"),
            "n1.example:22",
            plain(&key),
            Err("not_in_known_hosts"),
        ),
        (hashed.clone(), "n1.example:22", plain(&key), Ok(())),
        (hashed.clone(), "n1.example:2222", plain(&key), Err("not_in_known_hosts")),
        (hashed, "n1.example:22", plain(&other), Err("not_in_known_hosts")),
        // A line that can't be read does not hide the next one, and patterns are for CAs.
        (format!("n1.example ssh-none x\nn1.example {key_text}\n"), "n1.example:22", plain(&key), Ok(())),
        (format!("* {key_text}\n"), "n1.example:22", plain(&key), Err("not_in_known_hosts")),
        // A CA's key is good for signing, not for a host; a host's key not for signing.
        (ca_line("*"), "n1.example:22", plain(&ca), Err("not_in_known_hosts")),
        (
            format!("n1.example {ca_text}\n"),
            "n1.example:22",
            by_ca(&["n1.example"]),
            Err("not_in_known_hosts"),
        ),
        (ca_line("*.example"), "n1.example:22", by_ca(&["n1.example"]), Ok(())),
        (ca_line("n?.example"), "n1.example:22", by_ca(&["n1.example"]), Ok(())),
        (ca_line("*.EXAMPLE"), "n1.example:22", by_ca(&["n1.example"]), Ok(())),
        (
            ca_line("*.example,!n?.example"),
            "n1.example:22",
            by_ca(&["n1.example"]),
            Err("not_in_known_hosts"),
        ),
        (ca_line("*.other"), "n1.example:22", by_ca(&["n1.example"]), Err("not_in_known_hosts")),
        (ca_line("*.example"), "n1.example:22", by_ca(&["n2.example"]), Err("not_in_known_hosts")),
        (ca_line("*.example"), "n1.example:22", by_ca(&[]), Err("not_in_known_hosts")),
        (ca_line("[*.example]:2222"), "n1.example:2222", by_ca(&["n1.example"]), Ok(())),
        (ca_line("*.example").replace(' ', "\t"), "n1.example:22", by_ca(&["n1.example"]), Ok(())),
        // Revoked is revoked, however the line is spaced.
        (
            format!("n1.example {key_text}\n@revoked n1.example {key_text}\n"),
            "n1.example:22",
            plain(&key),
            Err("revoked"),
        ),
        (
            format!("n1.example {key_text}\n@revoked\t*\t{}\n", key_text.replace(' ', "\t")),
            "n1.example:22",
            plain(&key),
            Err("revoked"),
        ),
        (
            format!("n1.example {key_text}\n@revoked  * {key_text}\n"),
            "n1.example:22",
            plain(&key),
            Err("revoked"),
        ),
        (
            format!("{}@revoked * {ca_text}\n", ca_line("*")),
            "n1.example:22",
            by_ca(&["n1.example"]),
            Err("revoked"),
        ),
    ];
    let n1 = name("n1");
    for (text, dialled, shown, want) in table {
        std::fs::write(&file, &text).unwrap();
        let dialled: Target = dialled.parse().unwrap();
        let known = KnownHosts::read(&file).unwrap();
        let proof = Proof::KnownHosts { file: &file, known: &known };
        let expected = Expected::Dialled { name: &n1, dialled: &dialled, proof };
        let got = verify_host(&shown, &expected, authorities.host_ca(), now());
        assert_eq!(got.map(|_| ()).map_err(|e| e.kind()), want, "{dialled} with\n{text}");
    }
    std::fs::remove_file(&file).unwrap();
    assert!(KnownHosts::read(&file).is_err());
}

#[test]
fn the_authorities_keys_are_made_once_and_only_for_their_owner() {
    let dir = TempDir::new();
    let state = dir.0.join("a/b");
    let pins: Vec<String> = std::thread::scope(|scope| {
        let tasks: Vec<_> = (0..8)
            .map(|_| scope.spawn(|| Authorities::load_or_create(&state).unwrap().user_ca_pin()))
            .collect();
        tasks.into_iter().map(|t| t.join().unwrap()).collect()
    });
    assert!(pins.iter().all(|pin| *pin == pins[0]), "{pins:?}");
    assert_eq!(mode(&state), 0o700);
    for file in ["host_ca", "user_ca"] {
        assert_eq!(mode(&state.join(file)), 0o600);
        let shown =
            Command::new("ssh-keygen").arg("-l").arg("-f").arg(state.join(format!("{file}.pub"))).output();
        let shown = String::from_utf8(shown.unwrap().stdout).unwrap();
        let key = PrivateKey::read_openssh_file(state.join(file)).unwrap();
        assert!(shown.contains(&key.fingerprint(HashAlg::Sha256).to_string()), "{shown}");
    }
    assert_eq!(std::fs::read_dir(&state).unwrap().count(), 4, "no temporary file is left");

    // A key that was put there later has its own public half beside it.
    let other = new_key().to_openssh(LineEnding::LF).unwrap();
    proto_config::secret_file::replace(&state.join("host_ca"), other.as_bytes()).unwrap();
    let restored = Authorities::load_or_create(&state).unwrap();
    let public = std::fs::read_to_string(state.join("host_ca.pub")).unwrap();
    assert_eq!(PublicKey::from_openssh(public.trim()).unwrap().key_data(), restored.host_ca().key_data());

    std::fs::set_permissions(state.join("host_ca"), std::fs::Permissions::from_mode(0o640)).unwrap();
    let error = format!("{:#}", Authorities::load_or_create(&state).unwrap_err());
    assert!(error.contains(&format!("chmod 600 {}", state.join("host_ca").display())), "{error}");
}

#[test]
fn ssh_keygen_reads_what_we_sign() {
    let dir = TempDir::new();
    let authorities = Authorities::load_or_create(&dir.0).unwrap();
    let list = |certificate: &Certificate| {
        let path = dir.0.join("x-cert.pub");
        std::fs::write(&path, certificate.to_openssh().unwrap()).unwrap();
        let output =
            Command::new("ssh-keygen").env("TZ", "UTC").arg("-L").arg("-f").arg(&path).output().unwrap();
        assert!(output.status.success());
        String::from_utf8(output.stdout).unwrap().split_whitespace().collect::<Vec<_>>().join(" ")
    };
    let key = new_key();
    let addresses = ["10.0.0.5".parse().unwrap(), "fd00::5".parse().unwrap()];
    let host = list(&authorities.sign_host(key.public_key(), &name("n1"), &addresses, now(), HOUR).unwrap());
    for part in [
        "ssh-ed25519-cert-v01@openssh.com host certificate",
        "Key ID: \"node:n1\"",
        "Valid: from 2027-01-15T07:55:00 to 2027-01-15T09:00:00",
        "Principals: n1 10.0.0.5 fd00::5 Critical Options: (none) Extensions: (none)",
        &authorities.host_ca().fingerprint(HashAlg::Sha256).to_string(),
    ] {
        assert!(host.contains(part), "{part} in {host}");
    }
    let user = list(&authorities.issue_user(now(), HOUR).unwrap().certificate.unwrap());
    for part in [
        "ssh-ed25519-cert-v01@openssh.com user certificate",
        "Principals: master-agent Critical Options: (none) Extensions: permit-port-forwarding",
        &authorities.user_ca_pin(),
    ] {
        assert!(user.contains(part), "{part} in {user}");
    }
    let alice = authorities.sign_user(key.public_key(), &["alice".to_owned()], "alice", now(), HOUR).unwrap();
    assert!(
        list(&alice)
            .contains("Principals: alice Critical Options: (none) Extensions: permit-port-forwarding")
    );
}

#[test]
fn nobody_is_certified_as_a_master_or_as_everybody() {
    let dir = TempDir::new();
    let authorities = Authorities::load_or_create(&dir.0).unwrap();
    let key = new_key();
    for principals in [&[][..], &["master-agent"], &["alice", "master-agent"], &[""], &["alice,root"]] {
        let principals: Vec<String> = principals.iter().map(|p| (*p).to_owned()).collect();
        let signed = authorities.sign_user(key.public_key(), &principals, "x", now(), HOUR);
        assert!(signed.is_err(), "{principals:?}");
    }
}

#[test]
fn absurd_lifetimes_are_cut_and_never_panic() {
    let dir = TempDir::new();
    let authorities = Authorities::load_or_create(&dir.0).unwrap();
    let key = new_key();
    let certificate =
        authorities.sign_host(key.public_key(), &name("n1"), &[], now(), Duration::MAX).unwrap();
    assert_eq!(certificate.valid_before(), 253_402_300_799);
    let early = SystemTime::UNIX_EPOCH + Duration::from_secs(1);
    assert_eq!(authorities.issue_user(early, HOUR).unwrap().certificate.unwrap().valid_after(), 0);
}

#[test]
fn debug_shows_no_key() {
    let dir = TempDir::new();
    let authorities = Authorities::load_or_create(&dir.0).unwrap();
    let user = authorities.issue_user(now(), HOUR).unwrap();
    let shown = format!("{authorities:?} {user:?}");
    for key in [&PrivateKey::read_openssh_file(dir.0.join("user_ca")).unwrap(), &user.key] {
        let secret = key.key_data().ed25519().unwrap().private.to_bytes();
        let hex: String = secret.iter().map(|b| format!("{b:02x}")).collect();
        let list = secret.iter().map(u8::to_string).collect::<Vec<_>>().join(", ");
        let pem = key.to_openssh(LineEnding::LF).unwrap();
        for form in [hex.as_str(), list.as_str(), pem.lines().nth(3).unwrap()] {
            assert!(!shown.to_lowercase().contains(&form.to_lowercase()));
        }
    }
}
