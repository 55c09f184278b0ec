//! The script that makes a host with a plain OpenSSH sshd a node, by installing a drop-in for sshd_config.
//!
//! The drop-in trusts this master's user CA for one account. That account may open TCP connections to the targets that the
//! policy allows, and may have sshd listen for the master's front end on the one address that the inventory gives
//! (`front_end_listen`), if any. It has no shell, command, sftp, agent, X11 or other remote forwarding.
//!
//! The drop-in refuses the certificates that were revoked when the script was made. A plain sshd receives no newer list.

use std::{
    fmt::Write,
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
    path::{Path, PathBuf},
    time::{Duration, SystemTime},
};

use anyhow::{Context, bail};
use base64::{Engine, engine::general_purpose::STANDARD};
use clap::Args;
use ipnet::IpNet;
use proto::{
    NodeName,
    policy::{Policy, Rule, Verdict, closed_range},
};
use russh::keys::PublicKey;

use crate::{
    identity::{Authorities, LOGIN},
    routing::inventory::InventoryNode,
};

#[derive(Debug, Args)]
pub struct SshdConfigArgs {
    /// The node's name in the inventory.
    #[arg(value_name = "NODE")]
    pub node: NodeName,
    /// The file with the host's public key, for example /etc/ssh/ssh_host_ed25519_key.pub ("-" for standard input).
    #[arg(long, value_name = "FILE")]
    pub host_key: PathBuf,
    /// The path of the private key on the host.
    #[arg(long, default_value = "/etc/ssh/ssh_host_ed25519_key", value_name = "PATH")]
    pub host_key_path: PathBuf,
    /// The kubelet's port on the node's addresses.
    #[arg(long, default_value_t = 10250)]
    pub kubelet_port: u16,
    /// A further target to permit; can be repeated.
    #[arg(long = "allow", value_name = "HOST:PORT")]
    pub allow: Vec<proto::Target>,
    /// How long the host certificate is valid. Run this command and its script again to renew it.
    #[arg(long, default_value = "365d", value_parser = humantime::parse_duration)]
    pub ttl: Duration,
    /// The directory on the host for the CA, the certificate and the list of principals.
    #[arg(long, default_value = "/etc/ssh/master-agent", value_name = "PATH")]
    pub directory: PathBuf,
    /// The path of the drop-in on the host.
    #[arg(long, default_value = "/etc/ssh/sshd_config.d/10-master-agent.conf", value_name = "PATH")]
    pub drop_in: PathBuf,
    /// Print a script that only writes the files and leaves the account, the check by `sshd -t` and the reload to you.
    #[arg(long)]
    pub files_only: bool,
}

/// The largest number of addresses of a CIDR that are listed one by one.
const MAX_EXPANDED: usize = 256;

/// Generates the script for a node of the inventory with this host key. `revoked` is the list of revoked certificates, if
/// there has ever been one.
pub fn generate(
    authorities: &Authorities,
    node: &InventoryNode,
    host_key: &PublicKey,
    revoked: Option<&[u8]>,
    args: &SshdConfigArgs,
    now: SystemTime,
) -> anyhow::Result<String> {
    check_text(node, args)?;
    let certificate = authorities.sign_host(host_key, &node.name, &node.addresses, now, args.ttl)?;
    let mut out = format!(
        "#!/bin/sh\n# Makes this host's sshd node {name} of a master-agent. Run it as root on that host; run it again, made \
         anew, to renew\n# the host certificate.\nset -eu\nPATH=$PATH:/usr/sbin:/sbin\n",
        name = node.name
    );
    if !args.files_only {
        write_account(&mut out, node)?;
    }
    // The list comes before the drop-in that names it, as sshd refuses every key while it cannot read the list.
    if let Some(revoked) = revoked {
        write_revoked(&mut out, args, revoked)?;
    }
    let user_ca = authorities.user_ca().to_openssh()?;
    write_files(&mut out, node, args, &certificate.to_openssh()?, &user_ca, revoked.is_some())?;
    if !args.files_only {
        write_reload(&mut out, node, args)?;
    }
    Ok(out)
}

/// Returns when a certificate ends that is issued now.
pub fn valid_until(now: SystemTime, ttl: Duration) -> anyhow::Result<SystemTime> {
    let end = now.checked_add(ttl);
    end.with_context(|| format!("--ttl {} is longer than any date allows", humantime::format_duration(ttl)))
}

