//! Nodes: what a front end, or an HTTP proxy before it, answers to a call home.

use node_agent::{
    http_proxy::Proxy,
    https::{self, HttpsError, LinkRequest},
};
use proto::{
    call_home::{Purpose, UPGRADE},
    refusal::LONGEST_WAIT,
    target::Target,
};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt, DuplexStream},
    runtime,
};

const TOKEN: &str = "abcdef.0123456789abcdef";
/// The most characters that an error shows.
const MAX_SHOWN: usize = 1000;

/// What a front end answers becomes a link only if the front end changes to its protocol. The link then begins with the
/// byte behind the head.
pub fn front_end_answer(bytes: &[u8]) {
    let front_end = front_end();
    let request = LinkRequest { front_end: &front_end, node: None, purpose: Purpose::Link, admission: None };
    let linked = answered(bytes, |socket| async move {
        let mut link = https::upgrade(socket, request, Some(TOKEN.to_owned())).await?;
        let mut rest = Vec::new();
        link.read_to_end(&mut rest).await.expect("the connection does not fail");
        Ok::<_, HttpsError>(rest)
    });
    match linked {
        Ok(rest) => {
            let (status, len) = head(bytes).expect("a link begins with a head");
            assert_eq!((status, &bytes[len..]), (&b"101"[..], &rest[..]));
            let text = String::from_utf8_lossy(&bytes[..len]).to_ascii_lowercase();
            assert!(text.contains(UPGRADE), "the front end changes to another protocol");
        }
        Err(error) => {
            assert!(error.retry_after().is_none_or(|after| after <= LONGEST_WAIT));
            assert_can_be_shown(&error);
        }
    }
}

/// What a proxy answers becomes a connection to the front end only if the proxy says so, and no byte of the front end is
/// lost.
pub fn proxy_answer(bytes: &[u8]) {
    let (proxy, front_end) = (&proxy(), &front_end());
    let connected = answered(bytes, |socket| async move {
        let mut socket = https::tunnel(proxy, None, front_end, socket).await?;
        let mut rest = Vec::new();
        socket.read_to_end(&mut rest).await.expect("the connection does not fail");
        Ok::<_, HttpsError>(rest)
    });
    match connected {
        Ok(rest) => {
            let (status, len) = head(bytes).expect("a connection begins with a head");
            assert_eq!((status[0], &bytes[len..]), (b'2', &rest[..]));
        }
        Err(error) => assert_can_be_shown(&error),
    }
}

fn front_end() -> Target {
    "master.example:443".parse().expect("a target")
}

fn proxy() -> Proxy {
    "http://proxy.example:3128".parse().expect("an address")
}

/// The result of asking a peer that answers a request with `bytes` and then ends its side of the connection.
fn answered<F>(bytes: &[u8], ask: impl FnOnce(DuplexStream) -> F) -> F::Output
where
    F: Future<Output = Result<Vec<u8>, HttpsError>>,
{
    let (client, mut server) = tokio::io::duplex(bytes.len() + 64 * 1024);
    let serve = async {
        let mut request = Vec::new();
        while !request.ends_with(b"\r\n\r\n") {
            match server.read_u8().await {
                Ok(byte) => request.push(byte),
                Err(_) => return,
            }
        }
        // The client may have left.
        let _ = server.write_all(bytes).await;
        let _ = server.shutdown().await;
    };
    let runtime = runtime::Builder::new_current_thread().build().expect("a runtime");
    runtime.block_on(async { tokio::join!(serve, ask(client)).1 })
}

/// The status and the length of an answer's head, with the heads before it that only inform (RFC 9110 §15.2).
fn head(bytes: &[u8]) -> Option<(&[u8], usize)> {
    let mut at = 0;
    loop {
        at += bytes[at..].iter().position(|byte| !matches!(byte, b'\r' | b'\n'))?;
        let rest = &bytes[at..];
        let status = rest.get(9..12)?;
        let ends = |end: &usize| {
            rest[*end] == b'\n' && (rest[..*end].ends_with(b"\n") || rest[..*end].ends_with(b"\n\r"))
        };
        at += (0..rest.len()).find(ends)? + 1;
        if status[0] != b'1' || status == b"101" {
            return Some((status, at));
        }
    }
}

fn assert_can_be_shown(error: &HttpsError) {
    let text = error.to_string();
    assert!(text.chars().count() <= MAX_SHOWN && !text.contains(char::is_control), "{text:?}");
    assert!(!text.contains(TOKEN), "{text:?}");
}
