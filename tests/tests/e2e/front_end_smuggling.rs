//! Requests that two servers could read in two ways, and callers that say they are somebody else: over HTTP/1.1 and
//! HTTP/2, as bytes. Whatever the answer, kube-apiserver hears of nobody whom the front end did not authenticate.

use std::fmt::Write as _;

use bytes::{Bytes, BytesMut};
use tests::{
    client::Stream,
    cluster::SOON,
    front_end::{Credential, FrontEnd, GREEDY, Heard, Http, Setup, TOKEN, exchange, hear},
    h2::{self, Answer, CONTINUATION, DATA, END_HEADERS, END_STREAM, Frame, HEADERS, block},
    load::completes,
    upstream::{Behaviour, Identity, Received},
};
use tokio::io::AsyncWriteExt;

/// In everything that a caller makes up, and in nothing else.
const EVIL: &str = "evil";

/// What the answers to a row are to be.
#[derive(Clone, Debug)]
enum Expect {
    /// These statuses, one for each request, and nothing after them.
    Statuses(&'static [u16]),
    /// One answer with one of these: the standards leave it open.
    OneOf(&'static [u16]),
    /// 4xx, or the connection's end without an answer.
    NoRequest,
    /// Served by its Transfer-Encoding, as RFC 9112 §6.1 allows, and the connection ended with it. What looks like a
    /// request in it is its body.
    Last,
}

use Expect::{Last, NoRequest, OneOf, Statuses};

struct Row {
    what: &'static str,
    bytes: Vec<u8>,
    expect: Expect,
}

impl Row {
    fn may_upgrade(&self) -> bool {
        matches!(self.expect, Statuses(expected) | OneOf(expected) if expected.contains(&101))
    }
}

/// A request of a valid user: the first line, lines of the head each with their own end, the body.
fn valid(line: &str, lines: &str, body: &str) -> Vec<u8> {
    format!("{line}\r\nHost: api\r\nAuthorization: Bearer {TOKEN}\r\n{lines}\r\n{body}").into_bytes()
}

fn get(lines: &str) -> Vec<u8> {
    valid("GET /echo HTTP/1.1", lines, "")
}

fn post(lines: &str, body: &str) -> Vec<u8> {
    valid("POST /echo HTTP/1.1", lines, body)
}

fn concat(parts: &[&[u8]]) -> Vec<u8> {
    parts.concat()
}

/// A whole request that must not be taken for one, with a token that is right.
fn hidden() -> String {
    format!(
        "GET /smuggled-evil HTTP/1.1\r\nHost: api\r\nAuthorization: Bearer {GREEDY}\r\nX-Remote-User: evil\r\n\r\n"
    )
}

const BAD: Expect = Statuses(&[400]);
const PASSED: Expect = Statuses(&[200]);

fn identities() -> Vec<Row> {
    let row = |what, bytes, expect| Row { what, bytes, expect };
    let mut rows = vec![
        row("nothing of the sort", get(""), PASSED),
        row("X-Remote-User", get("X-Remote-User: evil\r\n"), PASSED),
        row("in lower case", get("x-remote-user: evil\r\n"), PASSED),
        row("in upper case", get("X-REMOTE-USER: evil\r\n"), PASSED),
        row("in mixed case", get("x-rEmOtE-uSeR: evil\r\n"), PASSED),
        row("with underscores", get("X_Remote_User: evil\r\n"), PASSED),
        row("with one underscore", get("X-Remote_User: evil\r\n"), PASSED),
        row("twice", get("X-Remote-User: evil\r\nX-Remote-User: evil2\r\n"), PASSED),
        row("in two spellings", get("X-Remote-User: evil\r\nX_REMOTE-USER: evil2\r\n"), PASSED),
        row("empty, and with a tab", get("X-Remote-User:\r\nX-Remote-User:\tevil\r\n"), PASSED),
        row("X-Remote-Group", get("X-Remote-Group: system:masters-evil\r\n"), PASSED),
        row("X-Remote-Group in a list", get("X-Remote-Group: evil, evil2\r\n"), PASSED),
        row("X_REMOTE_GROUP", get("X_REMOTE_GROUP: evil\r\n"), PASSED),
        row("X-Remote-Uid", get("X-Remote-Uid: evil\r\n"), PASSED),
        row("X-Remote-Extra", get("X-Remote-Extra-Scopes: evil\r\nX-Remote-Extra-%61: evil\r\n"), PASSED),
        row("X_Remote_Extra", get("X_Remote_Extra_Scopes: evil\r\n"), PASSED),
        row("X-Remote-Anything", get("X-Remote-Anything: evil\r\nX-Remote-: evil\r\n"), PASSED),
        row("after the token", get("Accept: */*\r\nX-Remote-User: evil\r\nUser-Agent: x\r\n"), PASSED),
        row("Connection: X-Remote-User", get("Connection: X-Remote-User\r\n"), PASSED),
        row(
            "Connection: x-remote-user, with it",
            get("Connection: keep-alive, x-remote-user\r\nX-Remote-User: evil\r\n"),
            PASSED,
        ),
        row("Connection: X-Remote-Group", get("Connection: X-Remote-Group, X-Remote-Uid\r\n"), PASSED),
        row(
            "Connection: X-Forwarded-For",
            get("Connection: X-Forwarded-For\r\nX-Forwarded-For: evil\r\n"),
            PASSED,
        ),
        row("Connection: Authorization", get("Connection: Authorization\r\n"), PASSED),
        row("Connection: Host", get("Connection: Host\r\n"), OneOf(&[200, 400])),
        row(
            "Connection: Content-Length",
            post("Connection: Content-Length\r\nContent-Length: 5\r\n", "hello"),
            OneOf(&[200, 400]),
        ),
        row(
            "Connection: Transfer-Encoding",
            post(
                "Connection: Transfer-Encoding\r\nTransfer-Encoding: chunked\r\n",
                "5\r\nhello\r\n0\r\n\r\n",
            ),
            OneOf(&[200, 400]),
        ),
        row(
            "Keep-Alive, Proxy-Connection, Proxy-Authorization",
            get("Keep-Alive: evil\r\nProxy-Connection: evil\r\nProxy-Authorization: Basic evil\r\n"),
            PASSED,
        ),
        row(
            "whence",
            get(
                "X-Forwarded-For: evil\r\nForwarded: for=evil\r\nX-Real-IP: evil\r\nX-Forwarded-Host: evil\r\n",
            ),
            PASSED,
        ),
        row("X_Forwarded_For", get("X_Forwarded_For: evil\r\n"), PASSED),
        row("Impersonate-User", get("Impersonate-User: evil\r\n"), Statuses(&[403])),
        row("Impersonate-Group alone", get("Impersonate-Group: evil\r\n"), OneOf(&[400, 403])),
        row("Impersonate_User", get("Impersonate_User: evil\r\n"), OneOf(&[200, 400, 403])),
        row("impersonate-extra, upper case", get("IMPERSONATE-EXTRA-X: evil\r\n"), OneOf(&[400, 403])),
        row(
            "Connection: Impersonate-User",
            get("Connection: Impersonate-User\r\nImpersonate-User: evil\r\n"),
            OneOf(&[200, 400, 403]),
        ),
        row(
            "as a trailer",
            post(
                "Transfer-Encoding: chunked\r\nTrailer: X-Remote-User\r\n",
                "5\r\nhello\r\n0\r\nX-Remote-User: evil\r\n\r\n",
            ),
            PASSED,
        ),
        row(
            "as a trailer without notice, with underscores",
            post(
                "Transfer-Encoding: chunked\r\n",
                "5\r\nhello\r\n0\r\nX_Remote_Group: evil\r\nAuthorization: Bearer evil\r\n\r\n",
            ),
            PASSED,
        ),
        row(
            "Content-Length as a trailer",
            post(
                "Transfer-Encoding: chunked\r\n",
                "5\r\nhello\r\n0\r\nContent-Length: 100\r\nTransfer-Encoding: evil\r\n\r\n",
            ),
            PASSED,
        ),
        row("two tokens", get(&format!("Authorization: Bearer {GREEDY}\r\n")), Statuses(&[401])),
        row("a token and Basic", get("Authorization: Basic ZXZpbA==\r\n"), Statuses(&[401])),
    ];
    let nobody = |what, line: &str, lines: &str| Row {
        what,
        bytes: format!("{line}\r\nHost: api\r\n{lines}\r\n").into_bytes(),
        expect: Statuses(&[401]),
    };
    rows.extend([
        nobody("X-Remote-User in place of a token", "GET /evil HTTP/1.1", "X-Remote-User: evil\r\n"),
        nobody("a token in the query", &format!("GET /evil?access_token={TOKEN}&token={TOKEN} HTTP/1.1"), ""),
        nobody("a token in a cookie", "GET /evil HTTP/1.1", &format!("Cookie: token={TOKEN}\r\n")),
        nobody(
            "a token of another scheme",
            "GET /evil HTTP/1.1",
            &format!("Authorization: Basic {TOKEN}\r\n"),
        ),
        nobody(
            "a token in Proxy-Authorization",
            "GET /evil HTTP/1.1",
            &format!("Proxy-Authorization: Bearer {TOKEN}\r\n"),
        ),
        nobody(
            "a token with an underscore in its header",
            "GET /evil HTTP/1.1",
            &format!("X_Authorization: Bearer {TOKEN}\r\n"),
        ),
    ]);
    rows
}

fn framings() -> Vec<Row> {
    let row = |what, bytes, expect| Row { what, bytes, expect };
    let hidden = hidden();
    let chunks = |lines: &str| post(lines, &format!("0\r\n\r\n{hidden}"));
    let both = "Content-Length: 4\r\nTransfer-Encoding: chunked\r\n".to_owned();
    let mut rows = vec![
        row(
            "CL.TE",
            chunks(&format!("Content-Length: {}\r\nTransfer-Encoding: chunked\r\n", 5 + hidden.len())),
            Last,
        ),
        row("TE.CL", post(&both, &format!("{:x}\r\n{hidden}\r\n0\r\n\r\n", hidden.len())), Last),
        row(
            "TE.CL, the other way round",
            chunks("Transfer-Encoding: chunked\r\nContent-Length: 5\r\n"),
            Last,
        ),
        row("TE in a GET, and CL", valid("GET /echo HTTP/1.1", &both, "0\r\n\r\n"), Last),
        row("two Content-Lengths", post("Content-Length: 5\r\nContent-Length: 0\r\n", &hidden), BAD),
        row(
            "two equal Content-Lengths",
            post("Content-Length: 5\r\nContent-Length: 5\r\n", "hello"),
            OneOf(&[200, 400]),
        ),
        row("Content-Length: 5, 0", post("Content-Length: 5, 0\r\n", &hidden), BAD),
        row("Content-Length: +5", post("Content-Length: +5\r\n", &hidden), BAD),
        row("Content-Length: -1", post("Content-Length: -1\r\n", &hidden), BAD),
        row("Content-Length: 0x5", post("Content-Length: 0x5\r\n", &hidden), BAD),
        row("Content-Length: 5 5", post("Content-Length: 5 5\r\n", &hidden), BAD),
        row("an empty Content-Length", post("Content-Length: \r\n", &hidden), BAD),
        row("Content-Length: 2^64 + 5", post("Content-Length: 18446744073709551621\r\n", &hidden), BAD),
        row("Content_Length", post("Content_Length: 5\r\n", ""), PASSED),
        row("Content-Length beside a vertical tab", post("Content-Length: \x0b5\r\n", &hidden), BAD),
        row("space before the colon of Content-Length", post("Content-Length : 5\r\n", &hidden), BAD),
    ];
    for (what, encoding) in [
        ("chunked, identity", "Transfer-Encoding: chunked, identity\r\n"),
        ("identity, chunked", "Transfer-Encoding: identity, chunked\r\n"),
        ("gzip, chunked", "Transfer-Encoding: gzip, chunked\r\n"),
        ("xchunked", "Transfer-Encoding: xchunked\r\n"),
        ("identity", "Transfer-Encoding: identity\r\n"),
        ("an empty one", "Transfer-Encoding:\r\n"),
        ("in quotes", "Transfer-Encoding: \"chunked\"\r\n"),
        ("with a parameter", "Transfer-Encoding: chunked;q=1\r\n"),
        ("with a vertical tab", "Transfer-Encoding: \x0bchunked\r\n"),
        ("with a form feed", "Transfer-Encoding: chunked\x0c\r\n"),
        ("with NUL", "Transfer-Encoding: chunked\0\r\n"),
        ("two lines, chunked first", "Transfer-Encoding: chunked\r\nTransfer-Encoding: identity\r\n"),
        ("two lines, chunked last", "Transfer-Encoding: identity\r\nTransfer-Encoding: chunked\r\n"),
        ("two lines, both chunked", "Transfer-Encoding: chunked\r\nTransfer-Encoding: chunked\r\n"),
        ("chunked, chunked", "Transfer-Encoding: chunked, chunked\r\n"),
        ("space before the colon", "Transfer-Encoding : chunked\r\n"),
        ("on a folded line", "Transfer-Encoding:\r\n chunked\r\n"),
        ("behind a folded line", "X-A: b\r\n\tTransfer-Encoding: chunked\r\n"),
        ("behind a bare CR", "X-A: b\rTransfer-Encoding: chunked\r\n"),
    ] {
        rows.push(row(what, chunks(encoding), BAD));
    }
    rows.extend([
        row("Transfer_Encoding", post("Transfer_Encoding: chunked\r\n", ""), PASSED),
        row(
            "TE with a tab",
            post("Transfer-Encoding:\tchunked\r\n", "5\r\nhello\r\n0\r\n\r\n"),
            OneOf(&[200, 400]),
        ),
        row(
            "TE in capitals",
            post("TRANSFER-ENCODING: CHUNKED\r\n", "5\r\nhello\r\n0\r\n\r\n"),
            OneOf(&[200, 400]),
        ),
        row(
            "HTTP/1.0 with chunks",
            valid("POST /echo HTTP/1.0", "Transfer-Encoding: chunked\r\n", &format!("0\r\n\r\n{hidden}")),
            BAD,
        ),
        row(
            "HTTP/1.0 with keep-alive",
            valid("GET /echo HTTP/1.0", "Connection: keep-alive\r\n", ""),
            OneOf(&[200, 400]),
        ),
    ]);
    for (what, body) in [
        ("a chunk size of more than 64 bits", "10000000000000005\r\nhello\r\n0\r\n\r\n"),
        ("a chunk size with a sign", "+5\r\nhello\r\n0\r\n\r\n"),
        ("a negative chunk size", "-5\r\nhello\r\n0\r\n\r\n"),
        ("a chunk size with 0x", "0x5\r\nhello\r\n0\r\n\r\n"),
        ("a chunk size with an underscore", "0_5\r\nhello\r\n0\r\n\r\n"),
        ("no chunk size", "\r\nhello\r\n0\r\n\r\n"),
        ("no hexadecimal", "g\r\nhello\r\n0\r\n\r\n"),
        ("a chunk longer than its size", "3\r\nhello\r\n0\r\n\r\n"),
        ("a chunk without its end", "5\r\nhello0\r\n\r\n"),
        ("a space before the chunk size", " 5\r\nhello\r\n0\r\n\r\n"),
    ] {
        let bytes = post("Transfer-Encoding: chunked\r\n", &format!("{body}{hidden}"));
        rows.push(row(what, bytes, NoRequest));
    }
    rows.extend([
        row(
            "a chunk extension",
            post("Transfer-Encoding: chunked\r\n", "5;evil=\"evil\"\r\nhello\r\n0;evil\r\n\r\n"),
            OneOf(&[200, 400]),
        ),
        row(
            "a chunk extension with a line in it",
            post("Transfer-Encoding: chunked\r\n", &format!("5;a=\"\n0\n\n{hidden}\"\r\nhello\r\n0\r\n\r\n")),
            NoRequest,
        ),
        row(
            "a huge chunk extension",
            post(
                "Transfer-Encoding: chunked\r\n",
                &format!("5;{}\r\nhello\r\n0\r\n\r\n", "evil".repeat(100_000)),
            ),
            NoRequest,
        ),
        row(
            "chunks with bare LF",
            post("Transfer-Encoding: chunked\r\n", &format!("5\nhello\n0\n\n{hidden}")),
            NoRequest,
        ),
        row(
            "chunks that end with a bare CR",
            post("Transfer-Encoding: chunked\r\n", &format!("5\r\nhello\r\n0\r\r{hidden}")),
            NoRequest,
        ),
    ]);
    rows
}

fn heads() -> Vec<Row> {
    let row = |what, bytes, expect| Row { what, bytes, expect };
    let hidden = hidden();
    let with_host = |line: &str, host: &str| {
        format!("{line}\r\n{host}Authorization: Bearer {TOKEN}\r\n\r\n").into_bytes()
    };
    let mut many = String::new();
    for i in 0..2000 {
        write!(many, "X-Evil-{i}: a\r\n").unwrap();
    }
    vec![
        row("bare LF after a line", get("X-A: b\nX-Remote-User: evil\r\n"), OneOf(&[200, 400])),
        row(
            "bare LF only",
            b"GET /echo HTTP/1.1\nHost: api\nX-Remote-User: evil\n\n".to_vec(),
            OneOf(&[400, 401]),
        ),
        row("a bare CR in a value", get("X-A: b\rX-Remote-User: evil\r\n"), BAD),
        row("space before the colon", get("X-Remote-User : evil\r\n"), BAD),
        row("a tab before the colon", get("X-Remote-User\t: evil\r\n"), BAD),
        row("a folded line", get("X-A: b\r\n X-Remote-User: evil\r\n"), BAD),
        row(
            "a space before the first line of the head",
            valid("GET /echo HTTP/1.1\r\n X-Remote-User: evil", "", ""),
            BAD,
        ),
        row("NUL in a value", get("X-A: b\0X-Remote-User: evil\r\n"), BAD),
        row("NUL in a name", get("X-Remote-User\0: evil\r\n"), BAD),
        row("a line without a colon", get("X-Remote-User evil\r\n"), BAD),
        row("an empty name", get(": evil\r\n"), BAD),
        row(
            "a name of Latin-1",
            [&get("X-Remote-User")[..get("X-Remote-User").len() - 2], b"\xa0: evil\r\n\r\n"].concat(),
            BAD,
        ),
        row("two Hosts", get("Host: evil\r\n"), BAD),
        row("two equal Hosts", get("Host: api\r\n"), BAD),
        row("no Host", with_host("GET /echo HTTP/1.1", ""), BAD),
        row(
            "an absolute target with another host",
            with_host("GET https://evil.example/echo HTTP/1.1", "Host: api\r\n"),
            BAD,
        ),
        row(
            "an absolute target with the same host",
            with_host("GET https://api/echo HTTP/1.1", "Host: api\r\n"),
            OneOf(&[200, 400]),
        ),
        row(
            "a target with a user",
            with_host("GET https://evil@api/echo HTTP/1.1", "Host: api\r\n"),
            OneOf(&[200, 400]),
        ),
        row(
            "CONNECT",
            with_host("CONNECT evil.example:443 HTTP/1.1", "Host: evil.example:443\r\n"),
            OneOf(&[400, 404, 405]),
        ),
        row("OPTIONS *", with_host("OPTIONS * HTTP/1.1", "Host: api\r\n"), OneOf(&[200, 400])),
        row("a target without a slash", with_host("GET echo HTTP/1.1", "Host: api\r\n"), BAD),
        row("a space in the target", with_host("GET /echo evil HTTP/1.1", "Host: api\r\n"), BAD),
        row("a tab in the first line", with_host("GET\t/evil\tHTTP/1.1", "Host: api\r\n"), BAD),
        row("NUL in the target", with_host("GET /evil\0 HTTP/1.1", "Host: api\r\n"), BAD),
        row(
            "a fragment in the target",
            with_host("GET /echo#evil HTTP/1.1", "Host: api\r\n"),
            OneOf(&[200, 400]),
        ),
        row("a path that leads up", with_host("GET /echo/../evil HTTP/1.1", "Host: api\r\n"), BAD),
        row(
            "a path that leads up, encoded",
            with_host("GET /echo/%2e%2e/evil HTTP/1.1", "Host: api\r\n"),
            BAD,
        ),
        row("HTTP/0.9", b"GET /evil\r\n".to_vec(), BAD),
        row("HTTP/1.2", with_host("GET /evil HTTP/1.2", "Host: api\r\n"), OneOf(&[400, 505])),
        row("HTTP/2.0", with_host("GET /evil HTTP/2.0", "Host: api\r\n"), OneOf(&[400, 505])),
        row("http/1.1", with_host("GET /evil http/1.1", "Host: api\r\n"), BAD),
        row("HTTP/2's preface", concat(&[h2::PREFACE, hidden.as_bytes()]), NoRequest),
        row("garbage", b"\x16\x03\x01\x02\x00evil\r\n\r\n".to_vec(), BAD),
        row("2000 lines", get(&many), OneOf(&[400, 431])),
        row("a huge line", get(&format!("X-A: {}\r\n", "evil".repeat(500_000))), NoRequest),
        row(
            "a huge target",
            with_host(&format!("GET /{} HTTP/1.1", "evil".repeat(500_000)), "Host: api\r\n"),
            NoRequest,
        ),
    ]
}

fn sequences() -> Vec<Row> {
    let row = |what, bytes, expect| Row { what, bytes, expect };
    let hidden = hidden();
    let nobody = |lines: &str, body: &str| {
        format!("POST /evil HTTP/1.1\r\nHost: api\r\n{lines}\r\n{body}").into_bytes()
    };
    let length = format!("Content-Length: {}\r\n", hidden.len());
    let chunk = format!("{:x}\r\n{hidden}\r\n0\r\n\r\n", hidden.len());
    vec![
        row("a refused request with one in its body", nobody(&length, &hidden), Statuses(&[401])),
        row(
            "a refused request with one in its chunks",
            nobody("Transfer-Encoding: chunked\r\n", &chunk),
            Statuses(&[401]),
        ),
        row(
            "a refused request that expects 100, with one in its body",
            nobody(&format!("{length}Expect: 100-continue\r\n"), &hidden),
            Statuses(&[401]),
        ),
        row(
            "a request forbidden with one in its body",
            post(&format!("Impersonate-User: evil\r\n{length}"), &hidden),
            Statuses(&[403]),
        ),
        row("a bad request, then a good one", concat(&[&get("X-A : evil\r\n"), &get("")]), BAD),
        row("two authenticated ones", concat(&[&get(""), &get("")]), Statuses(&[200, 200])),
        row(
            "an authenticated one, then one without credentials",
            concat(&[&get(""), &nobody("", "")]),
            Statuses(&[200, 401]),
        ),
        row(
            "the same with X-Remote-User",
            concat(&[&get(""), &nobody("X-Remote-User: evil\r\n", "")]),
            Statuses(&[200, 401]),
        ),
        row(
            "a body, then one without credentials",
            concat(&[&post("Content-Length: 5\r\n", "hello"), &nobody("", "")]),
            Statuses(&[200, 401]),
        ),
        row("an empty line between", concat(&[&get(""), b"\r\n"]), PASSED),
        row(
            "Connection: close, then another",
            concat(&[&get("Connection: close\r\n"), hidden.as_bytes()]),
            PASSED,
        ),
    ]
}

fn upgrades() -> Vec<Row> {
    let row = |what, bytes, expect| Row { what, bytes, expect };
    let up = |lines: &str| get(&format!("Connection: Upgrade\r\nUpgrade: SPDY/3.1\r\n{lines}"));
    vec![
        row("an upgrade with X-Remote-User", up("X-Remote-User: evil\r\n"), Statuses(&[101])),
        row("an upgrade with X_Remote_Group", up("X_Remote_Group: evil\r\n"), Statuses(&[101])),
        row("an upgrade whose Connection names X-Remote-User", get("Connection: Upgrade, X-Remote-User\r\nUpgrade: SPDY/3.1\r\nX-Remote-User: evil\r\n"), Statuses(&[101])),
        row("an upgrade without Connection", get("Upgrade: SPDY/3.1\r\n"), OneOf(&[200, 400])),
        row("an upgrade without credentials", b"GET /evil HTTP/1.1\r\nHost: api\r\nConnection: Upgrade\r\nUpgrade: SPDY/3.1\r\nX-Remote-User: evil\r\n\r\n".to_vec(), Statuses(&[401])),
        row("an upgrade to h2c", get("Connection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\nHTTP2-Settings: AAMAAABkAAQAAP__\r\n"), OneOf(&[200, 400, 403])),
        row("an upgrade to h2c, the first of two", get("Connection: Upgrade\r\nUpgrade: h2c, SPDY/3.1\r\n"), OneOf(&[101, 200, 400, 403])),
        row("an upgrade to TLS", get("Connection: Upgrade\r\nUpgrade: TLS/1.2\r\n"), OneOf(&[101, 200, 400, 403])),
    ]
}

/// What kube-apiserver may have heard: of the caller, in the caller's own words only.
fn check(what: &str, received: &[Received], raw: &[Vec<u8>]) {
    let allowed: [Identity; 1] = [Credential::Token.identity()];
    for request in received {
        let identity = request.identity().unwrap_or_else(|error| panic!("{what}: {error:#}"));
        assert!(allowed.contains(&identity), "{what}: {identity:?}");
        assert_eq!(request.header("x-forwarded-for"), ["127.0.0.1"], "{what}");
        assert!(request.trailers.is_empty(), "{what}: {request:?}");
        let target = &request.target;
        let known = target == "/echo" || target == "/last" || target == "*" || target.starts_with("/echo#");
        assert!(known, "{what}: {target}");
        for (name, value) in &request.headers {
            let evil = name.contains(EVIL) || value.to_lowercase().contains(EVIL);
            assert!(!evil, "{what}: {name}: {value}");
            let name = name.replace('_', "-");
            let dropped =
                ["authorization", "proxy-authorization", "http2-settings", "keep-alive", "trailer", "te"];
            assert!(!dropped.contains(&name.as_str()), "{what}: {name}");
            assert!(!value.contains("h2c"), "{what}: {name}: {value}");
        }
    }
    for bytes in raw {
        let text = String::from_utf8_lossy(bytes).to_lowercase();
        assert!(!text.contains(TOKEN), "{what}: the token was passed on");
        assert!(!text.contains(EVIL), "{what}: {text}");
    }
}

fn assert_expected(row: &Row, heard: &anyhow::Result<Vec<Heard>>) {
    let what = row.what;
    let statuses: Vec<u16> = match heard {
        Ok(heard) => heard.iter().map(|heard| heard.status).filter(|status| *status != 100).collect(),
        Err(error) => panic!("{what}: {error:#}"),
    };
    // The last request is served, or the connection ended before it.
    let last = if row.may_upgrade() { 401 } else { 200 };
    let may_be_last = |rest: &[u16]| rest.is_empty() || rest == [last];
    let good = match &row.expect {
        Statuses(expected) => statuses.strip_prefix(*expected).is_some_and(may_be_last),
        OneOf(expected) => {
            statuses.split_first().is_some_and(|(first, rest)| expected.contains(first) && may_be_last(rest))
        }
        Last => statuses == [200],
        NoRequest => statuses.len() <= 1 && statuses.iter().all(|status| (400..500).contains(status)),
    };
    assert!(good, "{what}: {statuses:?}, and not {:?}", row.expect);
}

/// All rows are judged, so that one failure does not hide the others.
struct Verdicts(Vec<String>);

impl Verdicts {
    fn judge(&mut self, what: &str, judge: impl FnOnce() + std::panic::UnwindSafe) {
        if let Err(panic) = std::panic::catch_unwind(judge) {
            let message = panic.downcast_ref::<String>().cloned();
            self.0.push(message.unwrap_or_else(|| format!("{what}: failed")));
        }
    }

    fn end(self) {
        let count = self.0.len();
        assert!(self.0.is_empty(), "{count} rows failed:\n{}", self.0.join("\n"));
    }
}

async fn open(front_end: &FrontEnd, http: Http) -> Stream {
    front_end.connect(Credential::None, http).await.unwrap()
}

#[tokio::test]
async fn http1_requests_are_read_in_one_way_or_refused() {
    let front_end = FrontEnd::start(Setup::default()).await.unwrap();
    let mut rows = identities();
    rows.extend(framings());
    rows.extend(heads());
    rows.extend(sequences());
    rows.extend(upgrades());
    assert_eq!(rows.len(), 155);
    let mut verdicts = Verdicts(Vec::new());
    for row in &rows {
        // Behind every row comes a request that says whether the connection is still in step, and ends it.
        let last = if row.may_upgrade() {
            // Inside a tunnel a token would be carried, and is not to be found there.
            b"GET /last HTTP/1.1\r\nHost: api\r\nConnection: close\r\n\r\n".to_vec()
        } else {
            valid("GET /last HTTP/1.1", "Connection: close\r\n", "")
        };
        let bytes = [&row.bytes[..], &last].concat();
        let mut stream = open(&front_end, Http::V1).await;
        let heard = tokio::time::timeout(SOON, exchange(&mut stream, &bytes)).await;
        let heard = heard.unwrap_or_else(|_| Err(anyhow::anyhow!("the connection does not end")));
        drop(stream);
        let received = front_end.upstream.take();
        let raw = front_end.upstream.raw();
        verdicts.judge(row.what, || assert_expected(row, &heard));
        let raw = if matches!(row.expect, Last) { &raw[..0] } else { &raw[..] };
        verdicts.judge(row.what, || check(row.what, &received, raw));
        verdicts.judge(row.what, || {
            let served = heard.iter().flatten().filter(|heard| [101, 200].contains(&heard.status)).count();
            assert_eq!(
                received.iter().filter(|r| r.whole || served > 0).count(),
                served,
                "{}: {received:?}",
                row.what
            );
        });
        front_end.upstream.forget_raw();
        // The next honest caller is not answered with what was left behind.
        let answer = front_end.caller(Credential::Token, Http::V1).await.unwrap().get("/echo").await.unwrap();
        let received = front_end.upstream.take();
        verdicts.judge(row.what, || {
            // The failed end of the request before may come as late as this one.
            let received = received.iter().filter(|r| r.whole).count();
            assert_eq!((answer.status.as_u16(), received), (200, 1), "after {}", row.what);
        });
    }
    println!("{} rows over HTTP/1.1", rows.len());
    Health::no_panic(&front_end);
    verdicts.end();
}

/// The process's health, by its log alone.
struct Health;

impl Health {
    fn no_panic(front_end: &FrontEnd) {
        tests::steady::Health::of(&front_end.cluster.master).no_panic();
    }
}

/// kube-apiserver refuses the upgrade: what follows is another request, and is authenticated as one.
#[tokio::test]
async fn after_a_refused_upgrade_the_connection_is_no_tunnel() {
    let front_end = FrontEnd::start(Setup::default()).await.unwrap();
    front_end.upstream.behave(Behaviour { no_upgrade: true, ..Behaviour::default() });
    for upgrade in ["SPDY/3.1", "websocket", "h2c"] {
        let mut stream = open(&front_end, Http::V1).await;
        let mut bytes = get(&format!("Connection: Upgrade\r\nUpgrade: {upgrade}\r\n"));
        bytes.extend(b"GET /evil HTTP/1.1\r\nHost: api\r\nX-Remote-User: evil\r\nConnection: close\r\n\r\n");
        let heard = completes(upgrade, exchange(&mut stream, &bytes)).await.unwrap();
        let statuses: Vec<u16> = heard.iter().map(|heard| heard.status).collect();
        assert!([&[200, 401][..], &[200], &[400], &[403]].contains(&&statuses[..]), "{upgrade} {statuses:?}");
        check(upgrade, &front_end.upstream.take(), &front_end.upstream.raw());
    }
}

/// What comes right behind the head of an upgrade is not sent on before it was agreed to.
#[tokio::test]
async fn bytes_behind_an_upgrade_are_not_taken_for_requests() {
    let front_end = FrontEnd::start(Setup::default()).await.unwrap();
    let mut stream = open(&front_end, Http::V1).await;
    let bytes = concat(&[&get("Connection: Upgrade\r\nUpgrade: SPDY/3.1\r\n"), hidden().as_bytes()]);
    stream.write_all(&bytes).await.unwrap();
    let heard = completes("101", hear(&mut stream)).await.unwrap().unwrap();
    assert_eq!(heard.status, 101);
    stream.shutdown().await.unwrap();
    let mut echoed = Vec::new();
    completes("an echo", tokio::io::AsyncReadExt::read_to_end(&mut stream, &mut echoed)).await.unwrap();
    assert!(String::from_utf8_lossy(&echoed).starts_with(&hidden()), "{}", String::from_utf8_lossy(&echoed));
    let received = front_end.upstream.take();
    assert_eq!(received.len(), 1);
    check("an upgrade", &received, &[]);
}

/// Fields of a request over HTTP/2.
type Fields = Vec<(Vec<u8>, Vec<u8>)>;

fn fields(extra: &[(&str, &str)]) -> Fields {
    let bearer = format!("Bearer {TOKEN}");
    let base = [
        (":method", "POST"),
        (":scheme", "https"),
        (":authority", "api"),
        (":path", "/echo"),
        ("authorization", &bearer),
    ];
    let all = base.iter().chain(extra);
    all.map(|(name, value)| (name.as_bytes().to_vec(), value.as_bytes().to_vec())).collect()
}

/// The same with pseudo-headers replaced; an empty value leaves one out.
fn pseudo(replaced: &[(&str, &str)]) -> Fields {
    let mut all = fields(&[]);
    for (name, value) in replaced {
        all.retain(|(n, _)| n != name.as_bytes());
        if !value.is_empty() {
            all.insert(0, (name.as_bytes().to_vec(), value.as_bytes().to_vec()));
        }
    }
    all
}

/// What an HTTP/2 row is to come to.
#[derive(Clone, Copy, Debug)]
enum Expect2 {
    Served,
    /// A response of 4xx, a stream error, or the connection's end.
    Refused,
    /// Either, as long as kube-apiserver hears nothing wrong.
    Either,
}

struct Row2 {
    what: &'static str,
    frames: Vec<Frame>,
    expect: Expect2,
}

#[tokio::test]
async fn http2_requests_are_read_in_one_way_or_refused() {
    use Expect2::{Either, Refused, Served};
    let rows = http2_rows();
    assert_eq!(rows.len(), 62);
    for http2 in [false, true] {
        let front_end = FrontEnd::start(Setup { http2, ..Setup::default() }).await.unwrap();
        let mut verdicts = Verdicts(Vec::new());
        for row in &rows {
            let mut connection = h2::Connection::start(open(&front_end, Http::V2).await).await.unwrap();
            let mut bytes = BytesMut::new();
            for frame in &row.frames {
                bytes.extend_from_slice(&frame.encode());
            }
            let _ = connection.write(&bytes).await;
            let answer = completes(row.what, connection.answer(1)).await;
            let received = front_end.upstream.take();
            let raw = if http2 { Vec::new() } else { front_end.upstream.raw() };
            front_end.upstream.forget_raw();
            let status = match &answer {
                Ok(Answer::Response(response)) => Some(response.status),
                _ => None,
            };
            verdicts.judge(row.what, || {
                let good = match row.expect {
                    Served => status == Some(200),
                    Refused => status.is_none_or(|status| (400..500).contains(&status)),
                    Either => status.is_none_or(|status| (200..500).contains(&status)),
                };
                assert!(answer.is_ok() && good, "{}: {answer:?}, and not {:?}", row.what, row.expect);
            });
            verdicts.judge(row.what, || check(row.what, &received, &raw));
            verdicts.judge(row.what, || {
                let whole = received.iter().filter(|received| received.whole).count();
                assert!(whole <= usize::from(status == Some(200)), "{}: {received:?}", row.what);
            });
            let answer =
                front_end.caller(Credential::Token, Http::V2).await.unwrap().get("/echo").await.unwrap();
            assert_eq!(answer.status.as_u16(), 200, "after {}", row.what);
            front_end.upstream.take();
        }
        println!("{} rows over HTTP/2, upstream HTTP/2 {http2}", rows.len());
        Health::no_panic(&front_end);
        verdicts.end();
    }
}

fn http2_rows() -> Vec<Row2> {
    use Expect2::{Either, Refused, Served};
    let head = |fields: &Fields| Frame::new(HEADERS, END_HEADERS | END_STREAM, 1, block(fields));
    let open_head = |fields: &Fields| Frame::new(HEADERS, END_HEADERS, 1, block(fields));
    let data = |text: &str, end: bool| {
        Frame::new(DATA, if end { END_STREAM } else { 0 }, 1, Bytes::copy_from_slice(text.as_bytes()))
    };
    let row = |what, frames: Vec<Frame>, expect| Row2 { what, frames, expect };
    let one =
        |what, extra: &[(&str, &str)], expect| Row2 { what, frames: vec![head(&fields(extra))], expect };
    let with = |what, replaced: &[(&str, &str)], expect| Row2 {
        what,
        frames: vec![head(&pseudo(replaced))],
        expect,
    };
    let hidden = hidden();
    let lines = "/echo HTTP/1.1\r\nX-Remote-User: evil\r\nX-A: ";
    let split = {
        let whole = block(&fields(&[("x-remote-user", "evil")]));
        let middle = whole.len() - 8;
        vec![
            Frame::new(HEADERS, END_STREAM, 1, whole.slice(..middle)),
            Frame::new(CONTINUATION, END_HEADERS, 1, whole.slice(middle..)),
        ]
    };
    let trailers = |extra: &[(&str, &str)]| {
        let extra: Fields =
            extra.iter().map(|(n, v)| (n.as_bytes().to_vec(), v.as_bytes().to_vec())).collect();
        vec![open_head(&fields(&[])), data("hello", false), head(&extra)]
    };
    let mut late = fields(&[]);
    late.push((b":authority".to_vec(), b"evil".to_vec()));
    let mut behind = fields(&[]);
    behind.rotate_left(1);
    let nobody: Fields =
        fields(&[("x-remote-user", "evil")]).into_iter().filter(|(n, _)| n != b"authorization").collect();
    vec![
        one("nothing of the sort", &[], Served),
        one("x-remote-user", &[("x-remote-user", "evil")], Served),
        one("x_remote_user", &[("x_remote_user", "evil")], Served),
        one("x-remote_user twice", &[("x-remote_user", "evil"), ("x-remote_user", "evil")], Served),
        one("x-remote-group twice", &[("x-remote-group", "evil"), ("x-remote-group", "evil2")], Served),
        one("x-remote-uid", &[("x-remote-uid", "evil")], Served),
        one("x-remote-extra", &[("x-remote-extra-scopes", "evil"), ("x-remote-extra-%61", "evil")], Served),
        one("x-remote-anything", &[("x-remote-anything", "evil"), ("x_remote_", "evil")], Served),
        one("an empty x-remote-user", &[("x-remote-user", "")], Served),
        one(
            "whence",
            &[("x-forwarded-for", "evil"), ("forwarded", "for=evil"), ("x-real-ip", "evil")],
            Served,
        ),
        one("cookies in parts", &[("cookie", "a=1"), ("cookie", "b=2")], Served),
        row("X-Remote-User behind a CONTINUATION", split, Served),
        one("impersonate-user", &[("impersonate-user", "evil")], Refused),
        one("impersonate_user", &[("impersonate_user", "evil")], Either),
        one("two tokens", &[("authorization", &format!("Bearer {GREEDY}"))], Refused),
        row("x-remote-user in place of a token", vec![head(&nobody)], Refused),
        // Names in upper case are malformed.
        one("X-Remote-User", &[("X-Remote-User", "evil")], Refused),
        one("x-remote-useR", &[("x-remote-useR", "evil")], Refused),
        one("AUTHORIZATION", &[("AUTHORIZATION", "Bearer evil")], Refused),
        // Pseudo-headers.
        one(":x-remote-user", &[(":x-remote-user", "evil")], Refused),
        with(":x-remote-user first", &[(":x-remote-user", "evil")], Refused),
        one(":status", &[(":status", "200")], Refused),
        row(":authority after the others", vec![head(&late)], Refused),
        row("a pseudo-header after a field", vec![head(&behind)], Either),
        one("two :path", &[(":path", "/evil")], Refused),
        one("two :method", &[(":method", "GET")], Refused),
        one("two :scheme", &[(":scheme", "http")], Refused),
        with("no :path", &[(":path", "")], Refused),
        with("no :method", &[(":method", "")], Refused),
        with("no :scheme", &[(":scheme", "")], Refused),
        with(":path *", &[(":path", "*")], Refused),
        with(":path of another host", &[(":path", "https://evil.example/echo")], Refused),
        with(":path without a slash", &[(":path", "evil")], Refused),
        with(":path with a line", &[(":path", lines)], Refused),
        with(":path with a space", &[(":path", "/echo evil")], Refused),
        with(":path with NUL", &[(":path", "/echo\0evil")], Refused),
        with(
            ":method with a line",
            &[(":method", "GET /evil HTTP/1.1\r\nX-Remote-User: evil\r\n\r\nPOST")],
            Refused,
        ),
        with(":method with a space", &[(":method", "GET /evil")], Refused),
        with(":authority with a line", &[(":authority", "api\r\nX-Remote-User: evil")], Refused),
        with(":authority with a user", &[(":authority", "evil@api")], Either),
        with(":scheme with a line", &[(":scheme", "https\r\nX-Remote-User: evil")], Refused),
        with(":scheme with a path", &[(":scheme", "https://evil/?")], Refused),
        one("another host", &[("host", "evil")], Refused),
        one("two hosts", &[("host", "api"), ("host", "evil")], Refused),
        with("CONNECT", &[(":method", "CONNECT"), (":scheme", ""), (":path", "")], Refused),
        with("extended CONNECT", &[(":method", "CONNECT"), (":protocol", "websocket-evil")], Refused),
        // Fields of HTTP/1.1 only.
        one("connection: x-remote-user", &[("connection", "x-remote-user")], Refused),
        one("transfer-encoding", &[("transfer-encoding", "chunked")], Refused),
        one("upgrade", &[("upgrade", "h2c"), ("connection", "upgrade")], Refused),
        one("te: gzip", &[("te", "gzip")], Refused),
        // Bytes that mean something in HTTP/1.1.
        one("a value with a line", &[("x-a", "b\r\nX-Remote-User: evil")], Refused),
        one("a value with LF", &[("x-a", "b\nX-Remote-User: evil")], Refused),
        one("a value with CR", &[("x-a", "b\rX-Remote-User: evil")], Refused),
        one("a value with NUL", &[("x-a", "b\0evil")], Refused),
        one("a name with a line", &[("x-a: b\r\nx-remote-user", "evil")], Refused),
        one("a name with a colon", &[("x-remote-user: evil", "b")], Refused),
        // Lengths.
        row(
            "H2.CL, too short",
            vec![open_head(&fields(&[("content-length", "5")])), data(&format!("hello{hidden}"), true)],
            Refused,
        ),
        row(
            "H2.CL of nothing",
            vec![open_head(&fields(&[("content-length", "0")])), data(&hidden, true)],
            Refused,
        ),
        row(
            "H2.CL, too long",
            vec![open_head(&fields(&[("content-length", "500")])), data("hello", true)],
            Refused,
        ),
        row(
            "H2.CL twice",
            vec![
                open_head(&fields(&[("content-length", "5"), ("content-length", "6")])),
                data("hello", true),
            ],
            Refused,
        ),
        row(
            "H2.CL with a sign",
            vec![open_head(&fields(&[("content-length", "+5")])), data("hello", true)],
            Refused,
        ),
        row(
            "x-remote-user as a trailer",
            trailers(&[("x-remote-user", "evil"), ("x_remote_group", "evil")]),
            Served,
        ),
    ]
}
