//! The check that the objects exist to which a service account's token is bound.
//!
//! A token can be valid for up to a year. kube-apiserver rejects it before that if its account, pod, node or Secret was
//! deleted or recreated, and so does this check. If the watches show all objects under the UIDs of the token, the token
//! is valid. Otherwise kube-apiserver is asked with a TokenReview, so that every token which it accepts is also
//! accepted here, even that of a pod whose watch event has not arrived yet. It is only asked about tokens that its own
//! key has signed.
//!
//! While kube-apiserver can't be asked, a token that was valid before stays valid, unless a watch has shown that an
//! object is gone. Any other token can't be checked, which is [`FailureReason::Unavailable`]. Access that was granted
//! before ends if several checks in a row find an object gone.

use std::{
    fmt,
    sync::Arc,
    time::{Duration, Instant},
};

use k8s_openapi::api::authentication::v1::{TokenReview, TokenReviewSpec, TokenReviewStatus};
use proto_net::log_throttle::LogThrottle;
use tokio::sync::Semaphore;

use super::{
    cluster::{ApiError, ApiServer, BoundKind, BoundObject, Cluster, Existence, Objects, Uid},
    guard::Cost,
    jwt::Claims,
    pause::Pause,
    reason::FailureReason,
};
use crate::{
    cache::Cache,
    moment::Moment,
    secret::{Digest, Secret},
    user::User,
};

/// How long it is remembered that kube-apiserver accepts a token. With [`RECHECK`], a withdrawn token is rejected
/// within 15 seconds.
const ACCEPTED: Duration = Duration::from_secs(8);
/// How long it is remembered that kube-apiserver rejects a token.
const REJECTED: Duration = Duration::from_secs(3);
/// The most tokens whose answers are remembered.
const MAX_ANSWERS: usize = 10_000;
/// How long the result of a token's last check is remembered.
const VERIFIED: Duration = Duration::from_secs(24 * 3600);
/// The age at which an unchanged result is stored anew, so that a token in use stays known. To store it at every check
/// would cost more than it gains.
const RENEWAL: Duration = Duration::from_secs(3600);
/// The most tokens whose last result is remembered.
const MAX_VERIFIED: usize = 50_000;
/// The most questions at once.
const MAX_QUESTIONS: usize = 16;
/// The longest time for a question, and for the wait until it can be asked.
const TIMEOUT: Duration = Duration::from_secs(3);
/// How often a token is checked again while access that was granted for it lasts.
const RECHECK: Duration = Duration::from_secs(5);
/// The number of checks in a row that find an object missing before access ends although kube-apiserver can't be asked.
/// The event of an object that has just been created may be a little late.
const MAX_MISSING: u32 = 3;
/// The maximum number of characters that are kept of a text from kube-apiserver.
const MAX_SAID: usize = 200;

/// Checks the objects that tokens are bound to.
pub struct BoundObjects {
    objects: Arc<dyn Objects>,
    api_server: Arc<dyn ApiServer>,
    audiences: Vec<String>,
    questions: Semaphore,
    accepted: Cache<Digest, ()>,
    rejected: Cache<Digest, FailureReason>,
    /// Whether a token was valid when it was last checked, and when this was stored.
    verified: Cache<Digest, (bool, Instant)>,
    failed: Pause,
    failures: LogThrottle,
}

impl BoundObjects {
    /// Returns `None` if no watches show which objects exist. `audiences` are those for which tokens are accepted.
    pub fn new(cluster: &Cluster, audiences: Vec<String>) -> Option<Arc<Self>> {
        Some(Arc::new(Self {
            objects: cluster.objects.clone()?,
            api_server: cluster.api_server.clone(),
            audiences,
            questions: Semaphore::new(MAX_QUESTIONS),
            accepted: Cache::new(MAX_ANSWERS),
            rejected: Cache::new(MAX_ANSWERS),
            verified: Cache::new(MAX_VERIFIED),
            failed: Pause::default(),
            failures: LogThrottle::default(),
        }))
    }

