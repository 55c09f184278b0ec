//! Ambiguous requests, and callers that claim to be somebody else: over HTTP/1.1 and HTTP/2, as bytes. Whatever the
//! answer, kube-apiserver hears of nobody whom the front end did not authenticate, and two independent readers agree
//! about the requests that it is sent.

mod http1_rows;
mod http2_rows;

use bytes::BytesMut;
use http1_rows::{
    Expect::{Last, NoRequest, OneOf, Statuses},
    Row, get, hidden, valid,
};
use http2_rows::Expect2;
use tests::{
    client::Stream,
    cluster::SOON,
    front_end::{Credential, FrontEnd, Heard, Http, Setup, TOKEN, exchange, hear},
    h2::{self, Answer},
    load::completes,
    second_reader,
    upstream::{Behaviour, HEALTH, Identity, Received},
};
use tokio::io::AsyncWriteExt;

/// In everything that a caller makes up, and in nothing else.
const EVIL: &str = "evil";

/// Checks that kube-apiserver heard of the caller alone, and nothing that the caller made up.
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

/// The bytes that kube-apiserver got on each connection. The stub reads them with the front end's own parser, so another
/// reader judges them.
#[derive(Default)]
struct Readings {
    streams: Vec<Vec<u8>>,
    of: Vec<(&'static str, Vec<Received>)>,
}

impl Readings {
    fn keep(&mut self, what: &'static str, received: &[Received], raw: &[Vec<u8>]) {
        for (index, bytes) in raw.iter().enumerate().filter(|(_, bytes)| !bytes.is_empty()) {
            let on_it = received.iter().filter(|request| request.connection == index);
            self.streams.push(bytes.clone());
            self.of.push((what, on_it.cloned().collect()));
        }
    }

    /// Both readers have seen the same requests, with the same heads.
    fn judge(self, verdicts: &mut Verdicts) {
        let readings = second_reader::read(&self.streams).unwrap();
        let mut compared = 0;
        for (((what, received), reading), bytes) in self.of.iter().zip(readings).zip(&self.streams) {
            // A request that is cut short is no request to either reader.
            let upgrades = |request: &&Received| !request.header("upgrade").is_empty();
            let first = received
                .iter()
                .filter(|request| request.whole || upgrades(request))
                .map(|request| (request.method.clone(), request.target.clone(), sorted(&request.headers)));
            let second = reading
                .into_iter()
                .filter(|request| request.whole && request.target != HEALTH)
                .map(|request| (request.method, request.target, sorted(&request.headers)));
            let (first, second): (Vec<_>, Vec<_>) = (first.collect(), second.collect());
            compared += first.len();
            verdicts.judge(what, || {
                let shown = bytes[..bytes.len().min(1000)].escape_ascii().to_string();
                assert_eq!(first, second, "{what}: two readers differ about {shown}");
            });
        }
        println!("{compared} requests on {} connections read by another reader", self.streams.len());
    }
}

fn sorted(headers: &[(String, String)]) -> Vec<(String, String)> {
    let mut all: Vec<_> =
        headers.iter().map(|(name, value)| (name.clone(), value.trim().to_owned())).collect();
    all.sort();
    all
}

async fn open(front_end: &FrontEnd, http: Http) -> Stream {
    front_end.connect(Credential::None, http).await.unwrap()
}

#[tokio::test]
async fn http1_requests_are_read_in_one_way_or_refused() {
    let front_end = FrontEnd::start(Setup::default()).await.unwrap();
    let rows = http1_rows::rows();
    assert_eq!(rows.len(), 155);
    let (mut verdicts, mut readings) = (Verdicts(Vec::new()), Readings::default());
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
        readings.keep(row.what, &received, &raw);
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
        front_end.upstream.forget_raw();
        verdicts.judge(row.what, || {
            // The failed end of the request before may come as late as this one.
            let received = received.iter().filter(|r| r.whole).count();
            assert_eq!((answer.status.as_u16(), received), (200, 1), "after {}", row.what);
        });
    }
    println!("{} rows over HTTP/1.1", rows.len());
    readings.judge(&mut verdicts);
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

/// Bytes right behind the head of an upgrade are not sent on before the server has agreed to it.
#[tokio::test]
async fn bytes_behind_an_upgrade_are_not_taken_for_requests() {
    let front_end = FrontEnd::start(Setup::default()).await.unwrap();
    let mut stream = open(&front_end, Http::V1).await;
    let bytes = [&get("Connection: Upgrade\r\nUpgrade: SPDY/3.1\r\n"), hidden().as_bytes()].concat();
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

#[tokio::test]
async fn http2_requests_are_read_in_one_way_or_refused() {
    use Expect2::{Either, Refused, Served};
    let rows = http2_rows::rows();
    assert_eq!(rows.len(), 62);
    for http2 in [false, true] {
        let front_end = FrontEnd::start(Setup { http2, ..Setup::default() }).await.unwrap();
        let (mut verdicts, mut readings) = (Verdicts(Vec::new()), Readings::default());
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
            readings.keep(row.what, &received, &raw);
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
            front_end.upstream.forget_raw();
        }
        readings.judge(&mut verdicts);
        println!("{} rows over HTTP/2, upstream HTTP/2 {http2}", rows.len());
        Health::no_panic(&front_end);
        verdicts.end();
    }
}