/// Rejects names and paths with special characters: a shell of root reads the script, and `Match User` takes patterns, so a
/// user `*` or `root` would lock everybody out.
fn check_text(node: &InventoryNode, args: &SshdConfigArgs) -> anyhow::Result<()> {
    let user = &node.user;
    let plain = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '_' || c == '-';
    if user.len() > 32
        || !user.starts_with(|c: char| c.is_ascii_lowercase() || c == '_')
        || !user.chars().all(plain)
    {
        bail!(
            "user {user:?} of node {} is not a valid name of a Unix account: use a-z, 0-9, '_' and '-'",
            node.name
        );
    }
    if user == "root" {
        bail!(
            "node {} has user root, who would lose every other way to log in: use a separate account",
            node.name
        );
    }
    let plain = |c: char| c.is_ascii_alphanumeric() || "/._-+@".contains(c);
    for path in [&args.host_key_path, &args.directory, &args.drop_in] {
        if !path.is_absolute() || !path.to_str().is_some_and(|p| p.chars().all(plain)) {
            bail!("{}: give an absolute path without spaces", path.display());
        }
    }
    Ok(())
}

fn drop_in(node: &InventoryNode, args: &SshdConfigArgs, revoked: bool) -> anyhow::Result<String> {
    let revoked = match revoked {
        true => format!("    RevokedKeys {}/revoked.krl\n", args.directory.display()),
        false => String::new(),
    };
    let (open, notes) = permit_open(node, args);
    let (forwarding, listen, gateway) = permit_listen(node);
    let mut out = String::new();
    let user = &node.user;
    write!(
        out,
        "# Makes this sshd node {name} of a master-agent. Made by `master-agent sshd-config {name}`.
{key}HostCertificate {directory}/host-cert.pub

Match User {user}
    TrustedUserCAKeys {directory}/user_ca.pub
    AuthorizedPrincipalsFile {directory}/principals
    AuthorizedPrincipalsCommand none
{revoked}    AuthorizedKeysFile none
    AuthorizedKeysCommand none
    AuthenticationMethods publickey
    PubkeyAuthentication yes
    PasswordAuthentication no
    KbdInteractiveAuthentication no
    AllowTcpForwarding {forwarding}
    AllowStreamLocalForwarding no
    PermitListen {listen}
    GatewayPorts {gateway}
    PermitTunnel no
    X11Forwarding no
    AllowAgentForwarding no
    PermitTTY no
    PermitUserRC no
    MaxSessions 0
    ForceCommand /bin/false
    ClientAliveInterval 5
    ClientAliveCountMax 2
    # PermitOpen knows addresses and ports, no CIDRs: this is the policy, address by address.
{notes}    PermitOpen {open}
Match all
",
        name = node.name,
        key = host_key_line(&args.host_key_path),
        directory = args.directory.display(),
    )
    .context("formatting")?;
    Ok(out)
}

/// The line for a host key that sshd does not use by default. One such line replaces all defaults.
fn host_key_line(path: &Path) -> String {
    let default =
        ["ed25519", "ecdsa"].iter().any(|kind| path == Path::new(&format!("/etc/ssh/ssh_host_{kind}_key")));
    if default { String::new() } else { format!("HostKey {}\n", path.display()) }
}

/// The values of AllowTcpForwarding, PermitListen and GatewayPorts.
fn permit_listen(node: &InventoryNode) -> (&'static str, String, &'static str) {
    let Some(address) = node.front_end_listen else { return ("local", "none".to_owned(), "no") };
    // Without gateway ports, sshd listens on these two whatever address is requested.
    let localhost = [IpAddr::from(Ipv4Addr::LOCALHOST), IpAddr::from(Ipv6Addr::LOCALHOST)];
    let gateway = if localhost.contains(&address.ip()) { "no" } else { "clientspecified" };
    ("yes", address.to_string(), gateway)
}

