//! The program master-agent: reads the command line and the configuration, then runs the command.

use std::{
    path::{Path, PathBuf},
    process::ExitCode,
    time::SystemTime,
};

use anyhow::{Context, bail};
use clap::Parser;
use master_agent::{
    admin_client::AdminClient,
    app,
    cli::{
        self, Cli, Command, NodeCommand, Output, RevokeArgs, RunArgs, SignUserArgs, TokenCommand,
        TokenCreateArgs,
    },
    compare::{self, Configured},
    config::Config,
    drain,
    identity::{backup, fingerprint, host_name, revocation, state::MasterState, store::Store, token},
    input::read_text,
    routing::inventory::Inventory,
    sshd_config::{self, SshdConfigArgs},
    table::print_table,
    top,
};
use proto::{
    call_home::Master,
    revocation::krl::{Entry, Krl},
};
use proto_net::{
    descriptors,
    handover::{Beginning, Program, Role},
    stdout,
    telemetry::Logs,
};
use russh::keys::PublicKey;

/// sysexits.h: the configuration has errors.
const EX_CONFIG: u8 = 78;

fn main() -> ExitCode {
    let cli = Cli::parse();
    if let Command::Completions { shell } = cli.command {
        cli::completions(shell);
        return ExitCode::SUCCESS;
    }
    if let Command::HashPassword { name } = &cli.command {
        return done(cli::hash_password(name).map(|()| ExitCode::SUCCESS));
    }
    if let Command::Run(RunArgs { start_next: true, .. }) = cli.command {
        return done(start_next());
    }
    let takes_over = matches!(cli.command, Command::Run(RunArgs { take_over: true, .. }));
    let role = if takes_over { Role::Next } else { Role::First };
    if let Command::CheckConfig { print_defaults: true } = cli.command {
        stdout::print(proto_config::defaults(&Config::describe()));
        return ExitCode::SUCCESS;
    }
    // A mistake in the inventory must not prevent queries to the running agent.
    let load = match cli.command {
        Command::Run(_) | Command::CheckConfig { .. } => Config::load,
        Command::Token(_)
        | Command::Node(_)
        | Command::SshdConfig(_)
        | Command::Explain { .. }
        | Command::Compare(_)
        | Command::Page
        | Command::Reload
        | Command::Top(_)
        | Command::SignUser(_)
        | Command::HashPassword { .. }
        | Command::Revoke(_)
        | Command::Backup { .. }
        | Command::Restore { .. }
        | Command::Completions { .. } => Config::load_alone,
    };
    let config = match load(&cli.config) {
        Ok(config) => config,
        Err(errors) => {
            role.refuse(&errors);
            eprintln!("{errors}");
            return ExitCode::from(EX_CONFIG);
        }
    };
    if let Command::Run(_) = cli.command {
        return run(config, role, cli.config);
    }
    done(block_on(command(cli, config)))
}

/// Runs the agent. The error that ends it goes through the log, so that nothing waits for whoever reads it.
fn run(config: Config, role: Role, file: PathBuf) -> ExitCode {
    let (logs, beginning) =
        match (Logs::start(config.log.format, &config.log.level), Beginning::new(role, file)) {
            (Ok(logs), Ok(beginning)) => (logs, beginning),
            (Err(e), _) | (_, Err(e)) => return done(Err(e.into())),
        };
    descriptors::raise_limit();
    match block_on(app::run(config, beginning, logs.lines_lost())) {
        Ok(()) => ExitCode::SUCCESS,
        Err(e) => {
            role.refuse(&format_args!("{e:#}"));
            logs.print(format_args!("master-agent: {e:#}"));
            ExitCode::FAILURE
        }
    }
}

/// Starts the process that takes over.
fn start_next() -> anyhow::Result<ExitCode> {
    Program::current()?.run_next()?;
    Ok(ExitCode::SUCCESS)
}

fn done(result: anyhow::Result<ExitCode>) -> ExitCode {
    result.unwrap_or_else(|e| {
        eprintln!("master-agent: {e:#}");
        ExitCode::FAILURE
    })
}

fn block_on<T>(work: impl Future<Output = anyhow::Result<T>>) -> anyhow::Result<T> {
    let runtime = runtime()?;
    let result = runtime.block_on(work);
    // A lookup or the read of a file that is still under way must not delay the exit.
    runtime.shutdown_background();
    result
}

/// The runtime of the tunnels has half of the cores: the others are for kube-apiserver, and the front end has its own
/// threads. With one thread nothing is handed over between threads, and what streams send together leaves together.
fn runtime() -> std::io::Result<tokio::runtime::Runtime> {
    match std::thread::available_parallelism().map_or(1, |n| n.get() / 2) {
        0 | 1 => tokio::runtime::Builder::new_current_thread().enable_all().build(),
        threads => tokio::runtime::Builder::new_multi_thread().worker_threads(threads).enable_all().build(),
    }
}

