//! A join token makes a host a node, and a failed attempt does not use it up.

use std::{os::unix::fs::PermissionsExt, time::Duration};

use tests::{
    client::{Door, echo},
    cluster::SOON,
    process::{eventually, free_port},
    relay::Relay,
    target,
};

use super::joining::{Host, id, is_unused, list, local, master, secret, token};

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn one_line_on_each_side_makes_a_fresh_host_a_node() {
    let port = target::start().await;
    let cluster = master("").await;
    let node_port = free_port();
    list(&cluster, &[("n1", Some(local(node_port))), ("n2", None), ("n3", None)]).await;
    for (name, mut host, bound) in [
        ("n1", Host::listening(&cluster, "n1", node_port), true),
        ("n2", Host::calling(&cluster, "n2", cluster.call_home), true),
        ("n3", Host::calling(&cluster, "n3", cluster.call_home), false),
    ] {
        assert!(!host.dir.join("state").exists());
        if bound {
            let line = token(&cluster, &["--node", name]);
            assert_eq!(line.lines().count(), 1, "{line}");
            host.join(&line, &[]).joined(name);
        } else {
            host.join(&token(&cluster, &[]), &["--node", name]).joined(name);
        }
        for file in ["host_key", "host_key-cert.pub", "host_ca.pub", "user_ca.pub"] {
            let mode = std::fs::metadata(host.state(file)).unwrap().permissions().mode() & 0o7777;
            assert_eq!(mode, 0o600, "{file}");
        }
        assert_eq!(std::fs::metadata(host.dir.join("state")).unwrap().permissions().mode() & 0o7777, 0o700);
        host.start();
        cluster.wait_state(name, "connected").await;
        for door in cluster.doors() {
            echo(&door, &format!("{name}:{port}")).await;
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn bad_tokens_and_pins_are_refused_and_use_no_good_token_up() {
    let cluster = master("").await;
    list(&cluster, &[("n1", None), ("n2", None)]).await;
    let host = Host::calling(&cluster, "n1", cluster.call_home);
    let good = token(&cluster, &["--node", "n1"]);
    let unbound = token(&cluster, &[]);

    host.join(&good, &["--node", "n2"]).refused(&["bound to node n1", "master-agent token create --node n2"]);
    host.join(&unbound, &[]).refused(&["not bound to a node", "--node"]);
    host.join(&unbound, &["--node", "n9"])
        .refused(&["node n9 is not in the master's inventory", "not used up"]);
    let pin = good.split_whitespace().nth(4).unwrap();
    let wrong_pin = good.replace(pin, "SHA256:jDvYqkuiVBuJYzQPVwlVyZTdIAbEPi9vmP4kq1pPkW8");
    host.join(&wrong_pin, &[]).refused(&["did not prove itself", "Compare --ca-pin", "token create"]);
    for pin_text in ["SHA256:", "", "nonsense", &pin[..pin.len() - 1]] {
        let mut words: Vec<&str> = good.split_whitespace().skip(1).collect();
        words[3] = pin_text;
        let mut command = host.command("node-agent", &words);
        command.env_remove("NODE_AGENT_TOKEN");
        Host::run(command).refused(&["--ca-pin"]);
    }
    for malformed in [&good[..good.len() - 1], &good.replace("mat1.", "mat2."), &good.replace("mat1.", "")] {
        host.join(malformed, &[]).refused(&["not a join token", "copy the whole"]);
    }
    let mixed = good.replace(secret(&good), secret(&unbound));
    host.join(&mixed, &[]).refused(&["not known here", "master-agent token create"]);
    let revoked = token(&cluster, &["--node", "n1"]);
    cluster.command(&["token", "revoke", id(&revoked)]).unwrap();
    host.join(&revoked, &[]).refused(&["not known here", "master-agent token create"]);
    let brief = token(&cluster, &["--node", "n1", "--ttl", "1s"]);
    eventually("the token has expired", SOON, async || {
        (!cluster.command(&["token", "list"]).unwrap().contains(id(&brief))).then_some(())
    })
    .await;
    host.join(&brief, &[]).refused(&["has expired", "master-agent token create"]);
    assert!(!host.state("host_key-cert.pub").exists() && !host.state("user_ca.pub").exists());
    assert!(is_unused(&cluster, &good) && is_unused(&cluster, &unbound));

    host.join(&good, &[]).joined("n1");
    let second = Host::calling(&cluster, "second", cluster.call_home);
    second.join(&good, &[]).refused(&["has been used before", "master-agent token create"]);
    second.join(&unbound, &["--node", "n2"]).joined("n2");
    let nobody = good.replace(&cluster.call_home.to_string(), &local(free_port()).to_string());
    second.join(&nobody, &[]).refused(&["can't connect to"]);
    let egress = match &cluster.tls {
        Door::Tls(address, _) => address.to_string(),
        Door::Unix(_) => unreachable!(),
    };
    let elsewhere = token(&cluster, &["--node", "n3"]).replace(&cluster.call_home.to_string(), &egress);
    second.join(&elsewhere, &[]).refused(&[&egress]);
    assert!(is_unused(&cluster, &elsewhere));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_relay_in_between_changes_nothing() {
    let port = target::start().await;
    let cluster = master("").await;
    let node_port = free_port();
    let delay = Duration::from_millis(20);
    let home = Relay::start(local(0), cluster.call_home, delay, None).await.unwrap();
    let dialled = Relay::start(local(0), local(node_port), delay, None).await.unwrap();
    list(&cluster, &[("n1", Some(dialled.address)), ("n2", None)]).await;
    for (name, mut host) in [
        ("n1", Host::listening(&cluster, "n1", node_port)),
        ("n2", Host::calling(&cluster, "n2", home.address)),
    ] {
        let line = token(&cluster, &["--node", name, "--address", &home.address.to_string()]);
        assert!(line.contains(&format!("join {} ", home.address)), "{line}");
        host.join(&line, &[]).joined(name);
        host.start();
        cluster.wait_state(name, "connected").await;
        echo(&cluster.unix, &format!("{name}:{port}")).await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_token_can_come_by_the_environment() {
    let cluster = master("").await;
    let host = Host::calling(&cluster, "n1", cluster.call_home);
    let line = token(&cluster, &["--node", "n1"]);
    let (without, token) = line.split_once(" --token ").unwrap();
    let mut help = host.command("node-agent join --help", &[]);
    let help = Host::run({
        help.env("NODE_AGENT_TOKEN", token);
        help
    });
    assert!(help.out.contains("NODE_AGENT_TOKEN") && !help.out.contains(secret(&line)), "{}", help.out);
    let missing = host.join(without, &[]);
    assert!(missing.code == Some(2) && missing.err.contains("--token"), "{}", missing.err);
    let mut command = host.command(without, &[]);
    command.env("NODE_AGENT_TOKEN", token);
    Host::run(command).joined("n1");
}
