//! What a service account's token is bound to, and whether that still exists.
//!
//! A token outlives what it was made for: kube-apiserver lets it expire after up to a year, and refuses it before that
//! once its account, pod, node or Secret is gone or was made anew. So does this. What the watches show to exist under the
//! token's UIDs is good without a question; about everything else kube-apiserver itself is asked (TokenReview), so that
//! nothing it accepts is refused here, not even the token of a pod whose event has not arrived. Nobody makes it be asked
//! without a token that its own key has signed.
//!
//! While kube-apiserver can't be asked, a token that was good before goes on being so, unless a watch has shown that
//! something is gone; any other can't be checked, which is [`Reason::Unavailable`].

use std::{
    fmt,
    sync::{Arc, Mutex, PoisonError},
    time::{Duration, Instant},
};

use k8s_openapi::api::authentication::v1::{TokenReview, TokenReviewSpec, TokenReviewStatus};
use kube::{Api, api::PostParams};
use tokio::sync::Semaphore;

use super::{
    cache::{Cache, Digest},
    guard::Cost,
    jwt::Claims,
    moment::Moment,
    reason::Reason,
};
use crate::{
    front_end::{secret::Secret, seldom::Seldom, user::User},
    kubernetes::{
        Cluster,
        existing::{Existing, Kind, Object, Sight, Uid},
    },
};

/// How long kube-apiserver's answers are good. With [`RECHECK`] in between it stays within 15 s.
const ACCEPTED: Duration = Duration::from_secs(8);
const REFUSED: Duration = Duration::from_secs(3);
/// Tokens of which they are remembered.
const MAX_ANSWERS: usize = 10_000;
/// How long, and of how many tokens, it is remembered that they were good before kube-apiserver went away.
const VERIFIED: Duration = Duration::from_secs(24 * 3600);
const MAX_VERIFIED: usize = 50_000;
/// Questions at once, and how long one may take.
const MAX_ASKING: usize = 16;
const TIMEOUT: Duration = Duration::from_secs(3);
/// After a question without an answer, until the next one.
const PAUSE: Duration = Duration::from_secs(2);
/// How often what lasts is looked at again.
const RECHECK: Duration = Duration::from_secs(5);
/// Characters kept of what kube-apiserver says.
const SAID: usize = 200;

/// Says whether what tokens are bound to exists.
pub struct BoundObjects {
    existing: Arc<Existing>,
    reviews: Api<TokenReview>,
    audiences: Vec<String>,
    asking: Semaphore,
    accepted: Cache<()>,
    refused: Cache<Reason>,
    /// Whether a token was good when that was found out last.
    verified: Cache<bool>,
    /// When a question had no answer last, and why.
    failed: Mutex<Option<(Instant, Reason)>>,
    failures: Seldom,
}

impl BoundObjects {
    /// `None` where it is not known what exists. `audiences` are those for which tokens are accepted.
    pub fn new(cluster: &Cluster, audiences: Vec<String>) -> Option<Arc<Self>> {
        Some(Arc::new(Self {
            existing: cluster.existing.clone()?,
            reviews: Api::all(cluster.client.clone()),
            audiences,
            asking: Semaphore::new(MAX_ASKING),
            accepted: Cache::new(MAX_ANSWERS, ACCEPTED),
            refused: Cache::new(MAX_ANSWERS, REFUSED),
            verified: Cache::new(MAX_VERIFIED, VERIFIED),
            failed: Mutex::default(),
            failures: Seldom::default(),
        }))
    }

    /// Whether kube-apiserver accepts a token, as it said a moment ago or says now.
    async fn review(
        &self,
        token: &Secret,
        digest: Digest,
        user: &str,
        cost: Option<&Cost<'_>>,
        now: Moment,
    ) -> Result<(), Reason> {
        if let Some(answer) = self.answered(&digest, now) {
            return answer;
        }
        cost.map_or(Ok(()), Cost::incur)?;
        let permit = tokio::time::timeout(TIMEOUT, self.asking.acquire()).await;
        let Ok(Ok(_permit)) = permit else { return Err(unavailable("too much is asked of it already")) };
        // Somebody else may have asked in the meantime.
        if let Some(answer) = self.answered(&digest, now) {
            return answer;
        }
        match self.ask(token).await {
            Ok(status) => {
                let answer = judge(status, user);
                match &answer {
                    Ok(()) => self.accepted.put(digest, (), now.monotonic),
                    Err(reason) => self.refused.put(digest, reason.clone(), now.monotonic),
                }
                answer
            }
            Err(reason) => {
                if let Some(times) = self.failures.count(1) {
                    tracing::warn!(times, %reason, "tokens of service accounts can't be checked");
                }
                *self.failed.lock().unwrap_or_else(PoisonError::into_inner) =
                    Some((now.monotonic, reason.clone()));
                Err(reason)
            }
        }
    }

    fn answered(&self, digest: &Digest, now: Moment) -> Option<Result<(), Reason>> {
        if self.accepted.get(digest, now.monotonic).is_some() {
            return Some(Ok(()));
        }
        let failed = || {
            let failed = self.failed.lock().unwrap_or_else(PoisonError::into_inner).clone();
            failed.filter(|(at, _)| now.monotonic.saturating_duration_since(*at) < PAUSE)
        };
        let refused = self.refused.get(digest, now.monotonic);
        refused.or_else(|| failed().map(|(_, reason)| reason)).map(Err)
    }

