//! A plain sshd has no flow control for single streams; a reader that keeps a steady pace there is not reset.

use std::time::{Duration, Instant};

use tests::{
    client::Door,
    cluster::{Cluster, Kind, Options},
    load::completes,
    staller::{Caller, FIREHOSE, Staller},
};

/// Reads 256 KiB at a time, at a steady pace well above what keeps a stream from being reset (256 KiB in 250 ms).
/// `false` if it is reset all the same.
async fn reads_steadily(door: &Door, target: &str) -> bool {
    const QUANTUM: u64 = 256 * 1024;
    let mut caller = Caller::stalled(door, target, &format!("feed {FIREHOSE}")).await;
    let mut pace = tokio::time::interval(Duration::from_millis(100));
    let (mut last, mut longest) = (Instant::now(), Duration::ZERO);
    for _ in 0..50 {
        pace.tick().await;
        let complete = completes("a quantum", caller.read_on(QUANTUM)).await;
        longest = longest.max(last.elapsed());
        last = Instant::now();
        if !complete {
            let offset = caller.checker.offset();
            println!("  {}: reset at {offset}; the longest pause was {longest:.0?}", door.name());
            return false;
        }
    }
    true
}

/// How late is too late is tested with paused time beside `proto_net::channel`; on a busy machine, reader and agent can
/// be late themselves, and get a few more attempts.
#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn a_slow_but_steady_reader_on_an_sshd_is_not_reset() {
    let staller = Staller::start();
    let options = Options {
        nodes: vec![("n1".to_owned(), Kind::Sshd)],
        ports: vec![staller.port],
        ..Options::default()
    };
    let cluster = Cluster::start(options).await.unwrap();
    let target = format!("n1:{}", staller.port);
    for door in cluster.doors() {
        let mut attempts = 0;
        while !reads_steadily(&door, &target).await {
            attempts += 1;
            assert!(attempts < 5, "a reader that keeps its pace is reset each time");
        }
    }
}
