//! Tables on standard output.

use std::time::{Duration, SystemTime};

use proto_net::stdout;

use crate::admin_api::NodeStatus;

/// Prints nodes, with a line for each tunnel.
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

/// Prints rows in columns of the necessary width.
pub fn print_table<const N: usize>(rows: &[[String; N]]) {
    let width =
        |column: usize| rows.iter().filter_map(|row| row.get(column)).map(String::len).max().unwrap_or(0);
    let widths: Vec<usize> = (0..N).map(width).collect();
    for row in rows {
        let cells: Vec<String> =
            row.iter().zip(&widths).map(|(cell, width)| format!("{cell:<width$}")).collect();
        stdout::print_line(cells.join("  ").trim_end());
    }
}
