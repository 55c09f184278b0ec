//! Calls home over the front end's port: an HTTP/1.1 request that changes to [`UPGRADE`], and then is a link.
//!
//! The request's credential only admits: whoever presents it may `create` the `link` or `join` of one node, and one
//! that names a node may do so for no other. Which node it is, the SSH identity inside says, as on the call-home port;
//! both must name the same. A host that joins may also present its join token, which is checked but not used up.

use std::{
    io,
    pin::Pin,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    task::{Context, Poll, ready},
    time::SystemTime,
};

use access::{
    authn::{self, Authenticated, Guard, Presented, Validity},
    authz::Verdict,
    peer::Peer,
    request_info::{OWN_GROUP, RequestInfo},
    user::User,
};
use http_body_util::Full;
use hyper::{
    Method, Request, Response, StatusCode, Version,
    body::{Body, Incoming},
    header::{self, HeaderValue},
    http::request::Parts,
    upgrade::OnUpgrade,
};
use hyper_util::rt::TokioIo;
use proto::{
    NodeName,
    call_home::{UNNAMED, UPGRADE},
    join::JoinToken,
};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};

use super::{
    answer::Content,
    connection::Connection,
    limits::{self, too_many},
    recorder::Recorder,
};
use crate::{
    agent::Agent,
    http::{hop::Hop, status::Failure},
    identity::store::TokenError,
    links::{self, Asked},
};

/// The authenticator's name in records.
const JOIN_TOKEN: &str = "join-token";
/// The node that a service account's token is bound to, or whose pod it is bound to.
const NODE_NAME: &str = "authentication.kubernetes.io/node-name";

/// A request to call home.
pub(super) struct Call {
    agent: Arc<Agent>,
    asked: Asked,
}

impl Connection {
    /// The call home that a request is, if such are taken here.
    pub(super) fn call(&self, info: &RequestInfo) -> Result<Option<Call>, Failure> {
        let Some(agent) = self.front_end.home() else { return Ok(None) };
        let kind = (info.group.as_str(), info.version.as_str(), info.resource.as_str());
        if kind != (OWN_GROUP, "v1", "nodes") || !info.tail.is_empty() {
            return Ok(None);
        }
        let node = || {
            let node = info.name.parse::<NodeName>();
            node.map_err(|error| Failure::new(StatusCode::BAD_REQUEST, error.to_string()))
        };
        let asked = match info.subresource.as_str() {
            "link" => Asked::Link(node()?),
            "join" if info.name == UNNAMED => Asked::Join(None),
            "join" => Asked::Join(Some(node()?)),
            _ => return Ok(None),
        };
        Ok(Some(Call { agent, asked }))
    }

    /// Who a node is that links with a credential of which only the API server could say whether it was withdrawn, while
    /// that can't be asked: it may need the very tunnel that is to come. The SSH identity inside decides, as ever. A host
    /// that joins has none yet, so its credential must be checked; its join token needs no API server.
    pub(super) fn linking(&self, head: &Parts, why: &authn::Failure) -> Option<Authenticated> {
        let who = why.unchecked()?;
        if self.front_end.home().is_none() || !is_path_of("/link", head.uri.path()) {
            return None;
        }
        let user = &who.user.name;
        tracing::info!(peer = %self.peer, user, reason = %why, "a node may link by its SSH identity alone");
        Some(who.clone())
    }

    /// Who a host is that joins and presents its join token; `None` where that is no such request.
    pub(super) async fn joining(
        &self,
        head: &Parts,
        record: &mut Recorder,
    ) -> Result<Option<Authenticated>, Failure> {
        let Some(agent) = self.front_end.home().filter(|_| is_path_of("/join", head.uri.path())) else {
            return Ok(None);
        };
        // What can't be read is for the others to complain of.
        let Ok(presented) = Presented::of(head, &self.certificates) else { return Ok(None) };
        let token = presented.bearer.as_ref().map(|token| JoinToken::parse(token.expose()));
        let Some(Ok(token)) = token else { return Ok(None) };
        let attempt = self.front_end.limits.attempt(&self.peer);
        attempt.pass().map_err(too_many).inspect_err(|_| record.limited())?;
        let id = token.id.clone();
        let checked = tokio::task::spawn_blocking(move || {
            agent.store.check(&token.id, &token.hash(), SystemTime::now())
        });
        match checked.await.unwrap_or_else(|e| Err(TokenError::Store(e.to_string()))) {
            Ok(bound) => {
                attempt.forgive();
                let mut user = User { name: format!("master-agent:join-token:{id}"), ..User::default() };
                user.extra.extend(bound.map(|node| (NODE_NAME.to_owned(), vec![node.to_string()])));
                let who = Authenticated {
                    user: Arc::new(user),
                    authenticator: JOIN_TOKEN,
                    validity: Validity::default(),
                };
                record.authenticated(&who);
                Ok(Some(who))
            }
            Err(TokenError::Store(error)) => {
                attempt.forgive();
                tracing::error!(error, "join tokens can't be checked");
                let message = "the join token can't be checked at the moment, please try again later";
                Err(Failure::new(StatusCode::SERVICE_UNAVAILABLE, message).retry_after(1))
            }
            Err(error) => {
                attempt.fail()?;
                record.unauthenticated();
                tracing::info!(peer = %self.peer, %error, "a host that wants to join is not recognised");
                Err(Failure::new(StatusCode::UNAUTHORIZED, "Unauthorized"))
            }
        }
    }
}

