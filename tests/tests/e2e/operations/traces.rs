//! A request through the front end and the stream that it leads to are one trace.

use std::{collections::HashSet, convert::Infallible};

use bytes::Bytes;
use http_body_util::{BodyExt, Full};
use hyper::{Request, Response, StatusCode, body::Incoming, service::service_fn};
use hyper_util::rt::TokioIo;
use serde_json::Value;
use tests::{
    cluster::{Kind, SOON},
    collector::{Collector, Sent},
    front_end::{Credential, FrontEnd, Http, SAM, Setup, role},
    pki::{self, Authority},
    process::{TempDir, eventually, free_port},
};
use tokio::net::TcpListener;

const SPAN: &str = "b7ad6b7169203331";
/// A header for the collector, which nobody else may see.
const AUTHORIZATION: &str = "Bearer secret-of-the-collector";

/// `port` is of something on the node, for those who may reach it.
async fn front_end(port: u16, traces: &str) -> FrontEnd {
    let lines = "  serve_proxy_urls: true\n".to_owned();
    let master_config = format!("proxy_urls: {{}}\nlog: {{format: json, level: info}}\n{traces}\n");
    let nodes = vec![("n1".to_owned(), Kind::Dialled)];
    let setup = Setup { lines, master_config, nodes, ports: vec![port], ..Setup::default() };
    let front_end = FrontEnd::start(setup).await.unwrap();
    let rule = "apiGroups: [''], resources: [nodes/proxy], verbs: [get]";
    front_end.replace("rbac.yaml", &role("proxy", rule, &[SAM])).unwrap();
    eventually("the new rules", SOON, async || {
        let status = ask(&front_end, Credential::Token, &node_url(port, ""), None).await.0;
        (status == StatusCode::OK).then_some(())
    })
    .await;
    front_end
}

fn node_url(port: u16, rest: &str) -> String {
    format!("/api/v1/nodes/http:n1:{port}/proxy/{rest}")
}

/// Asks once, and gives the status and the body.
async fn ask(
    front_end: &FrontEnd,
    credential: Credential,
    target: &str,
    traceparent: Option<&str>,
) -> (StatusCode, String) {
    let mut request = Request::get(target);
    if let Some(traceparent) = traceparent {
        request = request.header("traceparent", traceparent);
    }
    let mut caller = front_end.caller(credential, Http::V1).await.unwrap();
    let answer = caller.ask(request.body(Full::default()).unwrap()).await.unwrap();
    (answer.status, String::from_utf8(answer.body.to_vec()).unwrap())
}

/// The record of the one stream whose origin is a request.
async fn stream_of(front_end: &FrontEnd, request: &str) -> Value {
    eventually("the stream's record", SOON, async || {
        let text = front_end.log();
        let mut lines = text.lines().filter_map(|line| serde_json::from_str::<Value>(line).ok());
        lines.find(|line| {
            line["message"] == "stream ended"
                && line["origin"].as_str().is_some_and(|origin| origin.contains(request))
        })
    })
    .await
}

/// The spans of a trace, once there are so many.
async fn spans(collector: &Collector, trace: &str, count: usize) -> Vec<Sent> {
    eventually("the spans", SOON, async || {
        let spans: Vec<_> = collector.spans().into_iter().filter(|span| span.trace == trace).collect();
        assert!(spans.len() <= count, "{spans:?}");
        (spans.len() == count).then_some(spans)
    })
    .await
}

/// Something on the node that says which `traceparent` it was sent.
async fn target() -> u16 {
    async fn answer(request: Request<Incoming>) -> Result<Response<Full<Bytes>>, Infallible> {
        let sent = request.headers().get("traceparent").map(|value| value.as_bytes().to_vec());
        let _ = request.into_body().collect().await;
        Ok(Response::new(Full::new(sent.unwrap_or_default().into())))
    }
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let port = listener.local_addr().unwrap().port();
    tokio::spawn(async move {
        while let Ok((socket, _)) = listener.accept().await {
            let http = hyper::server::conn::http1::Builder::new();
            tokio::spawn(http.serve_connection(TokioIo::new(socket), service_fn(answer)));
        }
    });
    port
}

/// The trace headers that kube-apiserver got with a request.
fn traceparents(front_end: &FrontEnd, target: &str) -> Vec<String> {
    let received = front_end.upstream.received();
    let request = received.iter().find(|request| request.target == target).unwrap();
    request.header("traceparent").into_iter().map(str::to_owned).collect()
}

fn number(n: u8) -> String {
    format!("{n:02x}").repeat(16)
}