/// The targets for PermitOpen, and comments about what it cannot express.
fn permit_open(node: &InventoryNode, args: &SshdConfigArgs) -> (String, String) {
    let mut open = Vec::new();
    let mut notes = String::new();
    let address = |a: &IpAddr| match a {
        IpAddr::V4(a) => a.to_string(),
        IpAddr::V6(a) => format!("[{a}]"),
    };
    let own = |a: &&IpAddr| closed_range(**a).is_none_or(|range| range.name == "loopback");
    for left_out in node.addresses.iter().filter(|a| !own(a)) {
        notes.push_str(&format!(
            "    # {left_out} is no node's own address and is left out: --allow can name it.\n"
        ));
    }
    open.extend(node.addresses.iter().filter(own).map(|a| format!("{}:{}", address(a), args.kubelet_port)));
    for net in &node.cidrs {
        let hosts: Vec<IpAddr> = match net {
            IpNet::V4(net) => net.hosts().take(MAX_EXPANDED + 1).map(IpAddr::V4).collect(),
            IpNet::V6(net) => net.hosts().take(MAX_EXPANDED + 1).map(IpAddr::V6).collect(),
        };
        if hosts.len() <= MAX_EXPANDED {
            // Decides as a node-agent's policy with this one rule.
            let rule = Rule { name: "pod-cidr".to_owned(), net: *net, ports: 1..=u16::MAX };
            let policy = Policy { rules: vec![rule] };
            let allowed = |a: &&IpAddr| matches!(policy.decide(**a, 1), Verdict::Allow { .. });
            open.extend(hosts.iter().filter(allowed).map(|a| format!("{}:*", address(a))));
        } else {
            notes.push_str(&format!(
                "    # {net} has more than {MAX_EXPANDED} addresses and is left out: name targets with --allow, or install\n    # node-agent, whose policy takes CIDRs.\n"
            ));
        }
    }
    open.extend(args.allow.iter().map(ToString::to_string));
    if open.is_empty() {
        open.push("none".to_owned());
    }
    (open.join(" "), notes)
}

fn write_account(out: &mut String, node: &InventoryNode) -> anyhow::Result<()> {
    write!(
        out,
        r#"[ "$(id -u)" = 0 ] || {{ echo "run this as root" >&2; exit 1; }}
grep -Eqi '^[[:space:]]*Include[[:space:]]+/etc/ssh/sshd_config\.d/' /etc/ssh/sshd_config || {{
    echo "/etc/ssh/sshd_config does not include /etc/ssh/sshd_config.d/*.conf: add that line at its top" >&2; exit 1; }}
id {user} >/dev/null 2>&1 || useradd --system --password '*' --no-create-home --home-dir /nonexistent --shell /usr/sbin/nologin {user}
"#,
        user = node.user
    )
    .context("formatting")
}

fn write_revoked(out: &mut String, args: &SshdConfigArgs, revoked: &[u8]) -> anyhow::Result<()> {
    write!(
        out,
        r"umask 022
mkdir -p {directory}
base64 -d > {directory}/revoked.krl.new <<'END'
{list}
END
mv {directory}/revoked.krl.new {directory}/revoked.krl
",
        directory = args.directory.display(),
        list = STANDARD.encode(revoked),
    )
    .context("formatting")
}

fn write_files(
    out: &mut String,
    node: &InventoryNode,
    args: &SshdConfigArgs,
    certificate: &str,
    user_ca: &str,
    revoked: bool,
) -> anyhow::Result<()> {
    write!(
        out,
        r"umask 022
mkdir -p {directory} $(dirname {drop_in})
cat > {directory}/user_ca.pub <<'END'
{user_ca}
END
cat > {directory}/host-cert.pub <<'END'
{certificate}
END
echo {LOGIN} > {directory}/principals
cat > {drop_in}.new <<'END'
{text}END
[ ! -e {drop_in} ] || cp -p {drop_in} {directory}/previous.conf
mv {drop_in}.new {drop_in}
",
        directory = args.directory.display(),
        drop_in = args.drop_in.display(),
        text = drop_in(node, args, revoked)?,
        user_ca = user_ca.trim(),
        certificate = certificate.trim(),
    )
    .context("formatting")
}

fn write_reload(out: &mut String, node: &InventoryNode, args: &SshdConfigArgs) -> anyhow::Result<()> {
    write!(
        out,
        r#"install -d -m 0755 /run/sshd
if ! sshd -t; then
    mv {drop_in} {directory}/refused.conf
    [ ! -e {directory}/previous.conf ] || mv {directory}/previous.conf {drop_in}
    echo "sshd refuses the drop-in; it was taken out again and is in {directory}/refused.conf" >&2
    exit 1
fi
rm -f {directory}/previous.conf
if [ -d /run/systemd/system ]; then systemctl reload ssh || systemctl reload sshd; else pkill -HUP -o -x sshd || true; fi
echo "this host's sshd is node {name} now"
"#,
        drop_in = args.drop_in.display(),
        directory = args.directory.display(),
        name = node.name,
    )
    .context("formatting")
}

#[cfg(test)]
mod tests {
    use std::process::Command;

    use russh::keys::{PrivateKey, ssh_key::LineEnding};

    use super::*;
    use crate::{
        host_trust::HostTrust,
        identity::tests::{TempDir, new_key},
    };

    fn node(cidrs: &[&str]) -> InventoryNode {
        InventoryNode {
            name: "n1".parse().unwrap(),
            dial: None,
            user: LOGIN.to_owned(),
            addresses: vec!["10.0.0.5".parse().unwrap(), "fd00::5".parse().unwrap()],
            cidrs: cidrs.iter().map(|c| c.parse().unwrap()).collect(),
            default_route: false,
            connections: 1,
            key_file: None,
            front_end_listen: None,
            trust: HostTrust::HostCa,
        }
    }

