//! The head of an HTTP CONNECT request (RFC 9110 §9.3.6) and the answers to it, as kube-apiserver and its egress proxy
//! exchange them. Only the request target matters for routing; `Host` is ignored.

use crate::{DialError, Target, target::InvalidTarget};

/// The most bytes of a request's head.
pub const MAX_HEAD: usize = 16 * 1024;
const MAX_HEADERS: usize = 64;

/// The answer to a dial that has succeeded. The next bytes must be the target's.
pub const ESTABLISHED: &[u8] = b"HTTP/1.1 200 Connection Established\r\n\r\n";

/// A request, and the length of its head. The bytes after it belong to the target.
#[derive(Debug, PartialEq, Eq)]
pub struct Request {
    pub target: Target,
    pub head_len: usize,
}

/// Why a head is not a CONNECT request.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum HeadError {
    #[error("not an HTTP/1.1 request: {0}")]
    Malformed(String),
    #[error("the request's head is larger than {MAX_HEAD} bytes, or has more than {MAX_HEADERS} headers")]
    TooLarge,
    #[error("only CONNECT HOST:PORT is served here")]
    Method,
    #[error("{target:?} is no target: {error}")]
    Target { target: String, error: InvalidTarget },
    #[error("a CONNECT request has no body")]
    Body,
    #[error("the request's head did not arrive in time")]
    Timeout,
}

/// Reads a head; `None` if more bytes are needed.
pub fn parse(bytes: &[u8]) -> Result<Option<Request>, HeadError> {
    let mut headers = [httparse::EMPTY_HEADER; MAX_HEADERS];
    let mut request = httparse::Request::new(&mut headers);
    let status = match request.parse(bytes) {
        Ok(status) => status,
        Err(httparse::Error::TooManyHeaders) => return Err(HeadError::TooLarge),
        Err(e) => return Err(HeadError::Malformed(e.to_string())),
    };
    // A wrong method is answered without waiting for the rest of the head.
    if request.method.is_some_and(|m| m != "CONNECT") {
        return Err(HeadError::Method);
    }
    let httparse::Status::Complete(head_len) = status else {
        return if bytes.len() >= MAX_HEAD { Err(HeadError::TooLarge) } else { Ok(None) };
    };
    if head_len > MAX_HEAD {
        return Err(HeadError::TooLarge);
    }
    let body = |h: &httparse::Header<'_>| {
        h.name.eq_ignore_ascii_case("transfer-encoding")
            || h.name.eq_ignore_ascii_case("content-length") && h.value.trim_ascii() != b"0"
    };
    if request.headers.iter().any(body) {
        return Err(HeadError::Body);
    }
    let target = request.path.unwrap_or_default();
    match target.parse() {
        Ok(target) => Ok(Some(Request { target, head_len })),
        Err(error) => Err(HeadError::Target { target: target.chars().take(100).collect(), error }),
    }
}

/// The status that answers a head that can't be served.
pub fn head_status(error: &HeadError) -> u16 {
    match error {
        HeadError::Malformed(_) | HeadError::Target { .. } | HeadError::Body => 400,
        HeadError::TooLarge => 431,
        HeadError::Method => 405,
        HeadError::Timeout => 408,
    }
}

/// The status that answers a dial that has failed.
pub fn dial_status(error: &DialError) -> u16 {
    match error {
        DialError::BadTarget(_) => 400,
        DialError::Policy { .. } => 403,
        DialError::NoRoute(_) | DialError::Refused(_) | DialError::Resolve(_) | DialError::Unreachable(_) => {
            502
        }
        DialError::TooManyStreams(_)
        | DialError::NoTunnel { .. }
        | DialError::TunnelLost { .. }
        | DialError::Cancelled => 503,
        DialError::TimedOut(_) => 504,
    }
}

/// A whole answer that refuses a request. kube-apiserver shows the status line to its user, so the reason is in that line,
/// and for other callers in the body.
pub fn refusal(status: u16, reason: &str) -> Vec<u8> {
    let printable: String = reason.chars().map(|c| if (' '..='~').contains(&c) { c } else { '?' }).collect();
    let line: String = printable.chars().take(400).collect();
    let allow = if status == 405 { "Allow: CONNECT\r\n" } else { "" };
    format!(
        "HTTP/1.1 {status} {line}\r\nContent-Type: text/plain\r\nContent-Length: {}\r\n{allow}Connection: close\r\n\r\n{printable}\n",
        printable.len() + 1
    )
    .into_bytes()
}

