//! SubjectAccessReview (authorization.k8s.io/v1) by a webhook over verified HTTPS.
//!
//! Answers are kept for a time of their own, in a bounded cache keyed by a hash of everything that was asked. Calls are
//! bounded in number and time. A webhook that fails has no opinion, unless it is configured to deny.

use std::{
    collections::{HashMap, VecDeque},
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use k8s_openapi::{
    api::authorization::v1::{
        FieldSelectorAttributes, NonResourceAttributes, ResourceAttributes, SubjectAccessReview,
        SubjectAccessReviewSpec,
    },
    apimachinery::pkg::apis::meta::v1::FieldSelectorRequirement,
};
use sha2::{Digest, Sha256};
use tokio::{sync::Semaphore, time::Instant};

use super::{
    authorizer::{Attributes, Authorizer, Decision},
    config::WebhookConfig,
};
use crate::{
    front_end::{future::BoxFuture, https_client::JsonClient, seldom::Seldom},
    reloaded::{Follow, Reloaded},
};

/// What answers reviews.
trait Reviewer: Send + Sync {
    fn review<'a>(
        &'a self,
        review: &'a SubjectAccessReview,
    ) -> BoxFuture<'a, anyhow::Result<SubjectAccessReview>>;
}

pub struct Webhook {
    reviewer: Box<dyn Reviewer>,
    config: WebhookConfig,
    calls: Semaphore,
    cache: Mutex<Cache>,
    failures: Seldom,
}

type Key = [u8; 32];

/// Answers until they expire; of too many, the oldest go.
#[derive(Default)]
struct Cache {
    answers: HashMap<Key, (Instant, Decision)>,
    /// Oldest first; each key of `answers` once.
    order: VecDeque<Key>,
}

impl Webhook {
    pub fn load(config: &WebhookConfig) -> anyhow::Result<(Self, Arc<dyn Follow>)> {
        let (tls, timeout) = (config.tls.clone(), config.timeout);
        let client =
            Reloaded::load("the authorization webhook's TLS files", config.tls.files(), move || {
                JsonClient::new(&tls, timeout)
            })?;
        let reviewer = Https { client: client.clone(), url: config.url.clone() };
        Ok((Self::new(Box::new(reviewer), config.clone()), client))
    }

    fn new(reviewer: Box<dyn Reviewer>, config: WebhookConfig) -> Self {
        let calls = Semaphore::new(config.max_in_flight);
        Self { reviewer, config, calls, cache: Mutex::default(), failures: Seldom::default() }
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
            // Someone may have asked the same meanwhile.
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
        // An answer that could not be worked out is none to keep.
        if status.evaluation_error.is_none() && !ttl.is_zero() {
            self.cache().put(key, decision.clone(), ttl, self.config.cache_entries);
        }
        Ok(decision)
    }

    fn known(&self, key: &Key) -> Option<Decision> {
        self.cache().get(key, Instant::now())
    }

    fn cache(&self) -> std::sync::MutexGuard<'_, Cache> {
        self.cache.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The caller learns no more than that it failed.
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

impl Authorizer for Webhook {
    fn authorize<'a>(&'a self, attributes: &'a Attributes<'a>) -> BoxFuture<'a, Decision> {
        Box::pin(self.decide(attributes))
    }
}

struct Https {
    client: Arc<Reloaded<JsonClient>>,
    url: hyper::Uri,
}

impl Reviewer for Https {
    fn review<'a>(
        &'a self,
        review: &'a SubjectAccessReview,
    ) -> BoxFuture<'a, anyhow::Result<SubjectAccessReview>> {
        Box::pin(async move { self.client.get().post(&self.url, review).await })
    }
}

impl Cache {
    fn get(&self, key: &Key, now: Instant) -> Option<Decision> {
        self.answers.get(key).filter(|(until, _)| now < *until).map(|(_, decision)| decision.clone())
    }

    fn put(&mut self, key: Key, decision: Decision, ttl: Duration, most: usize) {
        if self.answers.insert(key, (Instant::now() + ttl, decision)).is_none() {
            self.order.push_back(key);
        }
        while self.order.len() > most {
            if let Some(oldest) = self.order.pop_front() {
                self.answers.remove(&oldest);
            }
        }
    }
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

/// It comes from outside, and goes into answers and records.
fn shortened(reason: String) -> String {
    match reason.char_indices().nth(512) {
        Some((at, _)) => reason.get(..at).unwrap_or_default().to_owned(),
        None => reason,
    }
}

#[cfg(test)]
mod tests;
