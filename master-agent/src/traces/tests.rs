//! Propagation, endpoints, headers files, and the absence of spans without traces.

use std::path::Path;

use hyper::header::HeaderValue;

use super::{config::read_headers, *};
use crate::config::Config;

const TRACE: &str = "0af7651916cd43dd8448eb211c80319c";
const SPAN: &str = "b7ad6b7169203331";

fn headers(values: &[&[u8]]) -> HeaderMap {
    let mut headers = HeaderMap::new();
    for value in values {
        headers.append("traceparent", HeaderValue::from_bytes(value).unwrap());
    }
    headers
}

#[test]
fn only_a_single_valid_traceparent_is_accepted() {
    let good = format!("00-{TRACE}-{SPAN}-01");
    let span = parent(&headers(&[good.as_bytes()])).unwrap();
    assert_eq!(ids(&span), (TRACE.to_owned(), SPAN.to_owned()));
    assert!(span.is_sampled() && span.is_remote());
    assert!(!parent(&headers(&[format!("00-{TRACE}-{SPAN}-00").as_bytes()])).unwrap().is_sampled());

    let long = format!("00-{TRACE}-{SPAN}-01-{}", "x".repeat(60_000));
    let bad: [&[u8]; 16] = [
        b"01-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01x",
        b"+0-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01",
        b"",
        b"-",
        b"---",
        b"00",
        b"00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331",
        b"00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01-x",
        b"00-0AF7651916CD43DD8448EB211C80319C-b7ad6b7169203331-01",
        b"00-00000000000000000000000000000000-b7ad6b7169203331-01",
        b"00-0af7651916cd43dd8448eb211c80319c-0000000000000000-01",
        b"ff-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01",
        b"00-0af7651916cd43dd8448eb211c80319z-b7ad6b7169203331-01",
        b"00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-zz",
        b"\xff\xfe-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01",
        long.as_bytes(),
    ];
    for value in bad {
        assert_eq!(parent(&headers(&[value])), None, "{}", String::from_utf8_lossy(value));
    }
    assert_eq!(parent(&headers(&[])), None);
    assert_eq!(parent(&headers(&[good.as_bytes(), good.as_bytes()])), None);
}

#[test]
fn a_forwarded_request_is_part_of_the_span() {
    let mut headers = headers(&[format!("cc-{TRACE}-{SPAN}-ff-more").as_bytes()]);
    headers.insert("tracestate", HeaderValue::from_static("vendor=1"));
    let span = parent(&headers).unwrap();
    inject(&span, &mut headers);
    assert_eq!(headers.get_all("traceparent").iter().count(), 1);
    assert_eq!(headers["traceparent"], format!("00-{TRACE}-{SPAN}-01"));
    assert_eq!(headers["tracestate"], "vendor=1");
}

fn errors(traces: &str) -> Vec<String> {
    let text = format!("traces:\n  {}\n", traces.replace('\n', "\n  "));
    let parsed = Config::parse(&text, "test.yaml", Path::new("/"));
    parsed.err().iter().flat_map(|errors| errors.iter()).map(ToString::to_string).collect()
}

#[test]
fn endpoints_are_validated() {
    for good in [
        "endpoint: https://collector.example:4318/v1/traces",
        "endpoint: http://127.0.0.1:4318/v1/traces\nsample_ratio: 0.25",
        "endpoint: http://[::1]:4318/v1/traces\nsample_ratio: 0\nqueue: 1",
    ] {
        assert_eq!(errors(good), Vec::<String>::new(), "{good}");
    }
    for (bad, expected) in [
        ("queue: 1", "endpoint"),
        ("endpoint: http://collector.example:4318/v1/traces", "http:// is for loopback only"),
        ("endpoint: collector.example:4318", "expected https://HOST:4318/v1/traces"),
        ("endpoint: https://collector.example:4318", "expected https://HOST:4318/v1/traces"),
        ("endpoint: grpc://127.0.0.1:4317/x", "must be https://"),
        ("endpoint: https://c/v1/traces\nsample_ratio: 1.5", "from 0 to 1"),
        ("endpoint: https://c/v1/traces\nsample_ratio: -1", "expected a number"),
        ("endpoint: https://c/v1/traces\nsample_ratio: NaN", "expected a number"),
        ("endpoint: https://c/v1/traces\ncert: a.crt", "go together"),
    ] {
        let errors = errors(bad);
        assert!(errors.iter().any(|error| error.contains(expected)), "{bad}: {errors:?}");
    }
}

#[test]
fn headers_files_are_read_and_errors_show_no_values() {
    let path = std::env::temp_dir().join(format!("traces-headers-{}", std::process::id()));
    let write = |text: &str| proto_config::secret_file::replace(&path, text.as_bytes()).unwrap();
    write("# a comment\n\nAuthorization:  Basic abc \nX-Scope: a:b\n");
    let headers = read_headers(&path).unwrap();
    assert_eq!((headers.len(), &*headers["Authorization"], &*headers["X-Scope"]), (2, "Basic abc", "a:b"));
    for bad in ["Authorization secret\n", "a b: secret\n", "a: secret\u{7f}\n"] {
        write(bad);
        let error = format!("{:#}", read_headers(&path).unwrap_err());
        assert!(error.contains("line 1: expected NAME: VALUE") && !error.contains("secret"), "{error}");
    }
    std::fs::remove_file(&path).unwrap();
    assert!(read_headers(&path).is_err());
}

#[test]
fn without_traces_there_are_no_spans() {
    let mut span = Span::start(SpanKind::Server, None, SystemTime::now(), || unreachable!());
    span.fail("x", "y");
    assert!(!span.is_sent() && span.context().is_none());
}