    fn args() -> SshdConfigArgs {
        SshdConfigArgs {
            node: "n1".parse().unwrap(),
            host_key: PathBuf::from("-"),
            host_key_path: PathBuf::from("/etc/ssh/ssh_host_ed25519_key"),
            kubelet_port: 10250,
            allow: vec!["10.96.0.1:443".parse().unwrap()],
            ttl: Duration::from_secs(3600),
            directory: PathBuf::from("/etc/ssh/master-agent"),
            drop_in: PathBuf::from("/etc/ssh/sshd_config.d/10-master-agent.conf"),
            files_only: false,
        }
    }

    fn made(
        dir: &TempDir,
        node: &InventoryNode,
        args: &SshdConfigArgs,
        key: &PrivateKey,
    ) -> anyhow::Result<String> {
        let authorities = Authorities::load_or_create(&dir.0)?;
        generate(&authorities, node, key.public_key(), None, args, SystemTime::now())
    }

    fn run(command: &mut Command) -> String {
        let output = command.output().unwrap();
        let text = [output.stdout, output.stderr].concat();
        let text = String::from_utf8(text).unwrap();
        assert!(output.status.success(), "{text}");
        text
    }

    /// What else the host's configuration says. Commands would admit further keys and principals to every account.
    const OF_THE_HOST: &str = "X11Forwarding yes\nAuthorizedKeysCommand /bin/true\nAuthorizedKeysCommandUser nobody\n\
        AuthorizedPrincipalsCommand /bin/true\nAuthorizedPrincipalsCommandUser nobody\n";

    #[test]
    fn sshd_accepts_the_drop_in_and_understands_it_as_intended() {
        let dir = TempDir::new();
        let key = new_key();
        let printed =
            made(&dir, &node(&["10.244.1.0/29", "fd00:1::/126", "10.245.0.0/16"]), &args(), &key).unwrap();
        let _ = std::fs::create_dir("/run/sshd");
        std::fs::write(dir.0.join("host_key"), key.to_openssh(LineEnding::LF).unwrap()).unwrap();
        std::fs::set_permissions(dir.0.join("host_key"), std::os::unix::fs::PermissionsExt::from_mode(0o600))
            .unwrap();
        let certificate = printed.lines().find(|l| l.starts_with("ssh-ed25519-cert")).unwrap();
        std::fs::write(dir.0.join("host-cert.pub"), certificate).unwrap();
        std::fs::copy(dir.0.join("user_ca.pub"), dir.0.join("trusted.pub")).unwrap();
        let moved = drop_in(&node(&["10.244.1.0/29", "fd00:1::/126", "10.245.0.0/16"]), &args(), false)
            .unwrap()
            .replace("/etc/ssh/master-agent/user_ca.pub", &dir.0.join("trusted.pub").display().to_string())
            .replace("/etc/ssh/master-agent", &dir.0.display().to_string());
        let config = dir.0.join("sshd_config");
        std::fs::write(
            &config,
            format!("{moved}\nHostKey {}\n{OF_THE_HOST}", dir.0.join("host_key").display()),
        )
        .unwrap();
        let sshd = |user: &str| {
            let user = format!("user={user},host=h,addr=10.0.0.1");
            run(Command::new("/usr/sbin/sshd").arg("-T").arg("-C").arg(user).arg("-f").arg(&config))
                .to_lowercase()
        };
        run(Command::new("/usr/sbin/sshd").arg("-t").arg("-f").arg(&config));
        let ours = sshd(LOGIN);
        for line in [
            "allowtcpforwarding local",
            "allowstreamlocalforwarding no",
            "allowagentforwarding no",
            "x11forwarding no",
            "permittty no",
            "permittunnel no",
            "permitlisten none",
            "gatewayports no",
            "passwordauthentication no",
            "kbdinteractiveauthentication no",
            "authenticationmethods publickey",
            "authorizedkeysfile none",
            "authorizedkeyscommand none",
            "authorizedprincipalscommand none",
            "maxsessions 0",
            "forcecommand /bin/false",
            "permituserrc no",
        ] {
            assert!(ours.lines().any(|l| l == line), "{line} in\n{ours}");
        }
        let open = ours.lines().find(|l| l.starts_with("permitopen ")).unwrap();
        let targets: Vec<&str> = open.split_whitespace().skip(1).collect();
        for target in [
            "10.0.0.5:10250",
            "[fd00::5]:10250",
            "10.96.0.1:443",
            "10.244.1.1:*",
            "10.244.1.6:*",
            "[fd00:1::3]:*",
        ] {
            assert!(targets.contains(&target), "{target} in {open}");
        }
        assert!(!open.contains("10.245."));
        assert!(printed.contains("# 10.245.0.0/16 has more than 256 addresses and is left out"));
        // All other users log in as before.
        let others = sshd("alice");
        assert!(others.contains("x11forwarding yes") && others.contains("permitopen any"), "{others}");
        assert!(others.contains("trustedusercakeys none"), "{others}");
        assert!(others.contains("authorizedkeyscommand /bin/true"), "{others}");
        assert!(
            others.contains(
                &format!("hostcertificate {}", dir.0.join("host-cert.pub").display()).to_lowercase()
            )
        );
    }

