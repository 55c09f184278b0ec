//! The authenticator that asks a webhook about tokens, with TokenReviews of authentication.k8s.io/v1.

use std::{sync::Arc, time::Duration};

use futures_util::future::BoxFuture;
use hyper::Uri;
use k8s_openapi::api::authentication::v1::UserInfo;
use proto_net::{file_watcher::FileWatcher, https_client::JsonClient, log_throttle::LogThrottle};
use serde::Deserialize;
use tokio::sync::Semaphore;

use super::{
    authenticated::Recognized, authenticator::Authenticator, config::TokenReviewConfig,
    credential::Presented, reason::FailureReason,
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
    known: Cache<Digest, User>,
    known_ttl: Duration,
    /// A cache of its own, so that guesses do not evict known tokens.
    refused: Cache<Digest, FailureReason>,
    refused_ttl: Duration,
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
        if let Some(user) = self.known.get(&digest, now.monotonic) {
            return Ok(Some(user.into()));
        }
        if let Some(reason) = self.refused.get(&digest, now.monotonic) {
            return Err(reason);
        }
        presented.cost.incur()?;
        let answer = self.ask(token).await.inspect_err(|reason| {
            if let Some(times) = self.failures.count(1) {
                tracing::warn!(times, %reason, "the authentication webhook failed");
            }
        })?;
        match self.judge(answer) {
            Ok(user) => {
                self.known.put(digest, user.clone(), self.known_ttl, now.monotonic);
                Ok(Some(user.into()))
            }
            Err(reason) => {
                self.refused.put(digest, reason.clone(), self.refused_ttl, now.monotonic);
                Err(reason)
            }
        }
    }

    async fn ask(&self, token: &Secret) -> Result<Status, FailureReason> {
        let permit = tokio::time::timeout(self.timeout, self.questions.acquire()).await;
        let Ok(Ok(_permit)) = permit else {
            return Err(FailureReason::Unavailable(format!("{} has too many calls in progress", self.url)));
        };
        let review = serde_json::json!({
            "apiVersion": "authentication.k8s.io/v1",
            "kind": "TokenReview",
            "spec": { "token": token.expose(), "audiences": self.audiences },
        });
        let answer = self.client.get().post(&self.url, &review).await;
        let answer: Answer = answer.map_err(|error| FailureReason::Unavailable(error.to_string()))?;
        if answer.api_version != "authentication.k8s.io/v1" || answer.kind != "TokenReview" {
            return Err(FailureReason::Unavailable(format!(
                "{} does not answer with a TokenReview",
                self.url
            )));
        }
        Ok(answer.status)
    }

    fn judge(&self, status: Status) -> Result<User, FailureReason> {
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
        Recognized::from(user).checked().map(|recognized| recognized.user)
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
