//! Certificates of nodes and of the master are renewed in time, and are refused once they have expired.

use std::{
    os::unix::fs::PermissionsExt,
    time::{Duration, SystemTime},
};

use tests::{
    client::{echo, still_echoes},
    cluster::{Cluster, SOON},
    process::{eventually, free_port},
    relay::Relay,
    target,
};

use super::joining::{Host, PATIENCE, list, local, master, token};

async fn expiry(cluster: &Cluster, host: &Host) -> u64 {
    let name = "node_agent_host_certificate_expiry_timestamp_seconds ";
    eventually(name, SOON, async || cluster.metric(host.admin, name).await.ok()).await as u64
}

fn now() -> u64 {
    SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap().as_secs()
}

async fn until_past(seconds: u64) {
    eventually("the clock", PATIENCE, async || (now() > seconds).then_some(())).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn host_certificates_renew_themselves_under_open_streams() {
    let port = target::start().await;
    let cluster = master("certificates: {host_ttl: 15s}").await;
    let node_port = free_port();
    let relays = [
        Relay::start(local(0), local(node_port), Duration::ZERO, None).await.unwrap(),
        Relay::start(local(0), cluster.call_home, Duration::ZERO, None).await.unwrap(),
    ];
    list(&cluster, &[("n1", Some(relays[0].address)), ("n2", None)]).await;
    let mut hosts =
        [Host::listening(&cluster, "n1", node_port), Host::calling(&cluster, "n2", relays[1].address)];
    let names = ["n1", "n2"];
    let (mut streams, mut first) = (Vec::new(), Vec::new());
    for (host, name) in hosts.iter_mut().zip(names) {
        host.join(&token(&cluster, &["--node", name]), &[]).joined(name);
        host.start();
        cluster.wait_state(name, "connected").await;
        first.push(expiry(&cluster, host).await);
        streams.push(echo(&cluster.unix, &format!("{name}:{port}")).await);
    }
    let since = |name: &str| cluster.node_status(name).unwrap()["tunnels"][0]["since_unix_seconds"].clone();
    let before = names.map(since);
    for (host, first) in hosts.iter().zip(&first) {
        eventually("the certificate is renewed", PATIENCE, async || {
            (expiry(&cluster, host).await > *first).then_some(())
        })
        .await;
    }
    until_past(first[0].max(first[1]) + 1).await;
    for stream in &mut streams {
        still_echoes(stream).await;
    }
    assert_eq!(before, names.map(since));
    assert_eq!(cluster.total(cluster.admin, "master_agent_tunnels_lost_total").await.unwrap(), 0.0);
    assert!(
        cluster.metric(cluster.admin, "master_agent_host_certificates_renewed_total ").await.unwrap() >= 2.0
    );

    // The first certificate has expired: what connects now does so with a later one.
    for relay in &relays {
        relay.cut();
    }
    eventually("both tunnels are lost", SOON, async || {
        (cluster.total(cluster.admin, "master_agent_tunnels_lost_total").await.ok()? >= 2.0).then_some(())
    })
    .await;
    cluster.wait_state("n1", "connected").await;
    cluster.wait_state("n2", "connected").await;
    for (host, name) in hosts.iter_mut().zip(names) {
        echo(&cluster.unix, &format!("{name}:{port}")).await;
        let established =
            async || cluster.metric(cluster.admin, "master_agent_tunnels_established_total ").await.unwrap();
        let before = established().await;
        host.start();
        eventually("the node has come anew, from its files", SOON, async || {
            (established().await > before && cluster.node_status(name).ok()?["state"] == "connected")
                .then_some(())
        })
        .await;
        echo(&cluster.unix, &format!("{name}:{port}")).await;
        let mode = std::fs::metadata(host.state("host_key-cert.pub")).unwrap().permissions().mode() & 0o7777;
        assert_eq!(mode, 0o600);
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn node_list_shows_when_the_renewed_certificate_expires() {
    let cluster = master("certificates: {host_ttl: 15s}").await;
    list(&cluster, &[("n1", None)]).await;
    let mut host = Host::calling(&cluster, "n1", cluster.call_home);
    host.join(&token(&cluster, &["--node", "n1"]), &[]).joined("n1");
    host.start();
    cluster.wait_state("n1", "connected").await;
    let shown =
        || cluster.node_status("n1").unwrap()["tunnels"][0]["certificate_expires_unix_seconds"].as_u64();
    let first = shown().unwrap();
    eventually("the certificate is renewed", PATIENCE, async || {
        (expiry(&cluster, &host).await > first).then_some(())
    })
    .await;
    eventually("node list shows the new time", Duration::from_secs(5), async || {
        (shown()? > first).then_some(())
    })
    .await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_masters_certificate_is_replaced_before_it_expires() {
    let port = target::start().await;
    let cluster = master("certificates: {user_ttl: 6s}").await;
    // The certificate that the first tunnels were made with is no younger than the master.
    let last_of_first = now() + 6;
    let node_port = free_port();
    let relays = [
        Relay::start(local(0), local(node_port), Duration::ZERO, None).await.unwrap(),
        Relay::start(local(0), cluster.call_home, Duration::ZERO, None).await.unwrap(),
    ];
    list(&cluster, &[("n1", Some(relays[0].address)), ("n2", None)]).await;
    let mut hosts =
        [Host::listening(&cluster, "n1", node_port), Host::calling(&cluster, "n2", relays[1].address)];
    let serials = |host: &Host| {
        let text = host.log_text();
        let serials = text.lines().filter(|l| l.contains("authenticated")).filter_map(|l| {
            let behind = l.split_once("serial=")?.1;
            Some(behind.split(' ').next()?.to_owned())
        });
        serials.collect::<Vec<_>>()
    };
    let mut streams = Vec::new();
    for (host, name) in hosts.iter_mut().zip(["n1", "n2"]) {
        host.join(&token(&cluster, &["--node", name]), &[]).joined(name);
        host.start();
        cluster.wait_state(name, "connected").await;
        streams.push(echo(&cluster.unix, &format!("{name}:{port}")).await);
    }
    until_past(last_of_first.max(now() + 6) + 1).await;
    for stream in &mut streams {
        still_echoes(stream).await;
    }
    let before = hosts.each_ref().map(serials);
    assert!(before.iter().all(|s| s.len() > 1), "{before:?}");
    for relay in &relays {
        relay.cut();
    }
    for (i, (host, name)) in hosts.iter().zip(["n1", "n2"]).enumerate() {
        eventually("the master authenticates again", SOON, async || {
            (serials(host).len() > before[i].len()).then_some(())
        })
        .await;
        assert!(!serials(host)[1..].contains(&before[i][0]), "{:?}", serials(host));
        assert!(!host.log_text().contains("refused a certificate"), "{}", host.log_text());
        eventually("streams pass again", SOON, async || {
            cluster.unix.connect(&format!("{name}:{port}")).await.ok()?.ok()
        })
        .await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_expired_certificate_is_refused_with_the_way_back() {
    let port = target::start().await;
    let mut cluster = master("certificates: {host_ttl: 2s}").await;
    let node_port = free_port();
    list(&cluster, &[("n1", Some(local(node_port))), ("n2", None)]).await;
    let mut hosts =
        [Host::listening(&cluster, "n1", node_port), Host::calling(&cluster, "n2", cluster.call_home)];
    for (host, name) in hosts.iter().zip(["n1", "n2"]) {
        host.join(&token(&cluster, &["--node", name]), &[]).joined(name);
    }
    until_past(now() + 3).await;
    for host in &mut hosts {
        host.start();
    }
    let hint = "join the host again with `master-agent token create --node";
    eventually("node list says that it has expired", SOON, async || {
        let reason = cluster.node_status("n1").ok()?["reason"].as_str()?.to_owned();
        (reason.contains("the host certificate of node n1 expired at") && reason.contains(hint)).then_some(())
    })
    .await;
    eventually("the master's log says that it has expired", SOON, async || {
        let log = cluster.master.log_text();
        let says =
            |l: &str| ["refused a call home", "n2", "expired at", hint].iter().all(|part| l.contains(part));
        log.lines().any(says).then_some(())
    })
    .await;
    let refused = "master_agent_tunnels_refused_total{reason=\"expired\"}";
    assert!(cluster.metric(cluster.admin, refused).await.unwrap() >= 2.0);
    for name in ["n1", "n2"] {
        assert_ne!(cluster.node_status(name).unwrap()["state"], "connected");
    }

    // Lives that a test can wait for are too short to come back in.
    let config = cluster.path().join("master.yaml");
    let text = std::fs::read_to_string(&config).unwrap().replace("host_ttl: 2s", "host_ttl: 1h");
    std::fs::write(&config, text).unwrap();
    cluster.restart_master().unwrap();
    for (host, name) in hosts.iter_mut().zip(["n1", "n2"]) {
        let line = token(&cluster, &["--node", name]);
        eventually("the new join works", SOON, async || {
            (host.join(&line, &[]).code == Some(0)).then_some(())
        })
        .await;
        host.start();
        cluster.wait_state(name, "connected").await;
        echo(&cluster.unix, &format!("{name}:{port}")).await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_node_with_an_expired_certificate_says_so_itself() {
    let cluster = master("certificates: {host_ttl: 1s}").await;
    list(&cluster, &[("n1", None)]).await;
    let mut host = Host::calling(&cluster, "n1", cluster.call_home);
    host.join(&token(&cluster, &["--node", "n1"]), &[]).joined("n1");
    until_past(now() + 2).await;
    host.start();
    eventually("the node's log says what to do", SOON, async || {
        let log = host.log_text();
        (log.contains("expired") && log.contains("join")).then_some(())
    })
    .await;
}