    #[test]
    fn sshd_listens_only_where_the_inventory_says() {
        let dir = TempDir::new();
        for (address, gateway) in [
            ("127.0.0.1:6443", "no"),
            ("[::1]:6443", "no"),
            ("127.0.0.2:6443", "clientspecified"),
            ("10.96.0.1:6443", "clientspecified"),
            ("[fd00::1]:6443", "clientspecified"),
        ] {
            let node = InventoryNode { front_end_listen: Some(address.parse().unwrap()), ..node(&[]) };
            let printed = made(&dir, &node, &args(), &new_key()).unwrap();
            for line in [
                "AllowTcpForwarding yes".to_owned(),
                format!("PermitListen {address}"),
                format!("GatewayPorts {gateway}"),
                "AllowStreamLocalForwarding no".to_owned(),
            ] {
                assert!(printed.contains(&format!("    {line}\n")), "{line} in\n{printed}");
            }
        }
    }

    #[test]
    fn the_script_is_valid_shell() {
        let dir = TempDir::new();
        let printed = made(&dir, &node(&[]), &args(), &new_key()).unwrap();
        let script = dir.0.join("script");
        std::fs::write(&script, &printed).unwrap();
        run(Command::new("sh").arg("-n").arg(&script));
    }

    #[test]
    fn closed_addresses_are_left_out_unless_named() {
        let mut node = node(&["168.63.129.16/30", "100.100.100.200/32", "fe80::/126", "fd00:ec2::254/127"]);
        node.addresses.extend(["169.254.169.254".parse::<IpAddr>().unwrap(), [127, 0, 0, 1].into()]);
        let (open, notes) = permit_open(&node, &args());
        assert_eq!(
            open.split(' ').collect::<Vec<_>>(),
            [
                "10.0.0.5:10250",
                "[fd00::5]:10250",
                "127.0.0.1:10250",
                "168.63.129.17:*",
                "168.63.129.18:*",
                "100.100.100.200:*",
                "[fe80::]:*",
                "[fe80::1]:*",
                "[fe80::2]:*",
                "[fe80::3]:*",
                "[fd00:ec2::255]:*",
                "10.96.0.1:443",
            ]
        );
        assert!(notes.contains("# 169.254.169.254 is no node's own address"), "{notes}");
    }

    #[test]
    fn a_certificate_ends_at_a_date() {
        let (now, year) = (SystemTime::UNIX_EPOCH, Duration::from_secs(365 * 24 * 3600));
        assert_eq!(valid_until(now, year).unwrap(), now + year);
        let error = valid_until(now, Duration::MAX).unwrap_err().to_string();
        assert!(error.starts_with("--ttl ") && error.ends_with(" is longer than any date allows"), "{error}");
    }

    #[test]
    fn nothing_is_permitted_without_targets() {
        let dir = TempDir::new();
        let mut bare = node(&[]);
        bare.addresses.clear();
        let printed = made(&dir, &bare, &SshdConfigArgs { allow: vec![], ..args() }, &new_key()).unwrap();
        assert!(printed.contains("PermitOpen none\n"));
    }

    #[test]
    fn patterns_and_commands_are_rejected() {
        let dir = TempDir::new();
        for user in ["*", "root", "a;reboot", "$(id)", "a b", "!x", "a,b", "", "-x", "A"] {
            let node = InventoryNode { user: user.to_owned(), ..node(&[]) };
            assert!(made(&dir, &node, &args(), &new_key()).is_err(), "{user:?}");
        }
        for path in ["host_key", "/a b", "/a\nPermitRootLogin yes", "/$(id)", "/a'"] {
            let args = SshdConfigArgs { host_key_path: PathBuf::from(path), ..args() };
            assert!(made(&dir, &node(&[]), &args, &new_key()).is_err(), "{path:?}");
        }
    }
}
