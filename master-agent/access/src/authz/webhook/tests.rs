use std::{
    sync::{
        Mutex,
        atomic::{AtomicUsize, Ordering},
    },
    time::Duration,
};

use k8s_openapi::api::authorization::v1::SubjectAccessReviewStatus;
use proto_net::tls::ClientTls;

use super::*;
use crate::{
    authz::tests::{request, shown, user},
    user::User,
};

/// Answers by the name of the user, and counts.
#[derive(Default)]
struct Fake {
    calls: AtomicUsize,
    at_once: AtomicUsize,
    most: AtomicUsize,
    seen: Mutex<Vec<SubjectAccessReviewSpec>>,
}

impl Reviewer for Arc<Fake> {
    fn review<'a>(
        &'a self,
        review: &'a SubjectAccessReview,
    ) -> BoxFuture<'a, anyhow::Result<SubjectAccessReview>> {
        Box::pin(async move {
            self.calls.fetch_add(1, Ordering::SeqCst);
            self.most.fetch_max(self.at_once.fetch_add(1, Ordering::SeqCst) + 1, Ordering::SeqCst);
            self.seen.lock().unwrap().push(review.spec.clone());
            tokio::time::sleep(Duration::from_secs(1)).await;
            self.at_once.fetch_sub(1, Ordering::SeqCst);
            let status = |allowed, denied, reason: &str, error: Option<&str>| {
                let status = SubjectAccessReviewStatus {
                    allowed,
                    denied: Some(denied),
                    reason: Some(reason.to_owned()).filter(|reason| !reason.is_empty()),
                    evaluation_error: error.map(str::to_owned),
                };
                Ok(SubjectAccessReview { status: Some(status), ..SubjectAccessReview::default() })
            };
            match review.spec.user.as_deref().unwrap_or_default() {
                "allowed" => status(true, false, "by rule 7", None),
                "denied" => status(false, true, "by rule 8", None),
                "both" => status(true, true, "", None),
                "unsure" => status(true, false, "", Some("half of it")),
                "none" => Ok(SubjectAccessReview::default()),
                "slow" => std::future::pending().await,
                "broken" => anyhow::bail!("connection refused"),
                _ => status(false, false, "", None),
            }
        })
    }
}

fn webhook(change: impl FnOnce(&mut SubjectAccessReviewConfig)) -> (Arc<Fake>, SubjectAccessReviewer) {
    let mut config = SubjectAccessReviewConfig {
        url: "https://authz.example/".parse().unwrap(),
        tls: ClientTls::default(),
        timeout: Duration::from_secs(5),
        allow_ttl: Duration::from_secs(300),
        deny_ttl: Duration::from_secs(30),
        cache_entries: 3,
        max_in_flight: 2,
        failure_denies: false,
    };
    change(&mut config);
    let fake = Arc::new(Fake::default());
    (fake.clone(), SubjectAccessReviewer::new(Box::new(fake), config))
}

async fn decided(webhook: &SubjectAccessReviewer, user: &User, what: &str) -> String {
    shown(&webhook.authorize(&Attributes { user, request: &request(what) }).await)
}

#[tokio::test(start_paused = true)]
async fn answers_and_failures() {
    let rows = [
        ("allowed", "allow by rule 7", "allow by rule 7", 1),
        ("denied", "deny by rule 8", "deny by rule 8", 1),
        ("both", "deny SubjectAccessReview", "deny SubjectAccessReview", 1),
        ("other", "-", "-", 1),
        ("unsure", "allow SubjectAccessReview", "allow SubjectAccessReview", 2),
        ("none", "-", "deny failure", 2),
        ("broken", "-", "deny failure", 2),
        ("slow", "-", "deny failure", 2),
    ];
    assert_eq!(rows.len(), 8);
    for (name, open, closed, calls) in rows {
        for (failure_denies, expected) in [(false, open), (true, closed)] {
            let (fake, webhook) = webhook(|config| config.failure_denies = failure_denies);
            for _ in 0..2 {
                assert_eq!(decided(&webhook, &user(name), "GET /api/v1/pods").await, expected, "{name}");
            }
            assert_eq!(fake.calls.load(Ordering::SeqCst), calls, "{name}: kept or not");
        }
    }
}

