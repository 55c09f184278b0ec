//! The command line.

use std::{net::IpAddr, path::PathBuf};

use clap::{Args, CommandFactory, Parser, Subcommand};
use proto::{NodeName, call_home::Master};

/// The node's end of the tunnel, and the policy that decides what masters reach through it.
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
    /// Run the agent until SIGTERM.
    Run,
    /// Get this host its identity from a master, with a token made there by `master-agent token create`.
    Join(JoinArgs),
    /// Read the configuration, print every error, and exit with 78 if there is one.
    CheckConfig,
    /// Print a completion script for a shell.
    Completions {
        /// The shell that is to read it.
        shell: clap_complete::Shell,
    },
}

#[derive(Debug, Args)]
pub struct JoinArgs {
    /// The master's call-home address, or its front end's with https:// before it.
    #[arg(value_name = "HOST:PORT")]
    pub master: Master,
    /// The token; or set NODE_AGENT_TOKEN, which other users of this host can't see.
    #[arg(long, env = "NODE_AGENT_TOKEN", hide_env_values = true)]
    pub token: String,
    /// The fingerprint of the master's user CA, SHA256:...
    #[arg(long, value_name = "FINGERPRINT")]
    pub ca_pin: String,
    /// This node's name; needed unless the token is bound to one.
    #[arg(long, value_name = "NAME")]
    pub node: Option<NodeName>,
    /// The node's own addresses; those of this host's interfaces towards the master by default.
    #[arg(long = "address", value_name = "ADDRESS")]
    pub addresses: Vec<IpAddr>,
    /// The CA of the front end's certificate; the configuration's call_home_https.ca by default, else the system's.
    #[arg(long, value_name = "FILE")]
    pub https_ca: Option<PathBuf>,
    /// Where keys and certificates are kept; the configuration's state_dir by default.
    #[arg(long, value_name = "DIRECTORY")]
    pub state_dir: Option<PathBuf>,
}

/// Writes a completion script to standard output.
pub fn completions(shell: clap_complete::Shell) {
    clap_complete::generate(shell, &mut Cli::command(), "node-agent", &mut std::io::stdout());
}
