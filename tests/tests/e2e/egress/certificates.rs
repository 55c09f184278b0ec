//! Certificates of egress listeners follow their files: the listener's own, and the CA of its callers.

use std::path::Path;

use tests::{
    client::Door,
    cluster::{Cluster, Kind, Options, SOON},
    front_end::RELOADED,
    load::completes,
    pki::{Authority, client_config},
    process::eventually,
    target,
};
use tokio::io::{AsyncReadExt, AsyncWriteExt};

/// The TLS listener, for a caller that trusts the CA in `ca` and shows `NAME.crt` of `directory`.
fn caller(cluster: &Cluster, ca: &Path, directory: &Path, name: &str) -> Door {
    let Door::Tls(address, _) = cluster.tls else { unreachable!() };
    Door::Tls(address, client_config(ca, Some((directory, name))).unwrap())
}

async fn is_served(door: &Door, target: &str) -> bool {
    completes("an answer or an end", door.connect(target)).await.is_ok_and(|answer| answer.is_ok())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn a_listener_s_certificates_follow_their_files() {
    let port = target::start().await;
    let nodes = vec![("n1".to_owned(), Kind::Dialled)];
    let cluster = Cluster::start(Options { nodes, ports: vec![port], ..Options::default() }).await.unwrap();
    let (path, target) = (cluster.path(), format!("n1:{port}"));
    let mut early = cluster.tls.stream(&target).await.unwrap();

    // A certificate by another CA takes the place of the first one.
    let next = Authority::new("next CA").unwrap();
    let next_ca = path.join("next-ca.crt");
    std::fs::write(&next_ca, next.pem()).unwrap();
    next.server(path, "server", &["localhost", "127.0.0.1"]).unwrap();
    let after = caller(&cluster, &next_ca, path, "kube-apiserver");
    eventually("the new certificate is shown", RELOADED, async || {
        is_served(&after, &target).await.then_some(())
    })
    .await;
    assert!(cluster.tls.enter().await.is_err(), "the old certificate is still shown");

    // Connections that are open stay so.
    early.write_all(b"echo\nhello").await.unwrap();
    let mut hello = [0; 5];
    completes("an echo", early.read_exact(&mut hello)).await.unwrap();
    assert_eq!(&hello, b"hello");

    // A broken file changes nothing, and is reported once.
    let good = std::fs::read(path.join("server.crt")).unwrap();
    std::fs::write(path.join("server.crt"), "broken").unwrap();
    let reports = || {
        let log = cluster.master.log_text();
        log.lines().filter(|line| line.contains("ERROR") && line.contains("http_connect.tls")).count()
    };
    eventually("the broken file is reported", SOON, async || (reports() > 0).then_some(())).await;
    assert!(is_served(&after, &target).await);
    std::fs::write(path.join("server.crt"), good).unwrap();

    // Callers with a certificate by the new client CA take the place of the others.
    next.client(path, "next-caller").unwrap();
    std::fs::write(path.join("ca.crt"), next.pem()).unwrap();
    let next_caller = caller(&cluster, &next_ca, path, "next-caller");
    eventually("the new client CA is in force", RELOADED, async || {
        is_served(&next_caller, &target).await.then_some(())
    })
    .await;
    assert!(!is_served(&after, &target).await, "the old client CA is still in force");
    assert_eq!(reports(), 1, "{}", cluster.master.log_text());
}
