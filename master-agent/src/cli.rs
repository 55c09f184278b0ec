//! The command line, and the commands that query the running agent.

use std::{
    io::{self, BufRead},
    net::SocketAddr,
    path::PathBuf,
    time::Duration,
};

use anyhow::Context;
use clap::{Args, CommandFactory, Parser, Subcommand, ValueEnum};
use proto::{NodeName, revocation::krl::Entry};
use proto_net::{handover::reload::Reloaded, stdout};
use rustix::termios::{self, LocalModes, OptionalActions};
use zeroize::Zeroizing;

use crate::{
    admin_api::Explanation,
    admin_client::AdminClient,
    compare::CompareArgs,
    drain::DrainArgs,
    egress::socks5::users,
    identity::revocation,
    page,
    sshd_config::SshdConfigArgs,
    table::{print_nodes, print_table},
    top::TopArgs,
};

/// Runs beside kube-apiserver, keeps SSH tunnels to every node and carries connections over them.
#[derive(Debug, Parser)]
#[command(name = "master-agent", version, propagate_version = true)]
pub struct Cli {
    /// The configuration file.
    #[arg(
        long,
        short,
        global = true,
        default_value = "/etc/master-agent/master-agent.yaml",
        value_name = "FILE"
    )]
    pub config: PathBuf,
    #[command(subcommand)]
    pub command: Command,
}