impl Call {
    /// Answers the request: by changing the protocol to that of a link, or with the reason why not.
    pub(super) async fn answer(
        self,
        connection: &Connection,
        mut request: Request<Incoming>,
        caller: Authenticated,
        info: &RequestInfo,
        record: &mut Recorder,
    ) -> Result<(Response<Content>, Link), Failure> {
        let upgrade = request.extensions_mut().remove::<OnUpgrade>();
        let (head, body) = request.into_parts();
        let user = self.authorize(connection, &head, caller, info, record).await?;
        let peer = match &connection.peer {
            Peer::Address(address) => *address,
            Peer::Node { .. } | Peer::Local(_) => {
                return Err(Failure::new(StatusCode::FORBIDDEN, "nodes call home on the HTTPS port only"));
            }
        };
        let bad = |message: &str| Failure::new(StatusCode::BAD_REQUEST, message);
        let wanted = Hop::of(&head.headers).upgrade;
        let asks =
            wanted.is_some_and(|protocol| protocol.as_bytes().eq_ignore_ascii_case(UPGRADE.as_bytes()));
        let asks = asks && head.version == Version::HTTP_11 && head.method == Method::POST;
        let Some(upgrade) = upgrade.filter(|_| asks) else {
            return Err(bad("to call home is to POST by HTTP/1.1 with Upgrade: master-agent-link"));
        };
        if !body.is_end_stream() {
            return Err(bad("a call home has no body"));
        }
        if connection.front_end.draining.is_cancelled() {
            let failure = Failure::new(StatusCode::SERVICE_UNAVAILABLE, "the master-agent is stopping");
            return Err(failure.retry_after(1));
        }
        record.reserve_or_refuse(true, &connection.front_end.limits).await?;
        // Many nodes may be one user; each is limited by itself.
        let key = format!("{} calling home as {}", user.name, info.name);
        let place = connection.front_end.limits.place(&key, true).await.inspect_err(|_| record.limited())?;
        record.allowed();
        let mut response = Response::new(Content::Own(Full::default()));
        *response.status_mut() = StatusCode::SWITCHING_PROTOCOLS;
        response.headers_mut().insert(header::CONNECTION, HeaderValue::from_static("Upgrade"));
        response.headers_mut().insert(header::UPGRADE, HeaderValue::from_static(UPGRADE));
        let Self { agent, asked } = self;
        Ok((response, Link { agent, asked, upgrade, peer, place }))
    }

    async fn authorize(
        &self,
        connection: &Connection,
        head: &Parts,
        caller: Authenticated,
        info: &RequestInfo,
        record: &mut Recorder,
    ) -> Result<Arc<User>, Failure> {
        let joins = caller.authenticator == JOIN_TOKEN;
        let user = if joins {
            let rule = "joining".to_owned();
            let verdict =
                Verdict { allowed: true, authorizer: Some(JOIN_TOKEN), rule, reason: String::new() };
            record.decided(&verdict);
            caller.user
        } else {
            connection.authorize(head, caller, info, true, record).await?
        };
        let unnamed = matches!(self.asked, Asked::Join(None));
        match named(&user) {
            Some(node) if node != info.name && !(joins && unnamed) => {
                let reason = format!("a credential of node {node:?} can't call home as {:?}", info.name);
                tracing::warn!(peer = %connection.peer, user = user.name, reason, "refused a call home");
                self.agent.count_refused("other_node");
                if let Ok(claimed) = info.name.parse() {
                    self.agent.registry.count_refused(&claimed, &reason);
                }
                record.decided(&Verdict {
                    allowed: false,
                    authorizer: Some("call-home"),
                    rule: "not-its-own".to_owned(),
                    reason: reason.clone(),
                });
                Err(Failure::new(StatusCode::FORBIDDEN, format!("forbidden: {reason}")))
            }
            Some(_) | None => Ok(user),
        }
    }
}

