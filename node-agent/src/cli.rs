//! The command line.

use std::{
    net::IpAddr,
    path::{Path, PathBuf},
    time::{Duration, SystemTime},
};

use clap::{Args, CommandFactory, Parser, Subcommand};
use hyper::Method;
use proto::{NodeName, call_home::Master};
use proto_net::{
    admin_client::AdminClient,
    drain::{self, Progress},
    handover::reload::Reloaded,
    stdout,
};

use crate::admin::{DRAIN, DrainStatus, UNDRAIN};

/// The node's end of the tunnels, and the policy that decides what is reached through them.
#[derive(Debug, Parser)]
#[command(name = "node-agent", version, propagate_version = true)]
pub struct Cli {
    /// The configuration file.
    #[arg(
        long,
        short,
        global = true,
        default_value = "/etc/node-agent/node-agent.yaml",
        value_name = "FILE"
    )]
    pub config: PathBuf,
    #[command(subcommand)]
    pub command: Command,
}

#[derive(Debug, Subcommand)]
pub enum Command {
    /// Run the agent until SIGTERM. SIGHUP reads the configuration again.
    Run(RunArgs),
    /// Have the running agent start its program and configuration anew, and hand over to the new process once that has
    /// the links of the running one. Streams are not cut. Exit with 1 and the reason if the new process can't serve.
    Reload,
    /// Take this node out of use: masters use other nodes for what those can carry, too. Wait for the streams that are left. At
    /// the deadline, cut them; the node then takes no streams.
    Drain(DrainArgs),
    /// Undo a drain.
    Undrain,
    /// Get an identity for this host from a master, with a token that `master-agent token create` printed there.
    Join(JoinArgs),
    /// Read the configuration, print every error in it, and exit with status 78 if there is one.
    CheckConfig {
        /// Print a commented configuration with every field and its default, without reading the file.
        #[arg(long)]
        print_defaults: bool,
    },
    /// Print a completion script for a shell.
    Completions {
        /// The shell to print it for.
        shell: clap_complete::Shell,
    },
}

/// The arguments with which the running process starts its next one.
#[derive(Debug, Args)]
pub struct RunArgs {
    /// Take over from the process at the other end of standard input.
    #[arg(long, hide = true)]
    pub take_over: bool,
    /// Start the process that takes over, and end.
    #[arg(long, hide = true)]
    pub start_next: bool,
}

#[derive(Debug, Args)]
pub struct DrainArgs {
    /// How long this node still takes streams that no other node can carry. What is open then is cut.
    #[arg(long, default_value = "10m", value_parser = drain::parse_deadline)]
    pub deadline: Duration,
    /// Do not wait until no stream is left.
    #[arg(long)]
    pub no_wait: bool,
}

#[derive(Debug, Args)]
pub struct JoinArgs {
    /// The address at which the master accepts calls home, or https:// and the address of its front end.
    #[arg(value_name = "HOST:PORT")]
    pub master: Master,
    /// The join token. Other users of this host can see this option, but not the variable NODE_AGENT_TOKEN.
    #[arg(long, env = "NODE_AGENT_TOKEN", hide_env_values = true)]
    pub token: String,
    /// The fingerprint of the master's user CA, SHA256:...
    #[arg(long, value_name = "FINGERPRINT")]
    pub ca_pin: String,
    /// This node's name. Required unless the token is bound to one.
    #[arg(long, value_name = "NAME")]
    pub node: Option<NodeName>,
    /// One of the node's own addresses; may be repeated. The default is this host's address towards the master.
    #[arg(long = "address", value_name = "ADDRESS")]
    pub addresses: Vec<IpAddr>,
    /// The CA of the front end's certificate. The default is call_home_https.ca in the configuration, or else the CAs of
    /// the system.
    #[arg(long, value_name = "FILE")]
    pub https_ca: Option<PathBuf>,
    /// Where keys and certificates are kept. The default is state_dir in the configuration.
    #[arg(long, value_name = "DIRECTORY")]
    pub state_dir: Option<PathBuf>,
}

/// Has the running agent hand over to its next process.
pub async fn reload(socket: &Path) -> anyhow::Result<()> {
    let Reloaded { pid, version, former_pid, former_callers } =
        AdminClient::new("node-agent", socket).reload().await?;
    stdout::print_line(format_args!("process {pid} of version {version} serves"));
    if former_callers > 0 {
        stdout::print_line(format_args!("process {former_pid} ends once its {former_callers} streams have"));
    }
    Ok(())
}

/// Has the running agent drain this node.
pub async fn drain(socket: &Path, args: DrainArgs) -> anyhow::Result<()> {
    let agent = AdminClient::new("node-agent", socket);
    let DrainArgs { deadline, no_wait } = args;
    let status = agent.send(Method::POST, DRAIN, drain::request(deadline)).await?;
    let status: DrainStatus = serde_json::from_str(&status)?;
    let Progress { until, streams, .. } = progress(&status);
    stdout::print_line(format_args!(
        "this node is draining until {}, with {} left; `node-agent undrain` undoes that",
        humantime::format_rfc3339_seconds(until),
        drain::count(streams)
    ));
    for master in &status.masters_not_told {
        stdout::print_line(format_args!(
            "{master} is of an earlier release and can't be told: it uses this node as before until the deadline"
        ));
    }
    if no_wait {
        return Ok(());
    }
    if streams > 0 {
        stdout::print_line(
            "waiting for them to end; Ctrl-C ends only the wait, and the node goes on draining",
        );
    }
    let look = async || {
        let status = agent.send(Method::GET, DRAIN, String::new()).await?;
        anyhow::Ok(Some(progress(&serde_json::from_str(&status)?)))
    };
    match drain::count_down(look).await? {
        Some(cut @ 1..) => {
            let cut = drain::count(usize::try_from(cut)?);
            stdout::print_line(format_args!("this node is drained; cut at the deadline: {cut}"));
        }
        Some(0) | None => stdout::print_line("this node has no streams left"),
    }
    Ok(())
}

fn progress(status: &DrainStatus) -> Progress {
    let until = SystemTime::UNIX_EPOCH + Duration::from_millis(status.until_unix_milliseconds);
    Progress { until, streams: status.streams, cut: status.cut }
}

/// Has the running agent undo a drain of this node.
pub async fn undrain(socket: &Path) -> anyhow::Result<()> {
    let agent = AdminClient::new("node-agent", socket);
    stdout::print_line(agent.send(Method::POST, UNDRAIN, String::new()).await?.trim());
    Ok(())
}

/// Writes a completion script to standard output.
pub fn completions(shell: clap_complete::Shell) {
    let mut script = Vec::new();
    clap_complete::generate(shell, &mut Cli::command(), "node-agent", &mut script);
    stdout::print(String::from_utf8_lossy(&script));
}
