//! What the figures were taken on.

use std::{collections::BTreeMap, process::Command};

use ::tests::{cluster::binary, process::output_of};

/// Properties by name.
pub type Machine = BTreeMap<String, String>;

/// What decides how TCP connections behave.
const SYSCTLS: [&str; 13] = [
    "net.core.default_qdisc",
    "net.core.rmem_max",
    "net.core.somaxconn",
    "net.core.wmem_max",
    "net.ipv4.tcp_available_congestion_control",
    "net.ipv4.tcp_congestion_control",
    "net.ipv4.tcp_ecn",
    "net.ipv4.tcp_mtu_probing",
    "net.ipv4.tcp_notsent_lowat",
    "net.ipv4.tcp_rmem",
    "net.ipv4.tcp_sack",
    "net.ipv4.tcp_slow_start_after_idle",
    "net.ipv4.tcp_wmem",
];

/// Describes this machine, the programs and the ciphers.
pub fn describe(quick: bool) -> Machine {
    let mut machine = Machine::new();
    let mut put = |name: &str, value: String| machine.insert(name.to_owned(), value.trim().to_owned());
    put("agents", env!("CARGO_PKG_VERSION").to_owned());
    let agent = binary("master-agent");
    let profile = agent.parent().and_then(|directory| directory.file_name()).unwrap_or_default();
    put("profile", profile.to_string_lossy().into_owned());
    put("rounds", if quick { "short" } else { "full" }.to_owned());
    put("started", humantime::format_rfc3339_seconds(std::time::SystemTime::now()).to_string());
    put("cores", std::thread::available_parallelism().map_or(0, usize::from).to_string());
    put("cpu", line_of("/proc/cpuinfo", "model name"));
    put("memory", line_of("/proc/meminfo", "MemTotal"));
    put("load before", read("/proc/loadavg").split(' ').take(3).collect::<Vec<_>>().join(" "));
    put("kernel", read("/proc/sys/kernel/osrelease"));
    put("cipher", cipher());
    put("openssh", output_of(Command::new("ssh").arg("-V")));
    put("openssh default cipher", openssh_default_cipher().unwrap_or_default());
    for name in SYSCTLS {
        put(name, read(&format!("/proc/sys/{}", name.replace('.', "/"))).replace('\t', " "));
    }
    machine
}

/// The cipher that the agents negotiate with each other: the first of both.
pub fn cipher() -> String {
    proto_net::ssh::preferred().cipher.first().map(|name| name.as_ref().to_owned()).unwrap_or_default()
}

/// The first cipher that ssh offers unless told otherwise; an sshd without configuration takes it.
fn openssh_default_cipher() -> Option<String> {
    let settings = output_of(Command::new("ssh").args(["-G", "-F", "none", "localhost"]));
    let ciphers = settings.lines().find_map(|line| line.strip_prefix("ciphers "))?;
    ciphers.split(',').next().map(str::to_owned)
}

fn read(path: &str) -> String {
    std::fs::read_to_string(path).unwrap_or_default()
}

/// The value behind the first `NAME: VALUE`.
fn line_of(path: &str, name: &str) -> String {
    let text = read(path);
    let line = text.lines().find(|line| line.starts_with(name));
    line.and_then(|line| line.split_once(':')).map(|(_, value)| value.trim().to_owned()).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_machine_tells_its_congestion_control_and_both_ciphers() {
        let machine = describe(true);
        assert!(!machine["net.ipv4.tcp_congestion_control"].is_empty());
        assert_eq!(machine["cipher"], "aes256-gcm@openssh.com");
        assert!(machine["openssh default cipher"].contains('-'), "{machine:?}");
        assert!(machine["openssh"].starts_with("OpenSSH"), "{machine:?}");
    }
}
