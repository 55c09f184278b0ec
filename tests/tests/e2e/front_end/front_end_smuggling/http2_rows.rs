//! Requests over HTTP/2, as frames, with the answers that are expected.

use bytes::Bytes;
use tests::{
    front_end::{GREEDY, TOKEN},
    h2::{CONTINUATION, DATA, END_HEADERS, END_STREAM, Frame, HEADERS, block},
};

use super::http1_rows::hidden;

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

/// The outcome that a row must have.
#[derive(Clone, Copy, Debug)]
pub(super) enum Expect2 {
    Served,
    /// A response of 4xx, a stream error, or the connection's end.
    Refused,
    /// Either, as long as kube-apiserver hears nothing wrong.
    Either,
}

pub(super) struct Row2 {
    pub(super) what: &'static str,
    pub(super) frames: Vec<Frame>,
    pub(super) expect: Expect2,
}

pub(super) fn rows() -> Vec<Row2> {
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