#[derive(Debug, Subcommand)]
pub enum Command {
    /// Run the agent until SIGTERM. SIGHUP reads the inventory and the configuration again.
    Run(RunArgs),
    /// Have the running agent start its program and configuration anew, and hand over to the new process once that is
    /// ready. Connections are neither refused nor cut. Exit with 1 and the reason if the new process can't serve.
    Reload,
    /// Check the configuration and the files that it names, print every error, and exit with 78 if there is one.
    CheckConfig {
        /// Print a commented configuration with every field and its default, without reading the file.
        #[arg(long)]
        print_defaults: bool,
    },
    /// Manage the tokens with which new hosts join.
    #[command(subcommand)]
    Token(TokenCommand),
    /// List, drain and forget nodes.
    #[command(subcommand)]
    Node(NodeCommand),
    /// Print a script that makes a host with a plain OpenSSH sshd a node. Run it as root on that host.
    SshdConfig(SshdConfigArgs),
    /// Explain how a target is reached, and dial it. Exit with 1 if there is no route to it or no tunnel.
    Explain {
        /// The target, for example n1:10250, 10.244.1.7:8080 or [fd00::1]:443.
        #[arg(value_name = "HOST:PORT")]
        target: String,
        #[command(flatten)]
        output: OutputArgs,
    },
    /// Print a login URL for the running agent's page, for a browser on this host or behind `ssh -L`.
    Page,
    /// Show the nodes of the running agent live.
    Top(TopArgs),
    /// Measure what a tunnel costs: the same work over tunnels and directly, pair by pair.
    Compare(Box<CompareArgs>),
    /// Sign a person's SSH key for `ssh -L`, `-W` and `-J` through nodes, within their policies.
    SignUser(SignUserArgs),
    /// Print a user's line for `socks5.tcp.users_file`. The password is read from standard input.
    HashPassword {
        /// The user's name.
        name: String,
    },
    /// Revoke SSH certificates of masters and people. Nodes close their sessions and refuse new ones.
    Revoke(RevokeArgs),
    /// Write a backup of the state directory to FILE. The agent may run meanwhile. The backup holds the private keys of
    /// both CAs.
    Backup {
        /// The file to write. It must not exist.
        #[arg(value_name = "FILE")]
        file: PathBuf,
    },
    /// Restore a backup into an empty state directory. The agent must not run.
    Restore {
        /// The file that `backup` has written.
        #[arg(value_name = "FILE")]
        file: PathBuf,
    },
    /// Print a completion script for a shell.
    Completions {
        /// The shell.
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

#[derive(Debug, Subcommand)]
pub enum TokenCommand {
    /// Create a token and print the command to run on the new host.
    Create(TokenCreateArgs),
    /// List the tokens that have not expired, without their secrets.
    List(OutputArgs),
    /// Revoke a token.
    Revoke {
        /// The token's id, as shown by `token list`.
        id: String,
    },
}

#[derive(Debug, Args)]
pub struct TokenCreateArgs {
    /// The only node name that the token is valid for. Required for a node that has joined before.
    #[arg(long, value_name = "NAME")]
    pub node: Option<NodeName>,
    /// How long the token is valid, for example 30m.
    #[arg(long, default_value = "1h", value_parser = humantime::parse_duration)]
    pub ttl: Duration,
    /// The master's call-home address as the new host sees it, or with https:// the address of the front end. Defaults
    /// to the host name and the configured port.
    #[arg(long, value_name = "HOST:PORT")]
    pub address: Option<proto::call_home::Master>,
}

#[derive(Debug, Subcommand)]
pub enum NodeCommand {
    /// List the nodes and their tunnels.
    List(OutputArgs),
    /// Take a node out of use: other nodes get its streams if they can carry them. List the streams that are left, and wait
    /// for them. At the deadline, cut what is left; the node then gets no streams.
    Drain(DrainArgs),
    /// Undo a drain.
    Undrain {
        /// The node's name.
        node: NodeName,
    },
    /// Forget the host key that a node joined with, or that was trusted on first use. The key and its certificate are no
    /// longer accepted, and another key may take their place.
    Forget {
        /// The node's name.
        node: NodeName,
    },
}

#[derive(Debug, Args)]
pub struct OutputArgs {
    /// The output format.
    #[arg(long, short, value_enum, default_value_t)]
    pub output: Output,
}

#[derive(Clone, Copy, Debug, Default, ValueEnum)]
pub enum Output {
    #[default]
    Table,
    Json,
}

#[derive(Debug, Args)]
pub struct SignUserArgs {
    /// The login name, which becomes the certificate's principal.
    #[arg(value_name = "LOGIN")]
    pub login: String,
    /// The file with the person's public key ("-" for standard input).
    #[arg(long, value_name = "FILE")]
    pub key: PathBuf,
    /// How long the certificate is valid.
    #[arg(long, default_value = "8h", value_parser = humantime::parse_duration)]
    pub ttl: Duration,
}

#[derive(Debug, Args)]
#[command(
    group = clap::ArgGroup::new("what").required(true).multiple(true),
    override_usage = "master-agent revoke [--remove] --serial N | --key-id ID | --key KEY ...\n       \
        master-agent revoke --import KRL | --list | --export FILE"
)]
pub struct RevokeArgs {
    /// Revoke certificates by serial number, or from FIRST to LAST. `ssh-keygen -L` and the logs of nodes show it.
    #[arg(long, value_name = "N|FIRST-LAST", value_parser = revocation::serials, group = "what")]
    pub serial: Vec<Entry>,
    /// Revoke certificates by key id (a person's login name, or master-agent:HOST), including those signed later.
    #[arg(long, value_name = "ID", group = "what")]
    pub key_id: Vec<String>,
    /// Revoke all certificates of a key: a file with the public key or one of its certificates ("-" for standard input),
    /// or its fingerprint.
    #[arg(long, value_name = "FILE|SHA256:...", group = "what")]
    pub key: Vec<String>,
    /// Revoke what an OpenSSH key revocation list contains for keys and for this master's user CA.
    #[arg(long, value_name = "KRL", group = "what")]
    pub import: Vec<PathBuf>,
    /// Remove the named entries from the list instead of adding them.
    #[arg(long, conflicts_with = "import")]
    pub remove: bool,
    /// Print the list.
    #[arg(long, group = "what")]
    pub list: bool,
    /// Write the list to FILE as an OpenSSH key revocation list, and its signature to FILE.sig.
    #[arg(long, value_name = "FILE", group = "what")]
    pub export: Option<PathBuf>,
    #[command(flatten)]
    pub output: OutputArgs,
}