    async fn ask(&self, token: &Secret) -> Result<TokenReviewStatus, Reason> {
        let spec =
            TokenReviewSpec { audiences: Some(self.audiences.clone()), token: token.expose().to_owned() };
        let review = TokenReview { spec, ..TokenReview::default() };
        let params = PostParams::default();
        let answer = tokio::time::timeout(TIMEOUT, self.reviews.create(&params, &review)).await;
        match answer {
            Ok(Ok(review)) => review.status.ok_or_else(|| unavailable("its answer has no status")),
            Ok(Err(kube::Error::Api(status))) if status.code == 403 => Err(unavailable(
                "it forbids the question: allow the user of kubernetes.kubeconfig to create tokenreviews of \
                 authentication.k8s.io, as deploy/kubernetes/rbac.yaml does",
            )),
            Ok(Err(error)) => Err(unavailable(&error.to_string())),
            Err(_) => Err(unavailable("it did not answer in time")),
        }
    }
}

fn unavailable(error: &str) -> Reason {
    Reason::Unavailable(format!("the API server, for a TokenReview: {}", shown(error)))
}

/// As much as may go into a line of the log.
fn shown(text: &str) -> String {
    text.chars().filter(|c| !c.is_control()).take(SAID).collect()
}

fn judge(status: TokenReviewStatus, user: &str) -> Result<(), Reason> {
    if status.authenticated != Some(true) {
        return Err(Reason::Withdrawn(shown(status.error.as_deref().unwrap_or("no reason given"))));
    }
    match status.user.and_then(|info| info.username) {
        Some(name) if name == user => Ok(()),
        Some(_) | None => Err(Reason::Contradiction),
    }
}

/// What one token is bound to.
pub struct Bound {
    user: String,
    objects: Vec<Object>,
    /// It is also bound to what no watch shows.
    more: bool,
    cluster: Arc<BoundObjects>,
}

impl Bound {
    /// Of a verified token, whose user this is.
    pub fn of(claims: &Claims, user: &User, cluster: Arc<BoundObjects>) -> Result<Self, Reason> {
        const CLAIM: &str = "kubernetes.io";
        let claim = |path: &[&str]| claims.nested(&[&[CLAIM], path].concat());
        let namespace = claim(&["namespace"])?;
        let object = |kind, name: &str| -> Result<Option<Object>, Reason> {
            let (Some(key), Some(uid)) = (claim(&[name, "name"])?, claim(&[name, "uid"])?) else {
                return Ok(None);
            };
            let key = match (kind, namespace) {
                (Kind::Node, _) => key.into(),
                (Kind::Pod | Kind::ServiceAccount, Some(namespace)) => format!("{namespace}/{key}").into(),
                (Kind::Pod | Kind::ServiceAccount, None) => return Ok(None),
            };
            Ok(Some(Object { kind, key, uid: Uid::of(uid) }))
        };
        let fields = claims.get(CLAIM).and_then(serde_json::Value::as_object);
        let names: Vec<&str> = fields.into_iter().flatten().map(|(name, _)| name.as_str()).collect();
        let mut wanted = vec![(Kind::ServiceAccount, "serviceaccount")];
        // The node of a pod's token only says where the pod runs.
        wanted.extend(match (names.contains(&"pod"), names.contains(&"node")) {
            (true, _) => Some((Kind::Pod, "pod")),
            (false, true) => Some((Kind::Node, "node")),
            (false, false) => None,
        });
        let known = ["namespace", "serviceaccount", "pod", "node", "warnafter"];
        let mut more = names.iter().any(|name| !known.contains(name));
        let mut objects = Vec::new();
        for (kind, name) in wanted {
            match object(kind, name)? {
                Some(object) => objects.push(object),
                // kube-apiserver says what it makes of it.
                None => more = true,
            }
        }
        Ok(Self { user: user.name.clone(), objects, more, cluster })
    }

    /// Whether the token is still good. Where that costs something, `cost` is asked first.
    pub async fn check(
        &self,
        token: &Secret,
        digest: Digest,
        cost: Option<&Cost<'_>>,
        now: Moment,
    ) -> Result<(), Reason> {
        let cluster = &self.cluster;
        let seconds = i64::try_from(now.unix()).unwrap_or(i64::MAX);
        let sight = cluster.existing.look(&self.objects, seconds);
        let checked = match sight {
            Sight::Exist if !self.more => Ok(()),
            Sight::Exist | Sight::Unknown | Sight::Missing => {
                cluster.review(token, digest, &self.user, cost, now).await
            }
        };
        let before = cluster.verified.get(&digest, now.monotonic);
        match &checked {
            Err(Reason::Unavailable(_)) if before == Some(true) && sight != Sight::Missing => return Ok(()),
            // Nothing that is gone comes back under its UID.
            Err(Reason::Unavailable(_)) if before == Some(false) => {
                return Err(Reason::Withdrawn("as it said when it was asked last".to_owned()));
            }
            Err(Reason::Unavailable(_) | Reason::NotTried(_)) => {}
            Ok(()) | Err(_) if before == Some(checked.is_ok()) => {}
            Ok(()) | Err(_) => cluster.verified.put(digest, checked.is_ok(), now.monotonic),
        }
        checked
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

/// A token with which something began that lasts no longer than what the token is bound to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Binding {
    pub(super) token: Secret,
    pub(super) bound: Arc<Bound>,
}

impl Binding {
    /// Completes when the token is no longer good. That nobody can be asked is no reason to end what has begun.
    pub async fn ended(&self) {
        let digest = Digest::of(&self.token);
        loop {
            tokio::time::sleep(RECHECK).await;
            match self.bound.check(&self.token, digest, None, Moment::now()).await {
                Ok(()) | Err(Reason::Unavailable(_)) => {}
                Err(reason) => {
                    tracing::info!(user = self.bound.user, %reason, "what a token is bound to is gone");
                    return;
                }
            }
        }
    }
}
