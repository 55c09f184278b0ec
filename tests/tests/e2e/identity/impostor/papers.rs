//! The identities that impostors present in the place of nodes and of masters.

use tests::{cluster::Cluster, load::completes, openssh, rogue::Identity};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpListener, TcpStream},
};

use super::{place, second_agent};

/// How an impostor came by its key and certificate.
#[derive(Clone, Copy)]
pub(super) enum Papers<'a> {
    /// A key that nobody certified.
    None,
    /// Certified by this CA, with these arguments of ssh-keygen.
    Ca(&'a str, &'a [&'a str]),
}

/// Makes them. A CA is a file of the master's state directory, or one that is made here.
pub(super) fn papers(cluster: &Cluster, name: &str, papers: Papers<'_>) -> Identity {
    let file = place(cluster, name).join("host_key");
    match papers {
        Papers::None => Identity::new(&file).unwrap(),
        Papers::Ca(ca, args) => {
            let mut path = cluster.path().join("master").join(ca);
            if !path.exists() {
                path = cluster.path().join(ca);
                if !path.exists() {
                    openssh::keygen(&path).unwrap();
                }
            }
            Identity::certified(&file, &path, args).unwrap()
        }
    }
}

pub(super) const VALID: [&str; 2] = ["-V", "-1h:+1d"];

/// An impostor that the master is told to dial.
pub(super) struct Dialled {
    pub(super) name: &'static str,
    /// The metric's reason, and what the log says.
    pub(super) reason: &'static str,
    pub(super) says: &'static str,
    /// `host_keys:` in the inventory, but for what is in a file.
    pub(super) host_keys: String,
    pub(super) identity: Identity,
}

pub(super) fn dialled_impostors(cluster: &Cluster) -> Vec<Dialled> {
    let principal = |name: &'static str| ["-h", "-I", "impostor", "-n", name];
    let one = |name, reason, says, given: Papers<'_>| Dialled {
        name,
        reason,
        says,
        host_keys: String::new(),
        identity: papers(cluster, name, given),
    };
    let ca = |args: &[&'static str], validity: [&'static str; 2]| [args, &validity].concat();
    let key = |identity: &Identity| identity.key.public_key().to_openssh().unwrap();
    let mut all = vec![
        one("uncertified", "unknown_key", "has no certificate of this master's host CA", Papers::None),
        one(
            "expired",
            "expired",
            "expired at",
            Papers::Ca("host_ca", &ca(&principal("expired"), ["-V", "-2d:-1h"])),
        ),
        one(
            "not-yet",
            "not_yet_valid",
            "is not valid before",
            Papers::Ca("host_ca", &ca(&principal("not-yet"), ["-V", "+1h:+2d"])),
        ),
        // A certificate that is good, and n1's.
        one(
            "wrong-principal",
            "wrong_principal",
            "expected node wrong-principal, but the host certificate is for n1, 127.0.0.1",
            Papers::Ca("host_ca", &ca(&["-h", "-I", "node:n1", "-n", "n1,127.0.0.1"], VALID)),
        ),
        one(
            "other-ca",
            "wrong_ca",
            "shows a certificate of another CA",
            Papers::Ca("other_ca", &ca(&principal("other-ca"), VALID)),
        ),
        one(
            "by-user-ca",
            "wrong_ca",
            "shows a certificate of another CA",
            Papers::Ca("user_ca", &ca(&principal("by-user-ca"), VALID)),
        ),
        one(
            "user-certificate",
            "user_certificate",
            "shows a user certificate in place of a host certificate",
            Papers::Ca("host_ca", &ca(&["-I", "node:user-certificate", "-n", "user-certificate"], VALID)),
        ),
        // Pins and known_hosts files are not passed by a certificate of the host CA either.
        one(
            "pinned",
            "not_pinned",
            "is not one of the pinned keys",
            Papers::Ca("host_ca", &ca(&principal("pinned"), VALID)),
        ),
        one(
            "unknown",
            "not_in_known_hosts",
            "for the address that was dialled",
            Papers::Ca("host_ca", &ca(&principal("unknown,127.0.0.1"), VALID)),
        ),
        one("revoked", "revoked", "is revoked in", Papers::None),
        one(
            "revoked-ca",
            "revoked",
            "is revoked in",
            Papers::Ca("other_ca", &ca(&principal("127.0.0.1"), VALID)),
        ),
    ];
    let somebody = key(&papers(cluster, "somebody", Papers::None));
    let pin = papers(cluster, "pin", Papers::None).fingerprint();
    let other_ca = std::fs::read_to_string(cluster.path().join("other_ca.pub")).unwrap();
    for impostor in &mut all {
        let own = key(&impostor.identity);
        let known_hosts = match impostor.name {
            "pinned" => {
                impostor.host_keys = format!("pins: ['{pin}']");
                continue;
            }
            // The key is known, but for another port.
            "unknown" => format!("[127.0.0.1]:* {somebody}\n[127.0.0.1]:1 {own}\n127.0.0.1 {own}\n"),
            "revoked" => format!("[127.0.0.1]:* {own}\n@revoked * {own}\n"),
            "revoked-ca" => format!("@cert-authority * {other_ca}\n@revoked * {other_ca}\n"),
            _ => continue,
        };
        let file = place(cluster, impostor.name).join("known_hosts");
        std::fs::write(&file, known_hosts).unwrap();
        impostor.host_keys = format!("known_hosts: '{}'", file.display());
    }
    all
}

