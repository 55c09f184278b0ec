//! Hostile requests to the front end's paths for nodes keep no node out, and hostile front ends get no link.

use tests::{
    load::{completes, download},
    pki::Authority,
};
use tokio::io::{AsyncReadExt, AsyncWriteExt};

use super::call_home_443::{BOOTSTRAP, JOIN, LINK, MB, false_servers::fake, upgrade, world};

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn hostile_requests_are_answered_and_do_not_keep_nodes_out() {
    let mut world = world(|options, _| {
        options.master_config = "tunnels: {handshake_timeout: 2s}".to_owned();
    })
    .await;
    let own = Some("n1");
    let line = "Connection: Upgrade\r\nUpgrade: master-agent-link\r\n";
    for (head, status) in [
        (upgrade(LINK, "Content-Length: 5\r\n") + "hello", 400),
        (upgrade(LINK, "Transfer-Encoding: chunked\r\n") + "0\r\n\r\n", 400),
        (format!("POST {LINK} HTTP/1.1\r\nHost: localhost\r\n\r\n"), 400),
        (format!("POST {LINK} HTTP/1.1\r\nHost: localhost\r\nUpgrade: master-agent-link\r\n\r\n"), 400),
        (
            format!(
                "POST {LINK} HTTP/1.1\r\nHost: localhost\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\r\n"
            ),
            400,
        ),
        (
            format!("POST {LINK} HTTP/1.1\r\nHost: localhost\r\nConnection: Upgrade\r\nUpgrade: ssh\r\n\r\n"),
            400,
        ),
        (format!("GET {LINK} HTTP/1.1\r\nHost: localhost\r\n{line}\r\n"), 400),
        (format!("PUT {LINK} HTTP/1.1\r\nHost: localhost\r\n{line}\r\n"), 400),
        (format!("POST {LINK}?a=b HTTP/1.0\r\n{line}\r\n"), 400),
        (format!("POST {LINK} HTTP/1.1\r\n{line}\r\n"), 400),
    ] {
        let (heard, _) = world.ask(own, &head).await;
        assert_eq!(heard.status, status, "{head}: {heard:?}");
    }
    // Bytes behind the head belong to the link, and end it if they are not SSH.
    for nonsense in ["SSH-2.0-x\r\n", "\0\0\0\0", "GET / HTTP/1.1\r\n\r\n"] {
        let (heard, mut stream) = world.ask(own, &(upgrade(LINK, "") + nonsense)).await;
        assert_eq!(heard.status, 101);
        let mut all = Vec::new();
        let _ = completes("the end", stream.read_to_end(&mut all)).await;
        assert!(all.starts_with(b"SSH-2.0-master-agent\r\n"), "{:?}", String::from_utf8_lossy(&all));
    }
    // Upgrades after which nothing comes, and such as are not finished.
    let (mut held, mut told) = (Vec::new(), 0);
    for i in 0..300 {
        if i % 2 == 0 {
            let (heard, stream) = world.ask(own, &upgrade(LINK, "")).await;
            // Beside so many handshakes, the node has to come again, but only once.
            if heard.status == 503 && heard.header("retry-after").is_some() {
                told += 1;
                continue;
            }
            assert_eq!(heard.status, 101, "{i}");
            held.push(stream);
        } else {
            let mut stream = world.connect(own).await;
            stream.write_all(&upgrade(LINK, "").as_bytes()[..60]).await.unwrap();
            stream.flush().await.unwrap();
            held.push(stream);
        }
    }
    assert!(told <= 1, "{told}");
    world.cluster.kill_node(1);
    world.cluster.wait_state("n2", "lost").await;
    world.cluster.start_node(1).unwrap();
    world.cluster.wait_connected().await;
    download(&world.cluster.unix, &format!("n2:{}", world.target), MB).await;
    // They all end by themselves.
    for mut stream in held {
        let _ = completes("the end", stream.read_to_end(&mut Vec::new())).await;
    }
    world.cluster.wait_connected().await;
    // HTTP/2 has no such upgrade.
    let (heard, _) = world.ask(None, &upgrade(JOIN, "Authorization: Bearer mat1.aaaaaaaaaaaa.x\r\n")).await;
    assert_eq!(heard.status, 401);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn where_it_is_off_nothing_is_taken() {
    let world = world(|options, _| {
        options.front_end.as_mut().unwrap().push_str("  call_home: false\n");
        options.nodes_down = true;
    })
    .await;
    // On to kube-apiserver, which is not there.
    let (heard, _) = world.ask(Some("n1"), &upgrade(LINK, "")).await;
    assert_eq!(heard.status, 503, "{heard:?}");
    let token = world.cluster.command(&["token", "create", "--node", "n1"]).unwrap();
    let token = token.split_whitespace().last().unwrap();
    let (heard, _) = world.ask(None, &upgrade(JOIN, &format!("Authorization: Bearer {token}\r\n"))).await;
    assert_eq!(heard.status, 401, "{heard:?}");
    let error = world.cluster.command(&["token", "create", "--address", "https://localhost"]).unwrap_err();
    assert!(error.to_string().contains("call_home: true"), "{error}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn front_ends_that_do_wrong_get_no_link() {
    let mut world = world(|options, _| options.nodes_down = true).await;
    let token = world.files.path().join("token");
    std::fs::write(&token, BOOTSTRAP).unwrap();
    let shown = format!("call_home_https: {{ca: ../ca.crt, token_file: {}}}", token.display());
    let dir = world.cluster.path().to_owned();
    for (answer, then, part) in [
        (
            "HTTP/1.1 401 Unauthorized\r\nContent-Length: 0\r\n\r\n",
            0,
            "does not recognise this node's credential (401)",
        ),
        (
            "HTTP/1.1 403 Forbidden\r\nContent-Length: 63\r\n\r\n{\"message\":\"no, abcdef.0123456789abcdef is \\u001b[31mnot good\"}  ",
            0,
            "403 Forbidden no, *** is  [31mnot good",
        ),
        ("HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n", 0, "it answers 200 OK"),
        (
            "HTTP/1.1 302 Found\r\nLocation: https://localhost/\r\nContent-Length: 0\r\n\r\n",
            0,
            "it answers 302 Found",
        ),
        (
            "HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\r\n",
            0,
            "changes to another protocol",
        ),
        ("HTTP/1.1 101 Switching Protocols\r\n\r\n", 0, "changes to another protocol"),
        (
            "HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: master-agent-link\r\n\r\n",
            100_000,
            "no tunnel to the master",
        ),
        ("SSH-2.0-OpenSSH_9.2\r\n\r\n", 0, "does not answer in HTTP/1.1"),
        ("HTTP/1.1 500 Oops\r\n\r\n", 10_000_000, "500 Internal Server Error"),
        ("HTTP/1.1 101 Switching Protocols\r\nA: ", 10_000_000, "answers with an endless head"),
        ("", 0, "did not answer within 2s"),
    ] {
        let (port, heads) = fake(Some((&dir, "server")), answer, then).await;
        let log = world.fails(&format!("https://localhost:{port}"), &shown, part).await;
        assert!(!log.contains(BOOTSTRAP), "{log}");
        let heads = heads.lock().unwrap().clone();
        assert!(heads.starts_with(&format!("POST {LINK} HTTP/1.1\r\n")), "{heads}");
        assert!(heads.contains(&format!("Bearer {BOOTSTRAP}")), "{heads}");
    }
    // Whoever is not verified hears nothing.
    let other = Authority::new("other CA").unwrap();
    other.server(&dir, "stranger", &["localhost"]).unwrap();
    let named = world.cluster.pki.server(&dir, "elsewhere", &["elsewhere.example"]);
    named.unwrap();
    for name in ["stranger", "elsewhere"] {
        let (port, heads) = fake(Some((&dir, name)), "HTTP/1.1 200 OK\r\n\r\n", 0).await;
        world.fails(&format!("https://localhost:{port}"), &shown, "no credential was sent").await;
        assert_eq!(heads.lock().unwrap().as_str(), "", "{name}");
    }
    let (port, heads) = fake(None, "HTTP/1.1 200 OK\r\n\r\n", 0).await;
    world.fails(&format!("https://localhost:{port}"), &shown, "did not answer within 2s").await;
    assert!(!heads.lock().unwrap().contains(BOOTSTRAP));
}