async fn command(cli: Cli, config: Config) -> anyhow::Result<ExitCode> {
    let agent = AdminClient::new(&config.admin.socket);
    let result = match cli.command {
        Command::CheckConfig { .. } => {
            stdout::print_line(format_args!("{}: ok", cli.config.display()));
            for note in config.notes() {
                eprintln!("{}: note: {note}", cli.config.display());
            }
            Ok(())
        }
        Command::Node(NodeCommand::List(args)) => cli::node_list(&agent, args.output).await,
        Command::Node(NodeCommand::Drain(args)) => drain::drain(&agent, args).await,
        Command::Node(NodeCommand::Undrain { node }) => drain::undrain(&agent, &node).await,
        Command::Node(NodeCommand::Forget { node }) => {
            if !MasterState::open(&config.state_dir)?.store.forget_node(&node)? {
                bail!("no key of node {node} is known");
            }
            Ok(())
        }
        Command::Explain { target, output } => {
            let reachable = cli::explain(&agent, &target, output.output).await?;
            return Ok(if reachable { ExitCode::SUCCESS } else { ExitCode::FAILURE });
        }
        Command::Page => cli::page(&agent, config.admin.listen).await,
        Command::Reload => cli::reload(&agent).await,
        Command::Top(args) => top::top(&agent, args).await,
        Command::Compare(args) => {
            let urls = config.proxy_urls.as_ref();
            let configured = Configured {
                agent,
                connect: config.http_connect.unix.as_ref().map(|unix| unix.path.clone()),
                kubelet_ca: urls.and_then(|urls| urls.kubelet_ca.clone()),
                kubelet_client: urls.and_then(|urls| urls.kubelet_client.clone()),
            };
            compare::compare(&configured, *args).await
        }
        Command::Token(TokenCommand::Create(args)) => token_create(&config, args),
        Command::Token(TokenCommand::List(args)) => token_list(&config, args.output),
        Command::Token(TokenCommand::Revoke { id }) => {
            token::revoke(&MasterState::open(&config.state_dir)?.store, &id)
        }
        Command::SshdConfig(args) => print_sshd_config(&config, args),
        Command::SignUser(args) => sign_user(&config, args),
        Command::Revoke(args) => revoke(&config, args),
        Command::Backup { file } => backup::write(&config.state_dir, &file, SystemTime::now()),
        Command::Restore { file } => restore(&agent, &config, &file).await,
        Command::Run(_) | Command::HashPassword { .. } | Command::Completions { .. } => Ok(()),
    };
    result.map(|()| ExitCode::SUCCESS)
}

async fn restore(agent: &AdminClient, config: &Config, file: &Path) -> anyhow::Result<()> {
    if agent.is_running().await {
        bail!("the agent runs: stop it first, and move its state directory away");
    }
    let made = backup::restore(&config.state_dir, file)?;
    let (file, directory) = (file.display(), config.state_dir.display());
    stdout::print_line(format_args!("restored {file} of {made} into {directory}"));
    Ok(())
}

fn token_create(config: &Config, args: TokenCreateArgs) -> anyhow::Result<()> {
    let https =
        config.front_end.as_ref().filter(|_| config.calls_over_https()).map(|f| ("https://", f.listen));
    let Some((scheme, listen)) = config.call_home.as_ref().map(|c| ("", c.listen)).or(https) else {
        bail!(
            "new hosts join where nodes call home, but neither `call_home:` nor `front_end:` with `call_home: true` is configured"
        );
    };
    if matches!(args.address, Some(Master::Https(_))) && https.is_none() {
        bail!("hosts cannot join over HTTPS: `front_end:` with `call_home: true` is not configured");
    }
    let MasterState { authorities, store } = MasterState::open(&config.state_dir)?;
    let address = match args.address {
        Some(address) => address.to_string(),
        None if listen.ip().is_unspecified() => format!("{scheme}{}:{}", host_name()?, listen.port()),
        None => format!("{scheme}{listen}"),
    };
    // A front end admits a host with a node's credential to that node only, and hears the name before the token.
    let node = args.node.as_ref().filter(|_| address.starts_with("https://"));
    let node = node.map(|node| format!(" --node {node}")).unwrap_or_default();
    let token = token::create(&store, args.node, args.ttl, SystemTime::now())?;
    let (pin, token) = (authorities.user_ca_pin(), token.reveal());
    stdout::print_line(format_args!("node-agent join {address} --ca-pin {pin}{node} --token {token}"));
    Ok(())
}

fn token_list(config: &Config, output: Output) -> anyhow::Result<()> {
    let tokens = token::list(&MasterState::open(&config.state_dir)?.store, SystemTime::now())?;
    match output {
        Output::Json => stdout::print_line(serde_json::to_string(&tokens)?),
        Output::Table => {
            let mut rows = vec![["ID", "NODE", "EXPIRES", "USED BY"].map(str::to_owned)];
            rows.extend(tokens.into_iter().map(|t| {
                let expires = humantime::format_rfc3339_seconds(t.expires).to_string();
                let dash = || "-".to_owned();
                [t.id, t.node.map_or_else(dash, |n| n.to_string()), expires, t.used_by.unwrap_or_else(dash)]
            }));
            print_table(&rows);
        }
    }
    Ok(())
}