#[tokio::test]
async fn a_request_and_its_stream_are_one_trace() {
    let dir = TempDir::new("collector").unwrap();
    let authority = Authority::new("collector CA").unwrap();
    authority.server(dir.path(), "collector", &["127.0.0.1"]).unwrap();
    std::fs::write(dir.path().join("ca.crt"), authority.pem()).unwrap();
    let headers = dir.path().join("headers");
    let text = format!("# whose we are\nAuthorization: {AUTHORIZATION}\n");
    proto_config::secret_file::replace(&headers, text.as_bytes()).unwrap();
    let tls = pki::server_config(dir.path(), "collector").unwrap();
    let collector = Collector::start(Some(tls.into())).await.unwrap();
    let port = target().await;
    let front_end = front_end(
        port,
        &format!(
            "traces: {{endpoint: 'https://{}/v1/traces', ca: {}, headers_file: {}, service_name: edge}}",
            collector.address,
            dir.path().join("ca.crt").display(),
            headers.display(),
        ),
    )
    .await;
    let attribute = |span: &Sent, name: &str| span.attributes.get(name).cloned().unwrap_or_default();

    // The first request goes to kube-apiserver.
    let trace = number(0xa1);
    let parent = format!("00-{trace}-{SPAN}-01");
    let target = "/api/v1/pods?token=hidden";
    assert_eq!(ask(&front_end, Credential::Token, target, Some(&parent)).await.0, StatusCode::OK);
    let [span] = &spans(&collector, &trace, 1).await[..] else { unreachable!() };
    assert_eq!((&*span.parent, &*span.service, &*span.name), (SPAN, "edge", "list pods"));
    assert!(!span.failed && span.nanoseconds > 0, "{span:?}");
    for (name, expected) in [
        ("http.request.method", "GET"),
        ("http.response.status_code", "200"),
        ("url.path", "/api/v1/pods"),
        ("user.name", "sam"),
    ] {
        assert_eq!(attribute(span, name), expected, "{name} of {span:?}");
    }
    assert_eq!(traceparents(&front_end, target), [format!("00-{trace}-{}-01", span.id)]);
    let record = front_end.audited("/api/v1/pods").await;
    assert_eq!(record["trace_id"], *trace, "{record}");
    assert_eq!(record["id"], attribute(span, "master_agent.request"));

    // Through a tunnel. That its caller does not want it sampled is not its to say.
    let trace = number(0xa2);
    let parent = format!("00-{trace}-{SPAN}-00");
    let (status, sent) = ask(&front_end, Credential::Token, &node_url(port, "two"), Some(&parent)).await;
    assert_eq!(status, StatusCode::OK);
    let found = spans(&collector, &trace, 2).await;
    let of = |name: &str| {
        found.iter().find(|span| span.name == name).unwrap_or_else(|| panic!("{name}: {found:?}"))
    };
    let (request, stream) = (of("get nodes/proxy"), of("stream front-end"));
    assert_eq!((&*request.parent, &*stream.parent), (SPAN, &*request.id));
    assert_eq!(sent, format!("00-{trace}-{}-01", request.id));
    assert_eq!(stream.events, ["dialled"]);
    for (name, expected) in [
        ("server.port", port.to_string()),
        ("master_agent.node", "n1".to_owned()),
        ("master_agent.egress", "front-end".to_owned()),
        ("master_agent.outcome", "closed".to_owned()),
    ] {
        assert_eq!(attribute(stream, name), expected, "{name} of {stream:?}");
    }
    assert!(attribute(stream, "master_agent.bytes.down").parse::<u64>().unwrap() > 55, "{stream:?}");
    let record = front_end.audited(&node_url(port, "two")).await;
    assert_eq!(record["trace_id"], *trace);
    let record = stream_of(&front_end, record["id"].as_str().unwrap()).await;
    assert_eq!((&record["trace_id"], &record["span_id"]), (&Value::from(&*trace), &Value::from(&*stream.id)));

    // The dial of this one fails.
    let (trace, closed) = (number(0xa3), free_port());
    let parent = format!("00-{trace}-{SPAN}-01");
    let (status, _) = ask(&front_end, Credential::Token, &node_url(closed, ""), Some(&parent)).await;
    assert!(status.is_server_error() || status == StatusCode::FORBIDDEN, "{status}");
    let found = spans(&collector, &trace, 2).await;
    let stream = found.iter().find(|span| span.name == "stream front-end").unwrap();
    assert!(stream.failed && stream.message.contains("policy"), "{stream:?}");
    assert_eq!(attribute(stream, "master_agent.fault"), "policy", "{stream:?}");

    // Strangers have no part in it, whatever they send; nor who is not allowed to.
    for (n, credential, expected) in [
        (0xa4, Credential::None, StatusCode::UNAUTHORIZED),
        (0xa5, Credential::Bootstrap, StatusCode::FORBIDDEN),
    ] {
        let parent = format!("00-{}-{SPAN}-01", number(n));
        assert_eq!(ask(&front_end, credential, &node_url(port, "five"), Some(&parent)).await.0, expected);
    }
    // By then the one before has been sent.
    spans(&collector, &number(0xa5), 1).await;
    assert!(collector.spans().iter().all(|span| span.trace != number(0xa4)));
    assert_eq!(front_end.audited(&node_url(port, "five")).await.get("trace_id"), None);

    // A malformed header is not passed on, and the request begins a new trace.
    let before: HashSet<String> = collector.spans().into_iter().map(|span| span.trace).collect();
    let target = "/api/v1/services";
    assert_eq!(ask(&front_end, Credential::Token, target, Some("00-x-y-z")).await.0, StatusCode::OK);
    let span = eventually("its span", SOON, async || {
        collector.spans().into_iter().find(|span| !before.contains(&span.trace))
    })
    .await;
    assert_eq!(span.parent, "");
    assert_eq!(traceparents(&front_end, target), [format!("00-{}-{}-01", span.trace, span.id)]);

    assert!(collector.heads().iter().all(|head| head["authorization"] == AUTHORIZATION));
    assert!(!front_end.log().contains("secret-of-the-collector"));
    assert!(!format!("{:?}", collector.spans()).contains("hidden"));
}

