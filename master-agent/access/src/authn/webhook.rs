//! The authenticator that asks a webhook about tokens, with TokenReviews of authentication.k8s.io/v1.

use std::{sync::Arc, time::Duration};

use futures_util::future::BoxFuture;
use hyper::Uri;
use k8s_openapi::api::authentication::v1::UserInfo;
use proto_net::{
    file_watcher::FileWatcher,
    https_client::{CallError, JsonClient},
    log_throttle::LogThrottle,
};
use serde::Deserialize;
use tokio::{
    sync::Semaphore,
    time::{Instant, timeout_at},
};

use super::{
    authenticated::Recognized, authenticator::Authenticator, config::TokenReviewConfig,
    credential::Presented, pause::Pause, reason::FailureReason,
};
use crate::{
    cache::Cache,
    moment::Moment,
    secret::{Digest, Secret},
    user::User,
};

pub struct TokenReviewer {
    url: Uri,
    audiences: Vec<String>,
    timeout: Duration,
    client: Arc<FileWatcher<JsonClient>>,
    questions: Semaphore,
    known: Cache<Digest, Arc<User>>,
    known_ttl: Duration,
    /// A cache of its own, so that guesses do not evict known tokens.
    refused: Cache<Digest, FailureReason>,
    refused_ttl: Duration,
    /// Begins when the webhook can't be reached, so that guesses do not each dial it. An error that it answers may be
    /// due to the token alone.
    unreachable: Pause,
    failures: LogThrottle,
}

impl TokenReviewer {
    pub fn new(config: &TokenReviewConfig, client: Arc<FileWatcher<JsonClient>>) -> Self {
        Self {
            url: config.url.clone(),
            audiences: config.audiences.clone(),
            timeout: config.timeout,
            client,
            questions: Semaphore::new(config.max_in_flight),
            known: Cache::new(config.cache_size),
            known_ttl: config.authenticated_ttl,
            refused: Cache::new(config.cache_size),
            refused_ttl: config.refused_ttl,
            unreachable: Pause::default(),
            failures: LogThrottle::default(),
        }
    }

    async fn check(
        &self,
        presented: &Presented<'_>,
        now: Moment,
    ) -> Result<Option<Recognized>, FailureReason> {
        let Some(token) = &presented.bearer else { return Ok(None) };
        let digest = Digest::of(token);
        let answer = match self.answered(&digest, now) {
            Some(answer) => answer,
            None => {
                presented.cost.incur()?;
                self.ask(token, digest, now).await
            }
        };
        answer.map(|user| Some(user.into()))
    }

    /// Returns what is known without asking.
    fn answered(&self, digest: &Digest, now: Moment) -> Option<Result<Arc<User>, FailureReason>> {
        if let Some(user) = self.known.get(digest, now.monotonic) {
            return Some(Ok(user));
        }
        let refused = self.refused.get(digest, now.monotonic);
        refused.or_else(|| self.unreachable.reason(now.monotonic)).map(Err)
    }

    /// Asks the webhook, unless the answer has become known while other calls were in progress.
    async fn ask(&self, token: &Secret, digest: Digest, now: Moment) -> Result<Arc<User>, FailureReason> {
        let began = Instant::now();
        let deadline = began + self.timeout;
        let Ok(Ok(_permit)) = timeout_at(deadline, self.questions.acquire()).await else {
            return Err(self.failed(format!("{} has too many calls in progress", self.url)));
        };
        if let Some(answer) = self.answered(&digest, now) {
            return answer;
        }
        let waited = began.elapsed();
        let called = timeout_at(deadline, self.call(token)).await;
        let timed_out = |_| Err(CallError::TimedOut { uri: self.url.clone(), timeout: self.timeout });
        let answer = called.unwrap_or_else(timed_out).map_err(|error| {
            let reason = self.failed(error.to_string());
            // A call that got little time says little about the webhook.
            let hangs = matches!(error, CallError::TimedOut { .. }) && waited < self.timeout / 2;
            if hangs || matches!(error, CallError::Unreachable { .. }) {
                self.unreachable.begin(now.monotonic + began.elapsed(), reason.clone());
            }
            reason
        })?;
        if answer.api_version != "authentication.k8s.io/v1" || answer.kind != "TokenReview" {
            return Err(self.failed(format!("{} does not answer with a TokenReview", self.url)));
        }
        let judged = self.judge(answer.status);
        match &judged {
            Ok(user) => self.known.put(digest, user.clone(), self.known_ttl, now.monotonic),
            Err(reason) => self.refused.put(digest, reason.clone(), self.refused_ttl, now.monotonic),
        }
        judged
    }

    async fn call(&self, token: &Secret) -> Result<Answer, CallError> {
        let review = serde_json::json!({
            "apiVersion": "authentication.k8s.io/v1",
            "kind": "TokenReview",
            "spec": { "token": token.expose(), "audiences": self.audiences },
        });
        self.client.get().post(&self.url, &review).await
    }

    /// Logs why the webhook gave no answer, and returns it as the reason.
    fn failed(&self, error: String) -> FailureReason {
        let reason = FailureReason::Unavailable(error);
        if let Some(times) = self.failures.count(1) {
            tracing::warn!(times, %reason, "the authentication webhook failed");
        }
        reason
    }

    fn judge(&self, status: Status) -> Result<Arc<User>, FailureReason> {
        if !status.authenticated {
            return Err(FailureReason::Refused);
        }
        // A webhook that names no audience does not support audiences, so its answer is for this one.
        let audience = |audience| self.audiences.contains(audience);
        if !self.audiences.is_empty()
            && !status.audiences.is_empty()
            && !status.audiences.iter().any(audience)
        {
            return Err(FailureReason::Audience);
        }
        let UserInfo { username, uid, groups, extra } = status.user;
        let extra = extra.unwrap_or_default().into_iter().map(|(key, values)| (key.to_lowercase(), values));
        let user = User {
            name: username.unwrap_or_default(),
            uid: uid.filter(|uid| !uid.is_empty()),
            groups: groups.unwrap_or_default(),
            extra: extra.collect(),
        };
        Recognized::from(Arc::new(user)).checked().map(|recognized| recognized.user)
    }
}

impl Authenticator for TokenReviewer {
    fn authenticate<'a>(
        &'a self,
        presented: &'a Presented<'a>,
        now: Moment,
    ) -> BoxFuture<'a, Result<Option<Recognized>, FailureReason>> {
        Box::pin(self.check(presented, now))
    }
}

#[derive(Deserialize)]
struct Answer {
    #[serde(rename = "apiVersion")]
    api_version: String,
    kind: String,
    status: Status,
}

#[derive(Deserialize)]
struct Status {
    #[serde(default)]
    authenticated: bool,
    #[serde(default)]
    user: UserInfo,
    #[serde(default)]
    audiences: Vec<String>,
}
