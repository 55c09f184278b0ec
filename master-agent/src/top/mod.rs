//! The command `top`, a live view of the running agent's nodes in a terminal.

pub(crate) mod model;
mod view;

use std::{
    io::{IsTerminal, stdout},
    time::{Duration, Instant, SystemTime},
};

use clap::Args;
use ratatui::crossterm::event::{self, KeyCode, KeyEvent, KeyEventKind, KeyModifiers};
use tokio::{
    signal::unix::{SignalKind, signal},
    sync::mpsc,
};

use crate::{activity::unix_milliseconds, admin_client::AdminClient, table::print_nodes};
use model::{Key, Model, Sort};

/// How long the agent may take to answer. No key is handled in the meantime.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(5);

/// Show the nodes of the running agent live: states, round trips, streams, bytes per second, errors.
#[derive(Debug, Args)]
pub struct TopArgs {
    /// How often the agent is queried.
    #[arg(long, short, default_value = "1s", value_parser = humantime::parse_duration, value_name = "TIME")]
    interval: Duration,
    /// The initial sort order.
    #[arg(long, value_enum, default_value_t)]
    sort: Sort,
    /// Show only nodes whose name, state, direction, kind or reason contains this text.
    #[arg(long, value_name = "TEXT", default_value = "")]
    filter: String,
}

/// Runs `top`. Without a terminal it prints the nodes once, as `node list` does.
pub async fn top(agent: &AdminClient, args: TopArgs) -> anyhow::Result<()> {
    if args.interval < Duration::from_millis(100) {
        anyhow::bail!("--interval must be at least 100ms");
    }
    let first = answer(agent.nodes()).await?;
    if !stdout().is_terminal() {
        print_nodes(&first);
        return Ok(());
    }
    // The handlers are registered before the terminal is changed, so that no signal leaves it changed.
    let ends = [SignalKind::terminate(), SignalKind::hangup(), SignalKind::interrupt(), SignalKind::quit()];
    let mut signals = Vec::new();
    for kind in ends {
        signals.push(signal(kind)?);
    }
    let killed = async {
        let waits = signals.iter_mut().map(|signal| Box::pin(signal.recv()));
        futures_util::future::select_all(waits).await;
    };
    // This also restores the terminal after a panic.
    let mut terminal = ratatui::try_init()?;
    let mut model = Model::new(args.sort, args.filter);
    model.take(first, Instant::now());
    let result = tokio::select! {
        result = run(agent, args.interval, &mut terminal, &mut model) => result,
        () = killed => Ok(()),
    };
    ratatui::restore();
    result
}

async fn run(
    agent: &AdminClient,
    interval: Duration,
    terminal: &mut ratatui::DefaultTerminal,
    model: &mut Model,
) -> anyhow::Result<()> {
    let mut input = read_input();
    let mut tick = tokio::time::interval(interval);
    tick.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    tick.tick().await;
    loop {
        terminal.draw(|frame| view::draw(frame, model, unix_milliseconds(SystemTime::now())))?;
        let opened = model.opened.clone();
        tokio::select! {
            _ = tick.tick() => refresh(agent, model).await,
            event = input.recv() => {
                let Some(event) = event else { return Ok(()) };
                if !press(model, event?) {
                    return Ok(());
                }
                // All events that have arrived in the meantime are drawn together.
                while let Ok(event) = input.try_recv() {
                    if !press(model, event?) {
                        return Ok(());
                    }
                }
                if model.opened != opened {
                    refresh(agent, model).await;
                }
            }
        }
    }
}

async fn refresh(agent: &AdminClient, model: &mut Model) {
    match answer(agent.nodes()).await {
        Ok(nodes) => model.take(nodes, Instant::now()),
        Err(error) => model.error = Some(format!("{error:#}")),
    }
    if let Some(name) = model.opened.clone() {
        match answer(agent.node(&name)).await {
            Ok(detail) => model.take_detail(detail, Instant::now()),
            Err(error) => model.error = Some(format!("{name}: {error:#}")),
        }
    }
}

/// Waits for an answer of the agent for a limited time.
async fn answer<T>(asked: impl Future<Output = anyhow::Result<T>>) -> anyhow::Result<T> {
    tokio::time::timeout(ANSWER_TIMEOUT, asked)
        .await
        .unwrap_or_else(|_| Err(anyhow::anyhow!("the running agent does not answer")))
}

/// Reads the keyboard on its own thread, which ends with the program.
fn read_input() -> mpsc::Receiver<std::io::Result<event::Event>> {
    let (send, receive) = mpsc::channel(64);
    std::thread::spawn(move || {
        loop {
            let event = event::read();
            let failed = event.is_err();
            if send.blocking_send(event).is_err() || failed {
                return;
            }
        }
    });
    receive
}

/// Handles an event. Returns whether to go on.
#[allow(clippy::wildcard_enum_match_arm, reason = "keyboards have many keys, and most do nothing here")]
fn press(model: &mut Model, event: event::Event) -> bool {
    let event::Event::Key(KeyEvent { code, modifiers, kind, .. }) = event else { return true };
    if kind == KeyEventKind::Release {
        return true;
    }
    if modifiers.contains(KeyModifiers::CONTROL) {
        return !matches!(code, KeyCode::Char('c' | 'd'));
    }
    let page = ratatui::crossterm::terminal::size()
        .map_or(10, |(_, rows)| usize::from(rows).saturating_sub(4).max(1));
    let key = match code {
        KeyCode::Up => Key::Up(1),
        KeyCode::Down => Key::Down(1),
        KeyCode::PageUp => Key::Up(page),
        KeyCode::PageDown => Key::Down(page),
        KeyCode::Home => Key::First,
        KeyCode::End => Key::Last,
        KeyCode::Enter => Key::Enter,
        KeyCode::Esc => Key::Back,
        KeyCode::Backspace => Key::Erase,
        KeyCode::Char(c) => Key::Char(c),
        _ => return true,
    };
    model.press(key)
}
