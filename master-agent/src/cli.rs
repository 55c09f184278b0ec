//! The command line, and the commands that ask the running agent.

use std::{
    io::{self, BufRead},
    path::{Path, PathBuf},
    time::{Duration, SystemTime},
};

use anyhow::{Context, bail};
use bytes::Bytes;
use clap::{Args, CommandFactory, Parser, Subcommand, ValueEnum};
use http_body_util::{BodyExt, Full};
use hyper::Method;
use hyper_util::rt::TokioIo;
use percent_encoding::{NON_ALPHANUMERIC, utf8_percent_encode};
use proto::{NodeName, io::tasks::Tasks, revocation::krl::Entry};
use rustix::termios::{self, LocalModes, OptionalActions};
use tokio::net::UnixStream;
use zeroize::Zeroizing;

use crate::{
    agent::Explanation, compare::CompareArgs, config::Config, front_door::users, identity::revocation, page,
    registry::NodeStatus, top::TopArgs,
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
pub struct SshdConfigArgs {
    /// The node's name in the inventory.
    #[arg(value_name = "NODE")]
    pub node: NodeName,
    /// The host's public key, for instance its /etc/ssh/ssh_host_ed25519_key.pub ("-" is standard input).
    #[arg(long, value_name = "FILE")]
    pub host_key: PathBuf,
    /// Where that key's private half is on the host.
    #[arg(long, default_value = "/etc/ssh/ssh_host_ed25519_key", value_name = "PATH")]
    pub host_key_path: PathBuf,
    /// The kubelet's port on the node's addresses.
    #[arg(long, default_value_t = 10250)]
    pub kubelet_port: u16,
    /// Further targets to permit, HOST:PORT.
    #[arg(long = "allow", value_name = "HOST:PORT")]
    pub allow: Vec<proto::Target>,
    /// How long the host certificate is valid; sshd nodes get a new one by running this again.
    #[arg(long, default_value = "365d", value_parser = humantime::parse_duration)]
    pub ttl: Duration,
    /// Where the CA, the certificate and the list of principals go on the host.
    #[arg(long, default_value = "/etc/ssh/master-agent", value_name = "PATH")]
    pub directory: PathBuf,
    /// Where the drop-in goes on the host.
    #[arg(long, default_value = "/etc/ssh/sshd_config.d/10-master-agent.conf", value_name = "PATH")]
    pub drop_in: PathBuf,
    /// Print a script that only writes the files: the account, the check by `sshd -t` and the reload are left to
    /// whoever runs it.
    #[arg(long)]
    pub files_only: bool,
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

/// Reads a file, or standard input for "-".
pub fn read_text(path: &Path) -> anyhow::Result<String> {
    if path == Path::new("-") {
        return std::io::read_to_string(std::io::stdin()).context("can't read standard input");
    }
    std::fs::read_to_string(path).with_context(|| format!("can't read {}", path.display()))
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
pub async fn node_list(config: &Config, output: Output) -> anyhow::Result<()> {
    let body = ask(config, "/nodes").await?;
    match output {
        Output::Json => println!("{body}"),
        Output::Table => print_nodes(&serde_json::from_str::<Vec<NodeStatus>>(&body)?),
    }
    Ok(())
}

pub fn print_nodes(nodes: &[NodeStatus]) {
    let mut rows = vec![
        ["NODE", "STATE", "ROLE", "DIRECTION", "KIND", "STREAMS", "RTT", "SINCE", "PEER"].map(str::to_owned),
    ];
    for node in nodes {
        if node.tunnels.is_empty() {
            let dash = || "-".to_owned();
            rows.push([
                node.name.to_string(),
                node.state.clone(),
                dash(),
                dash(),
                dash(),
                dash(),
                dash(),
                dash(),
                node.reason.clone(),
            ]);
        }
        for tunnel in &node.tunnels {
            let since = SystemTime::UNIX_EPOCH + Duration::from_secs(tunnel.since_unix_seconds);
            rows.push([
                node.name.to_string(),
                node.state.clone(),
                tunnel.role.clone(),
                tunnel.direction.clone(),
                tunnel.kind.clone(),
                tunnel.streams.to_string(),
                tunnel
                    .round_trip_microseconds
                    .map_or_else(|| "-".to_owned(), |us| format!("{:.1}ms", us as f64 / 1000.0)),
                humantime::format_rfc3339_seconds(since).to_string(),
                tunnel.peer.map_or_else(|| "-".to_owned(), |peer| peer.to_string()),
            ]);
        }
    }
    print_table(&rows);
}

/// Prints rows in columns that are as wide as they need to be.
pub fn print_table<const N: usize>(rows: &[[String; N]]) {
    let width =
        |column: usize| rows.iter().filter_map(|row| row.get(column)).map(String::len).max().unwrap_or(0);
    let widths: Vec<usize> = (0..N).map(width).collect();
    for row in rows {
        let cells: Vec<String> =
            row.iter().zip(&widths).map(|(cell, width)| format!("{cell:<width$}")).collect();
        println!("{}", cells.join("  ").trim_end());
    }
}

/// `explain`.
pub async fn explain(config: &Config, target: &str, output: Output) -> anyhow::Result<()> {
    let body = ask(config, &format!("/explain?{}", utf8_percent_encode(target, NON_ALPHANUMERIC))).await?;
    match output {
        Output::Json => println!("{body}"),
        Output::Table => {
            let e: Explanation = serde_json::from_str(&body)?;
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
pub async fn page(config: &Config) -> anyhow::Result<()> {
    let token = send(config, Method::POST, "/page/token", String::new()).await?;
    println!("http://{}{}login?token={token}", config.admin.listen, page::ADMIN);
    Ok(())
}

/// Asks the running agent over its admin socket.
pub async fn ask(config: &Config, path: &str) -> anyhow::Result<String> {
    send(config, Method::GET, path, String::new()).await
}

/// Tells the running agent something over its admin socket; gives its answer.
pub async fn send(config: &Config, method: Method, path: &str, body: String) -> anyhow::Result<String> {
    let socket = &config.admin.socket;
    let stream = UnixStream::connect(socket).await.with_context(|| {
        format!("can't reach the running agent at {}: does `master-agent run` run?", socket.display())
    })?;
    let (mut sender, connection) = hyper::client::conn::http1::handshake(TokioIo::new(stream)).await?;
    let tasks = Tasks::new();
    tasks.spawn(connection);
    let request = hyper::Request::builder()
        .method(method)
        .uri(path)
        .header(hyper::header::HOST, "master-agent")
        .body(Full::new(Bytes::from(body)))?;
    let response = sender.send_request(request).await?;
    let status = response.status();
    let body = response.into_body().collect().await?.to_bytes();
    let body = String::from_utf8_lossy(&body).into_owned();
    if !status.is_success() {
        bail!("{}", body.trim());
    }
    Ok(body)
}
