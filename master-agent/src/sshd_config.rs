//! What makes a plain OpenSSH sshd a node: a script that installs a drop-in for sshd_config.
//!
//! The drop-in trusts this master's user CA for one account, which may open TCP connections to the targets
//! that policy allows, and nothing else: no shell, command, sftp, agent, X11 or remote forwarding.

use std::{fmt::Write, net::IpAddr, path::Path, time::SystemTime};

use anyhow::Context;
use ipnet::IpNet;
use russh::keys::PublicKey;

use crate::{cli::SshdConfigArgs, identity::Authorities, inventory::InventoryNode, join::LOGIN};

/// The most addresses of a CIDR that are listed one by one.
const MAX_EXPANDED: usize = 256;

/// Makes the script for one node of the inventory, whose host key is `host_key`.
pub fn generate(
    authorities: &Authorities,
    node: &InventoryNode,
    host_key: &PublicKey,
    args: &SshdConfigArgs,
    now: SystemTime,
) -> anyhow::Result<String> {
    let certificate = authorities.sign_host(host_key, &node.name, &node.addresses, now, args.ttl)?;
    let mut out = format!(
        "#!/bin/sh\n# Makes this host's sshd node {name} of a master-agent. Run it as root on that host; run it again, made \
         anew, to renew\n# the host certificate.\nset -eu\n",
        name = node.name
    );
    if !args.files_only {
        write_account(&mut out, node)?;
    }
    write_files(&mut out, node, args, &certificate.to_openssh()?, &authorities.user_ca().to_openssh()?)?;
    if !args.files_only {
        write_reload(&mut out, node, args)?;
    }
    Ok(out)
}

fn drop_in(node: &InventoryNode, args: &SshdConfigArgs) -> anyhow::Result<String> {
    let (open, notes) = permit_open(node, args);
    let mut out = String::new();
    let user = &node.user;
    write!(
        out,
        "# Makes this sshd node {name} of a master-agent. Made by `master-agent sshd-config {name}`.
{key}HostCertificate {directory}/host-cert.pub

Match User {user}
    TrustedUserCAKeys {directory}/user_ca.pub
    AuthorizedPrincipalsFile {directory}/principals
    AuthorizedKeysFile none
    AuthenticationMethods publickey
    PubkeyAuthentication yes
    PasswordAuthentication no
    KbdInteractiveAuthentication no
    AllowTcpForwarding local
    AllowStreamLocalForwarding no
    PermitListen none
    GatewayPorts no
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

/// sshd's default host keys need no line; one line would take the place of all of them.
fn host_key_line(path: &Path) -> String {
    let default = ["ed25519", "ecdsa"].iter().any(|kind| path == Path::new(&format!("/etc/ssh/ssh_host_{kind}_key")));
    if default { String::new() } else { format!("HostKey {}\n", path.display()) }
}

/// The targets as PermitOpen takes them, and remarks about what it can't express.
fn permit_open(node: &InventoryNode, args: &SshdConfigArgs) -> (String, String) {
    let mut open = Vec::new();
    let mut notes = String::new();
    let address = |a: &IpAddr| match a {
        IpAddr::V4(a) => a.to_string(),
        IpAddr::V6(a) => format!("[{a}]"),
    };
    open.extend(node.addresses.iter().map(|a| format!("{}:{}", address(a), args.kubelet_port)));
    for net in &node.cidrs {
        let hosts: Vec<IpAddr> = match net {
            IpNet::V4(net) => net.hosts().take(MAX_EXPANDED + 1).map(IpAddr::V4).collect(),
            IpNet::V6(net) => net.hosts().take(MAX_EXPANDED + 1).map(IpAddr::V6).collect(),
        };
        if hosts.len() <= MAX_EXPANDED {
            open.extend(hosts.iter().map(|a| format!("{}:*", address(a))));
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

fn write_files(
    out: &mut String,
    node: &InventoryNode,
    args: &SshdConfigArgs,
    certificate: &str,
    user_ca: &str,
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
mv {drop_in}.new {drop_in}
",
        directory = args.directory.display(),
        drop_in = args.drop_in.display(),
        text = drop_in(node, args)?,
        user_ca = user_ca.trim(),
        certificate = certificate.trim(),
    )
    .context("formatting")
}

fn write_reload(out: &mut String, node: &InventoryNode, args: &SshdConfigArgs) -> anyhow::Result<()> {
    write!(
        out,
        r#"if ! sshd -t; then
    mv {drop_in} {directory}/refused.conf
    echo "sshd refuses the drop-in; it was taken out again and is in {directory}/refused.conf" >&2
    exit 1
fi
if [ -d /run/systemd/system ]; then systemctl reload ssh || systemctl reload sshd; else pkill -HUP -o -x sshd || true; fi
echo "this host's sshd is node {name} now"
"#,
        drop_in = args.drop_in.display(),
        directory = args.directory.display(),
        name = node.name,
    )
    .context("formatting")
}
