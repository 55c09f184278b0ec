//! The node-agent program.

use std::{
    path::{Path, PathBuf},
    process::ExitCode,
};

use anyhow::bail;
use clap::Parser;
use node_agent::{
    app,
    cli::{self, Cli, Command, JoinArgs, RunArgs, completions},
    config::Config,
    identity::host::NodeIdentity,
    join::{JoinOptions, join},
};
use proto::call_home::Master;
use proto_net::{
    descriptors,
    handover::{Beginning, Program, Role},
    stdout,
    telemetry::Logs,
};
use tokio::runtime::Runtime;

/// sysexits.h: the configuration has errors.
const EX_CONFIG: u8 = 78;

fn main() -> ExitCode {
    let cli = Cli::parse();
    // One thread carries all tunnels of a node, since streams are faster and cheaper without hand-overs between threads.
    let runtime = match tokio::runtime::Builder::new_current_thread().enable_all().build() {
        Ok(runtime) => runtime,
        Err(e) => return fail(&e.into()),
    };
    match cli.command {
        Command::Completions { shell } => {
            completions(shell);
            ExitCode::SUCCESS
        }
        Command::Join(args) => match runtime.block_on(run_join(&cli.config, args)) {
            Ok(()) => ExitCode::SUCCESS,
            Err(e) => fail(&e),
        },
        Command::CheckConfig { print_defaults: true } => {
            stdout::print(proto_config::defaults(&Config::describe()));
            ExitCode::SUCCESS
        }
        Command::CheckConfig { print_defaults: false } => match Config::load(&cli.config) {
            Ok(_) => {
                stdout::print_line(format_args!("{}: ok", cli.config.display()));
                ExitCode::SUCCESS
            }
            Err(errors) => bad_config(&errors),
        },
        Command::Reload => ask(&cli.config, &runtime, async |socket: &Path| cli::reload(socket).await),
        Command::Drain(args) => {
            ask(&cli.config, &runtime, async |socket: &Path| cli::drain(socket, args).await)
        }
        Command::Undrain => ask(&cli.config, &runtime, async |socket: &Path| cli::undrain(socket).await),
        Command::Run(RunArgs { start_next: true, .. }) => {
            match Program::current().and_then(|program| program.run_next()) {
                Ok(()) => ExitCode::SUCCESS,
                Err(e) => fail(&e.into()),
            }
        }
        Command::Run(args) => {
            let role = if args.take_over { Role::Next } else { Role::First };
            let config = match Config::load(&cli.config) {
                Ok(config) => config,
                Err(errors) => {
                    role.refuse(&errors);
                    return bad_config(&errors);
                }
            };
            run(config, role, cli.config, runtime)
        }
    }
}

/// Runs a command that asks the running agent.
fn ask(config: &Path, runtime: &Runtime, command: impl AsyncFnOnce(&Path) -> anyhow::Result<()>) -> ExitCode {
    let config = match Config::load(config) {
        Ok(config) => config,
        Err(errors) => return bad_config(&errors),
    };
    match runtime.block_on(command(&config.admin.socket)) {
        Ok(()) => ExitCode::SUCCESS,
        Err(e) => fail(&e),
    }
}

/// Runs the agent. The error that ends it goes through the log, so that nothing waits for whoever reads it.
fn run(config: Config, role: Role, file: PathBuf, runtime: Runtime) -> ExitCode {
    let logs = Logs::start(config.log.format, &config.log.level);
    let (logs, beginning) = match (logs, Beginning::new(role, file)) {
        (Ok(logs), Ok(beginning)) => (logs, beginning),
        (Err(e), _) => return fail(&e.into()),
        (_, Err(e)) => return fail(&e.into()),
    };
    descriptors::raise_limit();
    let result = runtime.block_on(app::run(config, beginning, logs.lines_lost()));
    // A lookup that is still under way must not delay the exit.
    runtime.shutdown_background();
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            role.refuse(&format_args!("{error:#}"));
            logs.print(format_args!("node-agent: {error:#}"));
            ExitCode::FAILURE
        }
    }
}

async fn run_join(config: &Path, args: JoinArgs) -> anyhow::Result<()> {
    // A host that only joins needs no configuration.
    let https = matches!(args.master, Master::Https(_));
    let config = match &args.state_dir {
        Some(_) if !(https && config.exists()) => None,
        Some(_) | None => Some(Config::load(config)?),
    };
    let (configured, mut https) = config.map(|c| (c.state_dir, c.call_home_https)).unzip();
    let Some(state_dir) = args.state_dir.or(configured) else { bail!("no --state-dir") };
    if let Some(ca) = args.https_ca {
        https.get_or_insert_default().tls.ca = Some(ca);
    }
    let mut identity = NodeIdentity::load_or_create(&state_dir)?;
    let options = JoinOptions {
        master: args.master,
        https: https.unwrap_or_default(),
        token: args.token,
        ca_pin: args.ca_pin,
        node: args.node,
        addresses: args.addresses,
    };
    let node = join(&mut identity, options).await?;
    stdout::print_line(format_args!(
        "joined as node {node}; keys and certificates are in {}",
        state_dir.display()
    ));
    stdout::print_line("if node-agent runs already, run `node-agent reload`: it reads them when it starts");
    Ok(())
}

fn bad_config(errors: &dyn std::fmt::Display) -> ExitCode {
    eprintln!("{errors}");
    ExitCode::from(EX_CONFIG)
}

fn fail(error: &anyhow::Error) -> ExitCode {
    eprintln!("node-agent: {error:#}");
    ExitCode::FAILURE
}