#[tokio::test(start_paused = true)]
async fn answers_are_kept_for_their_time_and_of_all_that_was_asked() {
    let (fake, webhook) = webhook(|_| {});
    let calls = || fake.calls.load(Ordering::SeqCst);
    let (allowed, denied) = (user("allowed"), user("denied"));
    decided(&webhook, &allowed, "GET /api/v1/pods").await;
    decided(&webhook, &denied, "GET /api/v1/pods").await;
    assert_eq!(calls(), 2);
    tokio::time::advance(Duration::from_secs(31)).await;
    decided(&webhook, &allowed, "GET /api/v1/pods").await;
    assert_eq!(calls(), 2);
    decided(&webhook, &denied, "GET /api/v1/pods").await;
    assert_eq!(calls(), 3, "a denial is kept for a shorter time");
    tokio::time::advance(Duration::from_secs(300)).await;
    decided(&webhook, &allowed, "GET /api/v1/pods").await;
    assert_eq!(calls(), 4);

    let mut with_extra = allowed.clone();
    with_extra.extra.insert("scope".into(), vec!["x".into()]);
    let mut with_uid = allowed.clone();
    with_uid.uid = Some("1".into());
    let others = [
        (with_extra, "GET /api/v1/pods"),
        (with_uid, "GET /api/v1/pods"),
        (user("allowed,group"), "GET /api/v1/pods"),
        (allowed.clone(), "POST /api/v1/pods"),
        (allowed.clone(), "GET /api/v1/pods?watch=1"),
        (allowed.clone(), "GET /api/v1/namespaces/a/pods"),
        (allowed.clone(), "GET /api/v1/namespaces/a/pods/p"),
        (allowed.clone(), "GET /api/v1/namespaces/a/pods/p/log"),
        (allowed.clone(), "GET /apis/x/v1/pods"),
        (allowed.clone(), "GET /api/v1/pods?fieldSelector=spec.nodeName=n"),
        (allowed.clone(), "GET /pods"),
    ];
    for (i, (user, what)) in others.iter().enumerate() {
        decided(&webhook, user, what).await;
        assert_eq!(calls(), 5 + i, "{what}");
    }
    assert_eq!(webhook.answers.len(), 3, "the cache is bounded");
}

#[tokio::test(start_paused = true)]
async fn calls_are_bounded_and_asked_once() {
    let (fake, webhook) = webhook(|config| config.cache_entries = 100);
    let users: Vec<_> = (0..8).map(|i| user(&format!("allowed,{}", i % 4))).collect();
    let asked = users.iter().map(|user| decided(&webhook, user, "GET /api/v1/pods"));
    let answers = futures_util::future::join_all(asked).await;
    assert!(answers.iter().all(|answer| answer == "allow by rule 7"), "{answers:?}");
    assert_eq!(fake.most.load(Ordering::SeqCst), 2);
}

#[tokio::test(start_paused = true)]
async fn what_is_asked() {
    let (fake, webhook) = webhook(|_| {});
    let mut alice = user("alice,dev");
    alice.uid = Some("u".into());
    alice.extra.insert("k".into(), vec!["v".into()]);
    let what = "GET /apis/apps/v1/namespaces/a/deployments?watch=1&fieldSelector=metadata.name=d,x!=y";
    decided(&webhook, &alice, what).await;
    decided(&webhook, &user("bob"), "HEAD /healthz").await;
    let seen = serde_json::to_value(&*fake.seen.lock().unwrap()).unwrap();
    let expected = serde_json::json!([
        {
            "user": "alice", "uid": "u", "groups": ["dev", "system:authenticated"], "extra": {"k": ["v"]},
            "resourceAttributes": {
                "verb": "watch", "group": "apps", "version": "v1", "namespace": "a", "resource": "deployments",
                "name": "d",
                "fieldSelector": {"requirements": [
                    {"key": "metadata.name", "operator": "In", "values": ["d"]},
                    {"key": "x", "operator": "NotIn", "values": ["y"]},
                ]},
            },
        },
        {
            "user": "bob", "groups": ["system:authenticated"],
            "nonResourceAttributes": {"path": "/healthz", "verb": "head"},
        },
    ]);
    assert_eq!(seen, expected);
}
