//! The authorizer that asks a webhook, with SubjectAccessReviews of authorization.k8s.io/v1 over verified HTTPS.
//!
//! Answers are cached under a digest of the whole question. The number of calls at once and the time of
//! each are bounded. A webhook that fails has no opinion, unless it is configured to deny.

use std::sync::Arc;

use futures_util::future::BoxFuture;
use k8s_openapi::{
    api::authorization::v1::{
        FieldSelectorAttributes, NonResourceAttributes, ResourceAttributes, SubjectAccessReview,
        SubjectAccessReviewSpec,
    },
    apimachinery::pkg::apis::meta::v1::FieldSelectorRequirement,
};
use proto_net::{
    file_watcher::{FileWatcher, Watcher},
    https_client::JsonClient,
    log_throttle::LogThrottle,
};
use sha2::{Digest, Sha256};
use tokio::{sync::Semaphore, time::Instant};

use super::{
    authorizer::{Attributes, Authorizer, Decision},
    config::SubjectAccessReviewConfig,
};
use crate::cache::Cache;

/// The longest reason of a webhook, in characters.
const MAX_REASON: usize = 512;

/// Answers reviews.
trait Reviewer: Send + Sync {
    fn review<'a>(
        &'a self,
        review: &'a SubjectAccessReview,
    ) -> BoxFuture<'a, anyhow::Result<SubjectAccessReview>>;
}

pub struct SubjectAccessReviewer {
    reviewer: Box<dyn Reviewer>,
    config: SubjectAccessReviewConfig,
    calls: Semaphore,
    answers: Cache<Key, Decision>,
    failures: LogThrottle,
}

/// The digest of a review.
type Key = [u8; 32];

impl SubjectAccessReviewer {
    /// Reads the TLS files. The returned watcher must be polled from then on.
    pub fn load(config: &SubjectAccessReviewConfig) -> anyhow::Result<(Self, Arc<dyn Watcher>)> {
        let (tls, timeout) = (config.tls.clone(), config.timeout);
        let client =
            FileWatcher::load("the authorization webhook's TLS files", config.tls.files(), move || {
                Ok(JsonClient::new(&tls, timeout)?)
            })?;
        let reviewer = Https { client: client.clone(), url: config.url.clone() };
        Ok((Self::new(Box::new(reviewer), config.clone()), client))
    }

    fn new(reviewer: Box<dyn Reviewer>, config: SubjectAccessReviewConfig) -> Self {
        let (calls, answers) = (Semaphore::new(config.max_in_flight), Cache::new(config.cache_entries));
        Self { reviewer, config, calls, answers, failures: LogThrottle::default() }
    }

    async fn decide(&self, attributes: &Attributes<'_>) -> Decision {
        let spec = spec(attributes);
        let key = match serde_json::to_vec(&spec) {
            Ok(bytes) => Sha256::digest(&bytes).into(),
            Err(error) => return self.failed(&error.into()),
        };
        if let Some(known) = self.known(&key) {
            return known;
        }
        let review = SubjectAccessReview { spec, ..SubjectAccessReview::default() };
        let asked = tokio::time::timeout(self.config.timeout, async {
            let _permit = self.calls.acquire().await?;
            // Another request may have asked the same question in the meantime.
            match self.known(&key) {
                Some(known) => Ok(known),
                None => self.ask(&review, key).await,
            }
        });
        match asked.await {
            Ok(Ok(decision)) => decision,
            Ok(Err(error)) => self.failed(&error),
            Err(_) => {
                let timeout = humantime::format_duration(self.config.timeout);
                self.failed(&anyhow::anyhow!("no answer within {timeout}"))
            }
        }
    }