/// And not one request goes anywhere else.
#[tokio::test]
async fn without_traces_the_traceparent_still_follows_the_request() {
    let collector = Collector::start(None).await.unwrap();
    let port = target().await;
    for traces in ["".to_owned(), format!("traces: {{endpoint: '{}', sample_ratio: 0}}", collector.url())] {
        let front_end = front_end(port, &traces).await;
        let (trace, target) = (number(0xb1), "/api/v1/pods");
        let parent = format!("00-{trace}-{SPAN}-01");
        assert_eq!(ask(&front_end, Credential::Token, target, Some(&parent)).await.0, StatusCode::OK);
        assert_eq!(traceparents(&front_end, target), [&*parent]);
        let (_, sent) = ask(&front_end, Credential::Token, &node_url(port, "two"), Some(&parent)).await;
        assert_eq!(sent, parent);
        let record = front_end.audited(&node_url(port, "two")).await;
        assert_eq!(record["trace_id"], *trace);
        let record = stream_of(&front_end, record["id"].as_str().unwrap()).await;
        assert_eq!((&record["trace_id"], &record["span_id"]), (&Value::from(&*trace), &Value::from(SPAN)));
    }
    assert_eq!(collector.requests(), 0);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_collector_that_fails_is_nobody_elses_trouble() {
    let collector = Collector::start(None).await.unwrap();
    let port = target().await;
    let mut front_end =
        front_end(port, &format!("traces: {{endpoint: '{}', timeout: 500ms, queue: 16}}", collector.url()))
            .await;
    let path = "/api/v1/pods";
    let some = async |front_end: &FrontEnd| {
        for _ in 0..40 {
            assert_eq!(ask(front_end, Credential::Token, path, None).await.0, StatusCode::OK);
        }
    };
    let sent = |text: &str, log: &str| log.matches(text).count();
    collector.answer(StatusCode::SERVICE_UNAVAILABLE);
    let before = collector.requests();
    eventually("the collector has refused some", SOON, async || {
        some(&front_end).await;
        (collector.requests() > before + 2).then_some(())
    })
    .await;
    let log = front_end.cluster.master.says(&["spans cannot be sent"]).await;
    assert_eq!(sent("spans cannot be sent", &log), 1);
    collector.answer(StatusCode::OK);
    eventually("spans are sent again", SOON, async || {
        some(&front_end).await;
        (sent("spans are sent again", &front_end.log()) == 1).then_some(())
    })
    .await;

    // The last ones are sent before the end.
    let trace = number(0xc1);
    ask(&front_end, Credential::Token, path, Some(&format!("00-{trace}-{SPAN}-01"))).await;
    front_end.cluster.master.signal("TERM");
    assert_eq!(front_end.cluster.master.wait(SOON).unwrap(), Some(0));
    assert_eq!(spans(&collector, &trace, 1).await.len(), 1);
}
