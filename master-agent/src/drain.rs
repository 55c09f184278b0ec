//! The commands `node drain` and `node undrain`.

use std::time::{Duration, SystemTime};

use anyhow::Context;
use clap::Args;
use proto::NodeName;
use proto_net::{
    drain::{self, Progress},
    stdout,
};

use crate::{
    admin_api::{FRONT_END_TUNNEL, NodeDetail, StreamStatus},
    admin_client::AdminClient,
    table::print_table,
};

/// As many streams of a node are listed at most, of those that the running agent lists itself.
const LISTED: usize = 500;

#[derive(Debug, Args)]
pub struct DrainArgs {
    /// The node's name.
    pub node: NodeName,
    /// How long the node still gets streams that no other node can carry. What is open then is cut.
    #[arg(long, default_value = "10m", value_parser = drain::parse_deadline)]
    pub deadline: Duration,
    /// Do not wait until no stream is left.
    #[arg(long)]
    pub no_wait: bool,
}

/// Runs `node drain`.
pub async fn drain(agent: &AdminClient, args: DrainArgs) -> anyhow::Result<()> {
    let DrainArgs { node, deadline, no_wait } = args;
    let detail = agent.drain(&node, deadline).await?;
    let streams = left(&detail);
    let progress = progress(&detail).context("the drain has been undone")?;
    let until = humantime::format_rfc3339_seconds(progress.until);
    stdout::print_line(format_args!(
        "node {node} is draining until {until}, with {} left; `master-agent node undrain {node}` undoes that",
        drain::count(progress.streams)
    ));
    if !streams.is_empty() {
        print_streams(&streams);
    }
    if no_wait {
        return Ok(());
    }
    if progress.streams > 0 {
        stdout::print_line(
            "waiting for them to end; Ctrl-C ends only the wait, and the node goes on draining",
        );
    }
    let look = async || agent.node(node.as_str()).await.map(|detail| self::progress(&detail));
    match drain::count_down(look).await? {
        Some(cut @ 1..) => {
            let cut = drain::count(usize::try_from(cut)?);
            stdout::print_line(format_args!("node {node} is drained; cut at the deadline: {cut}"));
        }
        Some(0) | None => stdout::print_line(format_args!("node {node} has no streams left")),
    }
    Ok(())
}

/// Runs `node undrain`.
pub async fn undrain(agent: &AdminClient, node: &NodeName) -> anyhow::Result<()> {
    stdout::print_line(agent.undrain(node).await?.trim());
    Ok(())
}

/// Returns the open streams through a node. The callers of the front end that come from it are not among them.
fn left(detail: &NodeDetail) -> Vec<&StreamStatus> {
    detail.detail.streams.iter().filter(|stream| stream.egress != FRONT_END_TUNNEL).collect()
}

/// Returns how far the drain has come, or `None` if there is none.
fn progress(detail: &NodeDetail) -> Option<Progress> {
    let drain = detail.status.drain?;
    let streams =
        if detail.detail.streams.len() < LISTED { left(detail).len() } else { detail.status.streams() };
    let until = SystemTime::UNIX_EPOCH + Duration::from_millis(drain.until_unix_milliseconds);
    Some(Progress { until, streams, cut: drain.cut })
}

fn print_streams(streams: &[&StreamStatus]) {
    let mut rows = vec![["TARGET", "EGRESS", "AGE", "CALLER"].map(str::to_owned)];
    rows.extend(streams.iter().map(|stream| {
        let age = humantime::format_duration(Duration::from_secs(stream.seconds as u64)).to_string();
        [stream.target.clone(), stream.egress.clone(), age, stream.origin.clone()]
    }));
    print_table(&rows);
}
