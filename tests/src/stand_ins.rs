//! Many nodes that are dialled. Each is a whole node-agent with an SSH server, a key and a policy of its own, but many of
//! them share a process, which is the benchmark's program.

use std::{
    fmt::Write,
    net::{Ipv4Addr, SocketAddr},
    path::Path,
    process::Command,
};

use node_agent::{config::Config, identity::host::NodeIdentity};
use proto_net::{
    handover::{Beginning, Role},
    telemetry::LinesLost,
};
use russh::keys::{HashAlg, PrivateKey};

use crate::process::Process;

/// Nodes of one process.
const SHARE: u32 = 500;
/// The ports of every node, which has an address of its own.
const SSH: u16 = 2222;
const ADMIN: u16 = 9443;

/// Where a node's SSH server listens: at 127.1.0.1 and so on.
pub fn address(number: u32) -> SocketAddr {
    SocketAddr::from((ip(number), SSH))
}

fn ip(number: u32) -> Ipv4Addr {
    Ipv4Addr::from(0x7f01_0001 + number)
}

/// Gives every node a directory with its key and the master's CA. Returns the entries of an inventory that pins the keys
/// and has each node dialled at an address.
pub fn prepare(
    directory: &Path,
    user_ca: &Path,
    count: u32,
    dial: impl Fn(u32) -> SocketAddr,
) -> anyhow::Result<String> {
    let user_ca = PrivateKey::read_openssh_file(user_ca)?.public_key().to_openssh()?;
    let mut entries = String::new();
    for i in 0..count {
        let directory = directory.join(format!("node-{i}"));
        let identity = NodeIdentity::load_or_create(&directory)?;
        std::fs::write(directory.join("user_ca.pub"), &user_ca)?;
        let (pin, dial) = (identity.host_key().fingerprint(HashAlg::Sha256), dial(i));
        writeln!(entries, "  - {{name: node-{i}, dial: '{dial}', host_keys: {{pins: ['{pin}']}}}}")?;
    }
    Ok(entries)
}

/// Starts prepared nodes. `program` is the benchmark's; their addresses follow the first `offset`.
pub fn start(program: &Path, directory: &Path, count: u32, offset: u32) -> anyhow::Result<Vec<Process>> {
    let mut nodes = Vec::new();
    for first in (0..count).step_by(SHARE as usize) {
        let last = count.min(first + SHARE);
        let mut serve = Command::new(program);
        serve.arg("--nodes").arg(directory).args([first, last, offset].map(|number| number.to_string()));
        let name = format!("nodes-{first}");
        nodes.push(Process::start(&name, &mut serve, &directory.join(format!("{name}.log")))?);
    }
    Ok(nodes)
}

/// Runs the nodes from `first` to before `last` whose directories are in `directory`.
pub async fn serve(directory: &Path, first: u32, last: u32, offset: u32) -> anyhow::Result<()> {
    let mut nodes = tokio::task::JoinSet::new();
    for i in first..last {
        let (directory, own) = (directory.join(format!("node-{i}")), ip(offset + i));
        let text = format!(
            "node: node-{i}\nstate_dir: .\nadmin: {{listen: '{own}:{ADMIN}', socket: admin.sock}}\nlisten: '{own}:{SSH}'\n\
             addresses: ['{own}']\npolicy: {{pod_cidrs: [10.0.0.0/8], service_cidrs: [172.16.0.0/12]}}\n"
        );
        let config = Config::parse(&text, "a stand-in", &directory).map_err(|e| anyhow::anyhow!("{e}"))?;
        nodes.spawn(node_agent::app::run(
            config,
            Beginning::new(Role::First, directory)?,
            LinesLost::default(),
        ));
    }
    while let Some(ended) = nodes.join_next().await {
        ended??;
    }
    Ok(())
}