/// The node that a credential is of.
fn named(user: &User) -> Option<&str> {
    user.node().or_else(|| user.extra.get(NODE_NAME)?.first().map(String::as_str))
}

/// Whether a path, as it was sent, is that of a node that links (`/link`) or of a host that joins (`/join`).
fn is_path_of(subresource: &str, path: &str) -> bool {
    let name = path.strip_prefix("/apis/master-agent/v1/nodes/");
    let name = name.and_then(|rest| rest.strip_suffix(subresource));
    name.is_some_and(|name| !name.is_empty() && !name.contains(['/', '%']))
}

/// A connection that becomes a link.
pub(super) struct Link {
    agent: Arc<Agent>,
    asked: Asked,
    upgrade: OnUpgrade,
    peer: std::net::SocketAddr,
    place: limits::RequestPermit,
}

impl Link {
    /// Serves it to its end, beside the sessions of other links. The request's own record is of its beginning; one more
    /// is left at the end.
    pub(super) fn begin(self, record: &Recorder, kept: impl Send + 'static) {
        let Self { agent, asked, upgrade, peer, place: long_running } = self;
        let mut record = record.again();
        let sessions = agent.sessions.clone();
        sessions.spawn(async move {
            let _held = (kept, long_running);
            if record.reserve(true).await.is_err() {
                return;
            }
            let place = agent.handshakes.take(peer.ip());
            let upgraded = tokio::time::timeout(agent.config.tunnels.handshake_timeout, upgrade);
            let socket = tokio::select! {
                upgraded = upgraded => match upgraded {
                    Ok(Ok(upgraded)) => Recorded { socket: TokioIo::new(upgraded), record },
                    Ok(Err(_)) | Err(_) => return,
                },
                () = place.evicted.cancelled() => return,
            };
            links::answer(&agent, socket, peer, asked, place).await;
        });
    }
}

/// Counts a link's bytes; the record is left when it ends.
struct Recorded<S> {
    socket: S,
    record: Recorder,
}

fn count(counter: &AtomicU64, bytes: usize) {
    counter.fetch_add(bytes as u64, Ordering::Relaxed);
}

impl<S: AsyncRead + Unpin> AsyncRead for Recorded<S> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let before = buf.filled().len();
        ready!(Pin::new(&mut self.socket).poll_read(cx, buf))?;
        count(&self.record.carried.up, buf.filled().len() - before);
        Poll::Ready(Ok(()))
    }
}

impl<S: AsyncWrite + Unpin> AsyncWrite for Recorded<S> {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        let written = ready!(Pin::new(&mut self.socket).poll_write(cx, buf))?;
        count(&self.record.carried.down, written);
        Poll::Ready(Ok(written))
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.socket).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.socket).poll_shutdown(cx)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn paths_of_hosts_that_join() {
        for (path, is) in [
            ("/apis/master-agent/v1/nodes/n1/join", true),
            ("/apis/master-agent/v1/nodes/-/join", true),
            ("/apis/master-agent/v1/nodes/n1/link", false),
            ("/apis/master-agent/v1/nodes//join", false),
            ("/apis/master-agent/v1/nodes/a/b/join", false),
            ("/apis/master-agent/v1/nodes/a%2Fb/join", false),
            ("/apis/master-agent/v1/nodes/n1/join/", false),
            ("/api/v1/nodes/n1/join", false),
        ] {
            assert_eq!(is_path_of("/join", path), is, "{path}");
        }
        assert!(
            is_path_of("/link", "/apis/master-agent/v1/nodes/n1/link")
                && !is_path_of("/link", "/apis/master-agent/v1/nodes/a/b/link")
        );
    }

    #[test]
    fn the_node_of_a_credential() {
        let user = |name: &str, groups: &[&str], node: Option<&str>| User {
            name: name.to_owned(),
            groups: groups.iter().map(|g| (*g).to_owned()).collect(),
            extra: node.map(|n| (NODE_NAME.to_owned(), vec![n.to_owned()])).into_iter().collect(),
            ..User::default()
        };
        for (user, node) in [
            (user("system:node:n1", &["system:nodes"], None), Some("n1")),
            (user("system:node:n1", &[], None), None),
            (user("system:serviceaccount:a:b", &["system:serviceaccounts"], Some("n2")), Some("n2")),
            (user("system:bootstrap:abcdef", &["system:bootstrappers"], None), None),
        ] {
            assert_eq!(named(&user), node, "{user:?}");
        }
    }
}
