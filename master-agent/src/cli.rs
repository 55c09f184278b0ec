//! The command line, and the commands that ask the running agent.

use std::{
    io::{self, BufRead},
    net::SocketAddr,
    path::PathBuf,
    time::Duration,
};

use anyhow::Context;
use clap::{Args, CommandFactory, Parser, Subcommand, ValueEnum};
use proto::{NodeName, revocation::krl::Entry};
use rustix::termios::{self, LocalModes, OptionalActions};
use zeroize::Zeroizing;

use crate::{
    admin_client::{AdminClient, explain_path},
    compare::CompareArgs,
    egress::users,
    identity::revocation,
    page,
    sshd_config::SshdConfigArgs,
    table::{print_nodes, print_table},
    top::TopArgs,
};

/// Runs beside kube-apiserver: keeps SSH tunnels to every node and carries connections over them.
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
    /// Run the agent until SIGTERM; SIGHUP reads the inventory again.
    Run,
    /// Read the configuration and everything it names, print every error, and exit with 78 if there is one.
    CheckConfig,
    /// Tokens with which a new host joins.
    #[command(subcommand)]
    Token(TokenCommand),
    /// The nodes of the running agent.
    #[command(subcommand)]
    Node(NodeCommand),
    /// Print what makes a plain OpenSSH sshd a node: a script to run on that host as root.
    SshdConfig(SshdConfigArgs),
    /// Say which way a target would be reached, and why.
    Explain {
        /// The target, for instance n1:10250, 10.244.1.7:8080 or [fd00::1]:443.
        #[arg(value_name = "HOST:PORT")]
        target: String,
        #[command(flatten)]
        output: OutputArgs,
    },
    /// Print the address under which a browser on this host, or one behind `ssh -L`, shows the running agent's page.
    Page,
    /// The nodes of the running agent, live.
    Top(TopArgs),
    /// Measure targets over their tunnels and directly, pair by pair: what a tunnel costs.
    Compare(Box<CompareArgs>),
    /// Sign a person's SSH key, for `ssh -L`, `-W` and `-J` through nodes within their policies.
    SignUser(SignUserArgs),
    /// Print a user's line for `socks5.tcp.users_file`. The password is a line of standard input.
    HashPassword {
        /// The user's name.
        name: String,
    },
    /// Revoke SSH certificates of masters and people: nodes cut their sessions and refuse them.
    Revoke(RevokeArgs),
    /// Print a completion script for a shell.
    Completions {
        /// The shell that is to read it.
        shell: clap_complete::Shell,
    },
}

#[derive(Debug, Subcommand)]
pub enum TokenCommand {
    /// Make a token, and print the line to run on the new host.
    Create(TokenCreateArgs),
    /// List the tokens that have not expired (never their secrets).
    List(OutputArgs),
    /// Revoke a token by its id.
    Revoke {
        /// As `token list` shows it.
        id: String,
    },
}

#[derive(Debug, Args)]
pub struct TokenCreateArgs {
    /// The only node name the token is good for. Needed to join a node anew that has joined before.
    #[arg(long, value_name = "NAME")]
    pub node: Option<NodeName>,
    /// How long it can be used, for instance 30m.
    #[arg(long, default_value = "1h", value_parser = humantime::parse_duration)]
    pub ttl: Duration,
    /// The master's call-home address as the new host sees it; the host name and the configured port by default. With
    /// https:// before it, that of the front end.
    #[arg(long, value_name = "HOST:PORT")]
    pub address: Option<proto::call_home::Master>,
}

#[derive(Debug, Subcommand)]
pub enum NodeCommand {
    /// List the nodes and their tunnels.
    List(OutputArgs),
    /// Forget the host key that a node joined with, or that was trusted on first use, so that another may take its
    /// place. The key and its certificate are good for nothing from then on.
    Forget {
        /// The node's name.
        node: NodeName,
    },
}

#[derive(Debug, Args)]
pub struct OutputArgs {
    /// The form of the output.
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
    /// The person's public key ("-" is standard input).
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
    /// Certificates with this serial number, or from FIRST to LAST; `ssh-keygen -L` and the log of a node show it.
    #[arg(long, value_name = "N|FIRST-LAST", value_parser = revocation::serials, group = "what")]
    pub serial: Vec<Entry>,
    /// Certificates with this key id: a person's login name, or master-agent:HOST. Also those that are signed later.
    #[arg(long, value_name = "ID", group = "what")]
    pub key_id: Vec<String>,
    /// All certificates of a key: a file with the public key or a certificate of it ("-" is standard input), or its
    /// fingerprint.
    #[arg(long, value_name = "FILE|SHA256:...", group = "what")]
    pub key: Vec<String>,
    /// All that an OpenSSH key revocation list has of keys and of this master's user CA.
    #[arg(long, value_name = "KRL", group = "what")]
    pub import: Vec<PathBuf>,
    /// Take out of the list what is named, rather than add it.
    #[arg(long, conflicts_with = "import")]
    pub remove: bool,
    /// Print what is revoked.
    #[arg(long, group = "what")]
    pub list: bool,
    /// Write the list to FILE as an OpenSSH key revocation list, and its signature to FILE.sig.
    #[arg(long, value_name = "FILE", group = "what")]
    pub export: Option<PathBuf>,
    #[command(flatten)]
    pub output: OutputArgs,
}

/// Writes a completion script to standard output.
pub fn completions(shell: clap_complete::Shell) {
    clap_complete::generate(shell, &mut Cli::command(), "master-agent", &mut std::io::stdout());
}

/// `hash-password`. The password is no argument, as those are for every process to see.
pub fn hash_password(name: &str) -> anyhow::Result<()> {
    let password = read_password().context("can't read standard input")?;
    println!("{}", users::line(name, password.trim_end_matches(['\r', '\n']).as_bytes())?);
    Ok(())
}

/// One line of standard input; a terminal does not show it.
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

/// `node list`.
pub async fn node_list(agent: &AdminClient, output: Output) -> anyhow::Result<()> {
    match output {
        Output::Json => println!("{}", agent.get("/nodes").await?),
        Output::Table => print_nodes(&agent.nodes().await?),
    }
    Ok(())
}

/// `explain`.
pub async fn explain(agent: &AdminClient, target: &str, output: Output) -> anyhow::Result<()> {
    match output {
        Output::Json => println!("{}", agent.get(&explain_path(target)).await?),
        Output::Table => {
            let e = agent.explain(target).await?;
            let none = || "-".to_owned();
            let ms = |us: u64| format!("{:.2}ms", us as f64 / 1000.0);
            let mut rows = vec![
                ["target".to_owned(), e.target],
                ["reason".to_owned(), if e.reason.is_empty() { none() } else { e.reason }],
            ];
            for way in e.candidates {
                let round_trip = way.round_trip_microseconds.map(|us| format!(", round trip {}", ms(us)));
                let text = format!(
                    "{} for {}, {}{}",
                    way.node,
                    way.target,
                    way.state.unwrap_or_else(|| "not known here".to_owned()),
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
    Ok(())
}

/// `page`.
pub async fn page(agent: &AdminClient, listen: SocketAddr) -> anyhow::Result<()> {
    println!("http://{listen}{}login?token={}", page::ADMIN, agent.page_token().await?);
    Ok(())
}