    /// Checks that kube-apiserver accepts a token, by a cached or a new answer.
    async fn review(
        &self,
        token: &Secret,
        digest: Digest,
        user: &str,
        cost: Option<&Cost<'_>>,
        now: Moment,
    ) -> Result<(), FailureReason> {
        if let Some(answer) = self.answered(&digest, now) {
            return answer;
        }
        cost.map_or(Ok(()), Cost::incur)?;
        let began = tokio::time::Instant::now();
        let permit = tokio::time::timeout(TIMEOUT, self.questions.acquire()).await;
        let Ok(Ok(_permit)) = permit else { return Err(unavailable("too many questions are in progress")) };
        // Another request may have asked in the meantime.
        if let Some(answer) = self.answered(&digest, now) {
            return answer;
        }
        match self.ask(token).await {
            Ok(status) => {
                let answer = judge(status, user);
                match &answer {
                    Ok(()) => self.accepted.put(digest, (), ACCEPTED, now.monotonic),
                    Err(reason) => self.rejected.put(digest, reason.clone(), REJECTED, now.monotonic),
                }
                answer
            }
            Err(reason) => {
                if let Some(times) = self.failures.count(1) {
                    tracing::warn!(times, %reason, "tokens of service accounts can't be checked");
                }
                self.failed.begin(now.monotonic + began.elapsed(), reason.clone());
                Err(reason)
            }
        }
    }

    fn answered(&self, digest: &Digest, now: Moment) -> Option<Result<(), FailureReason>> {
        if self.accepted.get(digest, now.monotonic).is_some() {
            return Some(Ok(()));
        }
        let rejected = self.rejected.get(digest, now.monotonic);
        rejected.or_else(|| self.failed.reason(now.monotonic)).map(Err)
    }

    async fn ask(&self, token: &Secret) -> Result<TokenReviewStatus, FailureReason> {
        let spec =
            TokenReviewSpec { audiences: Some(self.audiences.clone()), token: token.expose().to_owned() };
        let review = TokenReview { spec, ..TokenReview::default() };
        match tokio::time::timeout(TIMEOUT, self.api_server.review(&review)).await {
            Ok(Ok(review)) => review.status.ok_or_else(|| unavailable("its answer has no status")),
            Ok(Err(ApiError::Forbidden(_))) => Err(unavailable(
                "it forbids the question: allow the user of kubernetes.kubeconfig to create tokenreviews of \
                 authentication.k8s.io, as deploy/kubernetes/rbac.yaml does",
            )),
            Ok(Err(ApiError::Failed(error))) => Err(unavailable(&error)),
            Err(_) => Err(unavailable("it did not answer in time")),
        }
    }
}

fn unavailable(error: &str) -> FailureReason {
    FailureReason::Unavailable(format!("the API server, for a TokenReview: {}", shown(error)))
}

/// Shortens a text for the log, and removes control characters.
fn shown(text: &str) -> String {
    text.chars().filter(|c| !c.is_control()).take(MAX_SAID).collect()
}

fn judge(status: TokenReviewStatus, user: &str) -> Result<(), FailureReason> {
    if status.authenticated != Some(true) {
        return Err(FailureReason::Withdrawn(shown(status.error.as_deref().unwrap_or("no reason given"))));
    }
    match status.user.and_then(|info| info.username) {
        Some(name) if name == user => Ok(()),
        Some(_) | None => Err(FailureReason::Contradiction),
    }
}

/// The objects that one token is bound to.
pub struct Bound {
    user: String,
    objects: Vec<BoundObject>,
    /// Whether the token is also bound to an object that no watch shows.
    more: bool,
    cluster: Arc<BoundObjects>,
}