#[cfg(test)]
mod tests {
    use rand::{RngExt, SeedableRng, rngs::StdRng};

    use super::*;

    fn target(head: &str) -> Result<Option<String>, HeadError> {
        parse(head.as_bytes()).map(|r| r.map(|r| r.target.to_string()))
    }

    #[test]
    fn reads_what_kube_apiserver_sends() {
        for (file, want, rest) in [
            (
                &include_bytes!("../../tests/data/captures/http-connect-uds-1.client.bin")[..],
                "10.77.1.2:8080",
                "GET / HTTP/1.1\r\n",
            ),
            (include_bytes!("../../tests/data/captures/http-connect-uds-2.client.bin"), "10.77.1.2:8081", ""),
        ] {
            let request = parse(file).unwrap().unwrap();
            assert_eq!(request.target.to_string(), want);
            assert!(file[request.head_len..].starts_with(rest.as_bytes()));
            for len in 0..request.head_len {
                assert_eq!(parse(&file[..len]), Ok(None), "at {len}");
            }
        }
    }

    #[test]
    fn table() {
        assert_eq!(
            target("CONNECT [fd00::1]:443 HTTP/1.1\r\nHost: x\r\n\r\n"),
            Ok(Some("[fd00::1]:443".into()))
        );
        assert_eq!(target("CONNECT n1:10250 HTTP/1.0\r\n\r\n"), Ok(Some("n1:10250".into())));
        assert_eq!(target("CONNECT n1:1 HTTP/1.1\r\nContent-Length: 0\r\n\r\n"), Ok(Some("n1:1".into())));
        for (head, status) in [
            ("GET / HTTP/1.1\r\n\r\n", 405),
            ("POST http://n1:1/ HTTP/1.1\r\n", 405),
            ("CONNECT n1 HTTP/1.1\r\n\r\n", 400),
            ("CONNECT n1:99999 HTTP/1.1\r\n\r\n", 400),
            ("CONNECT http://n1:1 HTTP/1.1\r\n\r\n", 400),
            ("CONNECT fd00::1:443 HTTP/1.1\r\n\r\n", 400),
            ("CONNECT n1:1 HTTP/2.0\r\n\r\n", 400),
            ("CONNECT n1:1 HTTP/1.1\r\nA b: c\r\n\r\n", 400),
            ("CONNECT n1:1 HTTP/1.1\r\nA: b\0\r\n\r\n", 400),
            ("CONNECT n1:1 HTTP/1.1\r\nContent-Length: 5\r\n\r\n", 400),
            ("CONNECT n1:1 HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n", 400),
            ("\x16\x03\x01\x02\0\x01", 400),
        ] {
            let error = parse(head.as_bytes()).unwrap_err();
            assert_eq!(head_status(&error), status, "{head:?}: {error}");
        }
        let many = format!("CONNECT n1:1 HTTP/1.1\r\n{}\r\n", "a: b\r\n".repeat(MAX_HEADERS + 1));
        assert_eq!(target(&many), Err(HeadError::TooLarge));
        let long = format!("CONNECT n1:1 HTTP/1.1\r\na: {}", "b".repeat(MAX_HEAD));
        assert_eq!(target(&long), Err(HeadError::TooLarge));
    }

    #[test]
    fn a_reason_can_not_break_the_status_line() {
        let text = String::from_utf8(refusal(502, "a\r\nSet-Cookie: b\u{e9}")).unwrap();
        assert!(text.starts_with("HTTP/1.1 502 a??Set-Cookie: b?\r\nContent-Type"), "{text}");
    }

    #[test]
    fn no_bytes_make_it_panic() {
        let mut rng = StdRng::seed_from_u64(1);
        let valid = b"CONNECT [fd00::1]:443 HTTP/1.1\r\nHost: 127.0.0.1\r\nUser-Agent: x\r\n\r\n";
        for _ in 0..50_000 {
            let mut bytes = valid.to_vec();
            for _ in 0..rng.random_range(1..8) {
                let at = rng.random_range(0..bytes.len());
                match rng.random_range(0..3) {
                    0 => bytes[at] = rng.random(),
                    1 => bytes.insert(at, rng.random()),
                    _ => drop(bytes.remove(at)),
                }
            }
            if let Err(e) = parse(&bytes) {
                assert!((400..500).contains(&head_status(&e)));
            }
        }
    }
}