    async fn ask(&self, review: &SubjectAccessReview, key: Key) -> anyhow::Result<Decision> {
        let answer = self.reviewer.review(review).await?;
        let status = answer.status.ok_or_else(|| anyhow::anyhow!("the webhook's answer has no status"))?;
        let reason = shortened(status.reason.unwrap_or_default());
        let rule = if reason.is_empty() { "SubjectAccessReview".to_owned() } else { reason.clone() };
        let (decision, ttl) = match (status.denied.unwrap_or(false), status.allowed) {
            (true, _) => (Decision::Deny { rule, reason }, self.config.deny_ttl),
            (false, true) => (Decision::Allow { rule }, self.config.allow_ttl),
            (false, false) => (Decision::NoOpinion { reason }, self.config.deny_ttl),
        };
        // The webhook could not evaluate all of its rules, so its next answer may be another one.
        if status.evaluation_error.is_none() {
            self.answers.put(key, decision.clone(), ttl, now());
        }
        Ok(decision)
    }

    fn known(&self, key: &Key) -> Option<Decision> {
        self.answers.get(key, now())
    }

    /// Returns the decision after a failure. The caller learns nothing about the cause.
    fn failed(&self, error: &anyhow::Error) -> Decision {
        if let Some(times) = self.failures.count(1) {
            tracing::warn!(times, error = format!("{error:#}"), "the authorization webhook failed");
        }
        let reason = "the authorization webhook failed".to_owned();
        match self.config.failure_denies {
            true => Decision::Deny { rule: "failure".to_owned(), reason },
            false => Decision::NoOpinion { reason },
        }
    }
}

impl Authorizer for SubjectAccessReviewer {
    fn authorize<'a>(&'a self, attributes: &'a Attributes<'a>) -> BoxFuture<'a, Decision> {
        Box::pin(self.decide(attributes))
    }
}

struct Https {
    client: Arc<FileWatcher<JsonClient>>,
    url: hyper::Uri,
}

impl Reviewer for Https {
    fn review<'a>(
        &'a self,
        review: &'a SubjectAccessReview,
    ) -> BoxFuture<'a, anyhow::Result<SubjectAccessReview>> {
        Box::pin(async move { Ok(self.client.get().post(&self.url, review).await?) })
    }
}

/// Returns the time of the runtime's clock, which tests can pause.
fn now() -> std::time::Instant {
    Instant::now().into_std()
}

fn spec(Attributes { user, request }: &Attributes<'_>) -> SubjectAccessReviewSpec {
    let some = |text: &str| Some(text.to_owned()).filter(|text| !text.is_empty());
    let mut spec = SubjectAccessReviewSpec {
        user: some(&user.name),
        uid: user.uid.clone(),
        groups: Some(user.groups.clone()).filter(|groups| !groups.is_empty()),
        extra: Some(user.extra.clone()).filter(|extra| !extra.is_empty()),
        ..SubjectAccessReviewSpec::default()
    };
    if !request.is_resource {
        let (path, verb) = (some(&request.path), some(&request.verb));
        spec.non_resource_attributes = Some(NonResourceAttributes { path, verb });
        return spec;
    }
    let requirements: Vec<_> = request
        .field_selector
        .iter()
        .map(|one| FieldSelectorRequirement {
            key: one.field.clone(),
            operator: if one.equal { "In" } else { "NotIn" }.to_owned(),
            values: Some(vec![one.value.clone()]),
        })
        .collect();
    let field_selector = (!requirements.is_empty())
        .then_some(FieldSelectorAttributes { requirements: Some(requirements), raw_selector: None });
    spec.resource_attributes = Some(ResourceAttributes {
        field_selector,
        group: some(&request.group),
        label_selector: None,
        name: some(&request.name),
        namespace: some(&request.namespace),
        resource: some(&request.resource),
        subresource: some(&request.subresource),
        verb: some(&request.verb),
        version: some(&request.version),
    });
    spec
}

/// Shortens a reason for answers and audit records.
fn shortened(reason: String) -> String {
    match reason.char_indices().nth(MAX_REASON) {
        Some((at, _)) => reason.get(..at).unwrap_or_default().to_owned(),
        None => reason,
    }
}

#[cfg(test)]
mod tests;