impl Bound {
    /// Reads the objects from the claims of a verified token. `user` is the token's.
    pub fn of(claims: &Claims, user: &User, cluster: Arc<BoundObjects>) -> Result<Self, FailureReason> {
        const CLAIM: &str = "kubernetes.io";
        let claim = |path: &[&str]| claims.nested(&[&[CLAIM], path].concat());
        let namespace = claim(&["namespace"])?;
        let object = |kind, name: &str| -> Result<Option<BoundObject>, FailureReason> {
            let (Some(key), Some(uid)) = (claim(&[name, "name"])?, claim(&[name, "uid"])?) else {
                return Ok(None);
            };
            let key = match (kind, namespace) {
                (BoundKind::Node, _) => key.into(),
                (BoundKind::Pod | BoundKind::ServiceAccount, Some(namespace)) => {
                    format!("{namespace}/{key}").into()
                }
                (BoundKind::Pod | BoundKind::ServiceAccount, None) => return Ok(None),
            };
            Ok(Some(BoundObject { kind, key, uid: Uid::of(uid) }))
        };
        let fields = claims.get(CLAIM).and_then(serde_json::Value::as_object);
        let names: Vec<&str> = fields.into_iter().flatten().map(|(name, _)| name.as_str()).collect();
        let mut wanted = vec![(BoundKind::ServiceAccount, "serviceaccount")];
        // In the token of a pod, the node only says where the pod runs.
        wanted.extend(match (names.contains(&"pod"), names.contains(&"node")) {
            (true, _) => Some((BoundKind::Pod, "pod")),
            (false, true) => Some((BoundKind::Node, "node")),
            (false, false) => None,
        });
        let known = ["namespace", "serviceaccount", "pod", "node", "warnafter"];
        let mut more = names.iter().any(|name| !known.contains(name));
        let mut objects = Vec::new();
        for (kind, name) in wanted {
            match object(kind, name)? {
                Some(object) => objects.push(object),
                // kube-apiserver decides about a claim without a name or UID.
                None => more = true,
            }
        }
        Ok(Self { user: user.name.clone(), objects, more, cluster })
    }

    /// Checks that the token is still valid. `cost` is incurred before kube-apiserver is asked.
    pub async fn check(
        &self,
        token: &Secret,
        digest: Digest,
        cost: Option<&Cost<'_>>,
        now: Moment,
    ) -> Result<(), FailureReason> {
        let cluster = &self.cluster;
        let existence = self.existence(now);
        let checked = match existence {
            Existence::Exist if !self.more => Ok(()),
            Existence::Exist | Existence::Unknown | Existence::Missing => {
                // A watch holds the future of its check for as long as it lasts, and seldom has a question to ask.
                Box::pin(cluster.review(token, digest, &self.user, cost, now)).await
            }
        };
        let stored = cluster.verified.get(&digest, now.monotonic);
        let before = stored.map(|(valid, _)| valid);
        let fresh = stored.is_some_and(|(_, at)| now.monotonic.saturating_duration_since(at) < RENEWAL);
        match &checked {
            Err(FailureReason::Unavailable(_)) if before == Some(true) && existence != Existence::Missing => {
                return Ok(());
            }
            // An object that is gone never comes back under its UID.
            Err(FailureReason::Unavailable(_)) if before == Some(false) => {
                return Err(FailureReason::Withdrawn(
                    "it rejected the token when it was asked last".to_owned(),
                ));
            }
            Err(FailureReason::Unavailable(_) | FailureReason::NotTried(_)) => {}
            Ok(()) | Err(_) if before == Some(checked.is_ok()) && fresh => {}
            Ok(()) | Err(_) => {
                cluster.verified.put(digest, (checked.is_ok(), now.monotonic), VERIFIED, now.monotonic);
            }
        }
        checked
    }

    fn existence(&self, now: Moment) -> Existence {
        let seconds = i64::try_from(now.unix()).unwrap_or(i64::MAX);
        self.cluster.objects.check(&self.objects, seconds)
    }
}

impl fmt::Debug for Bound {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Bound").field("objects", &self.objects).field("more", &self.more).finish()
    }
}

impl PartialEq for Bound {
    fn eq(&self, other: &Self) -> bool {
        (&self.user, &self.objects, self.more) == (&other.user, &other.objects, other.more)
    }
}

impl Eq for Bound {}

/// A token and the objects to which it is bound. Access that was granted for the token must end with them.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Binding {
    pub(super) token: Secret,
    pub(super) bound: Arc<Bound>,
}

impl Binding {
    /// Completes when the token is no longer valid. While kube-apiserver can't be asked, it completes only if the
    /// watches keep showing that an object is gone.
    pub async fn ended(&self) {
        let digest = Digest::of(&self.token);
        let mut missing = 0;
        loop {
            tokio::time::sleep(RECHECK).await;
            let now = Moment::now();
            let reason = match self.bound.check(&self.token, digest, None, now).await {
                Ok(()) => {
                    missing = 0;
                    continue;
                }
                Err(reason @ FailureReason::Unavailable(_)) => {
                    missing = if self.bound.existence(now) == Existence::Missing { missing + 1 } else { 0 };
                    if missing < MAX_MISSING {
                        continue;
                    }
                    reason
                }
                Err(reason) => reason,
            };
            tracing::info!(user = self.bound.user, %reason, missing, "token is no longer valid");
            return;
        }
    }
}