/// Those who hold keys, and claim to be a master: what each is, its login, what the node's log says, and its key.
/// russh itself refuses a certificate at the wrong time, and says so in words of its own.
pub(super) fn masters(cluster: &Cluster) -> Vec<(&'static str, &'static str, &'static str, Identity)> {
    let forward = ["-O", "clear", "-O", "permit-port-forwarding"];
    let with = |args: &[&'static str], validity: [&'static str; 2]| [args, &validity, &forward].concat();
    let master = ["-I", "master-agent", "-n", "master-agent"];
    let good = with(&master, VALID);
    let expired = with(&master, ["-V", "-2d:-1h"]);
    let not_yet = with(&master, ["-V", "+1h:+2d"]);
    let person = with(&["-I", "alice", "-n", "alice"], VALID);
    let host = with(&["-h", "-I", "master-agent", "-n", "master-agent"], VALID)[..7].to_vec();
    let bare: Vec<&str> = [&master[..], &VALID, &["-O", "clear"]].concat();
    let forced: Vec<&str> = [&good[..], &["-O", "force-command=true"]].concat();
    let elsewhere: Vec<&str> = [&good[..], &["-O", "source-address=10.9.8.7/32"]].concat();
    let one = |name: &'static str, login, says, given| {
        (name, login, says, papers(cluster, &format!("master-{name}"), given))
    };
    vec![
        one("plain-key", "master-agent", "refused a key without certificate", Papers::None),
        one(
            "other-ca",
            "master-agent",
            "signed by a CA that is not trusted here",
            Papers::Ca("other_user_ca", &good),
        ),
        one(
            "host-ca",
            "master-agent",
            "signed by a CA that is not trusted here",
            Papers::Ca("host_ca", &good),
        ),
        one(
            "expired",
            "master-agent",
            "Certificate is expired or not yet valid",
            Papers::Ca("user_ca", &expired),
        ),
        one(
            "not-yet",
            "master-agent",
            "Certificate is expired or not yet valid",
            Papers::Ca("user_ca", &not_yet),
        ),
        one(
            "person",
            "master-agent",
            "it is not for the login \"master-agent\"",
            Papers::Ca("user_ca", &person),
        ),
        one("other-login", "root", "it is not for the login \"root\"", Papers::Ca("user_ca", &good)),
        one("host", "master-agent", "it is not a user certificate", Papers::Ca("user_ca", &host)),
        one("bare", "master-agent", "it does not permit port forwarding", Papers::Ca("user_ca", &bare)),
        one("forced", "master-agent", "force-command", Papers::Ca("user_ca", &forced)),
        one(
            "elsewhere",
            "master-agent",
            "its source-address option does not allow 127.0.0.1",
            Papers::Ca("user_ca", &elsewhere),
        ),
    ]
}

/// Records what a node sends in a handshake, as a relay could: up to NEWKEYS nothing is encrypted.
pub(super) async fn record_handshake(cluster: &Cluster) -> Vec<u8> {
    let listener = TcpListener::bind(("127.0.0.1", 0)).await.unwrap();
    let at = listener.local_addr().unwrap();
    let (process, _state) = second_agent(cluster, "recorded", &cluster.nodes[0].dir.join("state"), at);
    let (mut node, _) = completes("the node calls", listener.accept()).await.unwrap();
    let mut master = TcpStream::connect(cluster.call_home).await.unwrap();
    let mut recorded = Vec::new();
    let (mut up, mut down) = ([0; 4096], [0; 4096]);
    while !has_newkeys(&recorded) {
        tokio::select! {
            n = node.read(&mut up) => {
                let n = n.unwrap();
                assert!(n > 0, "the node has hung up");
                recorded.extend_from_slice(&up[..n]);
                master.write_all(&up[..n]).await.unwrap();
            }
            n = master.read(&mut down) => {
                let n = n.unwrap();
                assert!(n > 0, "the master has hung up");
                node.write_all(&down[..n]).await.unwrap();
            }
        }
    }
    drop(process);
    recorded
}

/// Whether an SSH_MSG_NEWKEYS (21) has come (RFC 4253 §6, §7.3).
fn has_newkeys(bytes: &[u8]) -> bool {
    let Some(line) = bytes.iter().position(|b| *b == b'\n') else { return false };
    let mut rest = &bytes[line + 1..];
    while let Some((length, packet)) = rest.split_first_chunk::<4>() {
        let length = u32::from_be_bytes(*length) as usize;
        if packet.len() < length {
            return false;
        }
        if packet[1] == 21 {
            return true;
        }
        rest = &packet[length..];
    }
    false
}