fn print_sshd_config(config: &Config, args: SshdConfigArgs) -> anyhow::Result<()> {
    let Some(path) = &config.inventory else { bail!("`inventory:` is not configured") };
    let inventory = Inventory::load(path)?;
    let Some(node) = inventory.node(&args.node) else {
        bail!("node {} is not in {}: add it there first", args.node, path.display());
    };
    let name = &node.name;
    if node.dial.is_none() {
        bail!("node {name} has no `dial:` in {}, and an sshd can't call home", path.display());
    }
    let now = SystemTime::now();
    sshd_config::valid_until(now, args.ttl)?;
    let MasterState { authorities, store } = MasterState::open(&config.state_dir)?;
    let host_key = PublicKey::from_openssh(read_text(&args.host_key)?.trim())
        .with_context(|| format!("{} holds no OpenSSH public key", args.host_key.display()))?;
    let (known, given) = (store.joined_key(name), fingerprint(&host_key));
    if let Some(known) = known.filter(|known| *known != given) {
        bail!(
            "node {name} is known by the key {known}, and {} holds {given}. If the node has a new key, run `master-agent node forget {name}` first, which ends its tunnels",
            args.host_key.display()
        );
    }
    let revoked = store.revocations()?;
    let script = sshd_config::generate(&authorities, node, &host_key, revoked.as_deref(), &args, now)?;
    store.remember_node(name, &host_key, &node.addresses)?;
    stdout::print(&script);
    Ok(())
}

fn sign_user(config: &Config, args: SignUserArgs) -> anyhow::Result<()> {
    let MasterState { authorities, store } = MasterState::open(&config.state_dir)?;
    let key = PublicKey::from_openssh(read_text(&args.key)?.trim())
        .with_context(|| format!("{} holds no OpenSSH public key", args.key.display()))?;
    let principals = [args.login.clone()];
    let certificate = authorities.sign_user(&key, &principals, &args.login, SystemTime::now(), args.ttl)?;
    if let Some(by) = revocation::stored(&store)?.revokes(&certificate) {
        bail!(
            "nodes would refuse the certificate, since it is revoked by {by}: see `master-agent revoke --list`"
        );
    }
    stdout::print_line(certificate.to_openssh()?);
    Ok(())
}

fn revoke(config: &Config, args: RevokeArgs) -> anyhow::Result<()> {
    let MasterState { authorities, store } = MasterState::open(&config.state_dir)?;
    let ca = authorities.user_ca();
    let mut entries = args.serial;
    entries.extend(args.key_id.into_iter().map(|id| Entry::KeyId(id.into_bytes())));
    for key in &args.key {
        entries.push(revocation::key_entry(key, |path| read_text(path.as_ref()))?);
    }
    let mut imported = Vec::new();
    for path in &args.import {
        let bytes = std::fs::read(path).with_context(|| format!("can't read {}", path.display()))?;
        imported.push(Krl::decode(&bytes).with_context(|| path.display().to_string())?);
    }
    if !entries.is_empty() || !imported.is_empty() {
        let changed = revocation::change(&store, ca, SystemTime::now(), &|list| {
            for entry in &entries {
                if args.remove {
                    list.remove(ca, entry);
                } else {
                    list.add(ca, entry.clone())?;
                }
            }
            for other in &imported {
                let left_out = list.merge(ca, other.clone())?;
                if left_out > 0 {
                    eprintln!("skipped the entries of {left_out} other CAs");
                }
            }
            Ok(())
        })?;
        match changed {
            Some(version) => eprintln!("version {version}; the running agent distributes it to its nodes"),
            None => eprintln!("nothing changed"),
        }
    }
    let list = revocation::stored(&store)?;
    if args.list {
        let shown = list.entries().map(|entry| revocation::show(&entry));
        match args.output.output {
            Output::Json => {
                let entries: Vec<_> =
                    shown.map(|(kind, value)| serde_json::json!({"kind": kind, "value": value})).collect();
                stdout::print_line(serde_json::json!({"version": list.version, "entries": entries}));
            }
            Output::Table => {
                let mut rows = vec![["KIND", "VALUE"].map(str::to_owned)];
                rows.extend(shown.map(|(kind, value)| [kind.to_owned(), value]));
                print_table(&rows);
            }
        }
    }
    if let Some(path) = &args.export {
        let signed = revocation::sign(&authorities, &list)?;
        let mut signature = path.clone().into_os_string();
        signature.push(".sig");
        let write = |path: &Path, bytes: &[u8]| {
            std::fs::write(path, bytes).with_context(|| format!("can't write {}", path.display()))
        };
        write(path, &signed.list)?;
        write(signature.as_ref(), signed.signature.as_bytes())?;
    }
    Ok(())
}