/// Runs `reload`.
pub async fn reload(agent: &AdminClient) -> anyhow::Result<()> {
    let Reloaded { pid, version, former_pid, former_callers } = agent.reload().await?;
    stdout::print_line(format_args!("process {pid} of version {version} serves"));
    if former_callers > 0 {
        stdout::print_line(format_args!("process {former_pid} ends once its {former_callers} callers have"));
    }
    Ok(())
}

/// Writes a completion script to standard output.
pub fn completions(shell: clap_complete::Shell) {
    let mut script = Vec::new();
    clap_complete::generate(shell, &mut Cli::command(), "master-agent", &mut script);
    stdout::print(String::from_utf8_lossy(&script));
}

/// Runs `hash-password`. The password is not an argument, since every process can see those.
pub fn hash_password(name: &str) -> anyhow::Result<()> {
    let password = read_password().context("can't read standard input")?;
    stdout::print_line(users::line(name, password.trim_end_matches(['\r', '\n']).as_bytes())?);
    Ok(())
}

/// Reads a line of standard input. A terminal does not show it.
fn read_password() -> io::Result<Zeroizing<String>> {
    let stdin = io::stdin();
    let terminal = termios::tcgetattr(&stdin).ok();
    if let Some(shown) = &terminal {
        let mut hidden = shown.clone();
        hidden.local_modes.remove(LocalModes::ECHO);
        termios::tcsetattr(&stdin, OptionalActions::Flush, &hidden)?;
        eprint!("Password: ");
    }
    let mut line = Zeroizing::new(String::new());
    let read = stdin.lock().read_line(&mut line);
    if let Some(shown) = &terminal {
        termios::tcsetattr(&stdin, OptionalActions::Flush, shown)?;
        eprintln!();
    }
    read.map(|_| line)
}

/// Runs `node list`.
pub async fn node_list(agent: &AdminClient, output: Output) -> anyhow::Result<()> {
    match output {
        Output::Json => stdout::print_line(agent.nodes_json().await?),
        Output::Table => print_nodes(&agent.nodes().await?),
    }
    Ok(())
}

/// Runs `explain`. Returns whether there is a route to the target and a tunnel.
pub async fn explain(agent: &AdminClient, target: &str, output: Output) -> anyhow::Result<bool> {
    let json = agent.explain_json(target).await?;
    let e: Explanation = serde_json::from_str(&json)?;
    let reachable = e.has_tunnel();
    match output {
        Output::Json => stdout::print_line(json),
        Output::Table => {
            let none = || "-".to_owned();
            let ms = |us: u64| format!("{:.2}ms", us as f64 / 1000.0);
            let mut rows = vec![
                ["target".to_owned(), e.target],
                ["reason".to_owned(), if e.reason.is_empty() { none() } else { e.reason }],
            ];
            for candidate in e.candidates {
                let round_trip =
                    candidate.round_trip_microseconds.map(|us| format!(", round trip {}", ms(us)));
                let text = format!(
                    "{} for {}, {}{}",
                    candidate.node,
                    candidate.target,
                    candidate.state.unwrap_or_else(|| "not known here".to_owned()),
                    round_trip.unwrap_or_default()
                );
                rows.push(["candidate".to_owned(), text]);
            }
            rows.extend([
                ["node".to_owned(), e.node.map_or_else(none, |n| n.to_string())],
                ["verdict".to_owned(), e.verdict],
                ["route".to_owned(), ms(e.route_microseconds)],
                ["dial".to_owned(), e.dial_microseconds.map_or_else(none, ms)],
            ]);
            print_table(&rows);
        }
    }
    Ok(reachable)
}

/// Runs `page`.
pub async fn page(agent: &AdminClient, listen: SocketAddr) -> anyhow::Result<()> {
    let token = agent.page_token().await?;
    stdout::print_line(format_args!("http://{listen}{}login?token={token}", page::ADMIN));
    Ok(())
}
