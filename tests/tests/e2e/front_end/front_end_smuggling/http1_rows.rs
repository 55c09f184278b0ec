//! Requests over HTTP/1.1, as bytes, with the answers that are expected.

use std::fmt::Write as _;

use tests::{
    front_end::{GREEDY, TOKEN},
    h2,
};

use Expect::{Last, NoRequest, OneOf, Statuses};

/// The answers that a row must get.
#[derive(Clone, Debug)]
pub(super) enum Expect {
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

pub(super) struct Row {
    pub(super) what: &'static str,
    pub(super) bytes: Vec<u8>,
    pub(super) expect: Expect,
}

impl Row {
    pub(super) fn may_upgrade(&self) -> bool {
        matches!(self.expect, Statuses(expected) | OneOf(expected) if expected.contains(&101))
    }
}

/// All of them.
pub(super) fn rows() -> Vec<Row> {
    [identities(), framings(), heads(), sequences(), upgrades()].into_iter().flatten().collect()
}

/// A request of a valid user: the first line, lines of the head each with their own end, the body.
pub(super) fn valid(line: &str, lines: &str, body: &str) -> Vec<u8> {
    format!("{line}\r\nHost: api\r\nAuthorization: Bearer {TOKEN}\r\n{lines}\r\n{body}").into_bytes()
}

pub(super) fn get(lines: &str) -> Vec<u8> {
    valid("GET /echo HTTP/1.1", lines, "")
}

fn post(lines: &str, body: &str) -> Vec<u8> {
    valid("POST /echo HTTP/1.1", lines, body)
}

fn concat(parts: &[&[u8]]) -> Vec<u8> {
    parts.concat()
}

/// A whole request that must not be taken for one, with a token that is right.
pub(super) fn hidden() -> String {
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
