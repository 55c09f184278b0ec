//! Tokens that end with the account, pod or node that they are bound to.

use std::{
    future::pending,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    time::Duration,
};

use futures_util::future::BoxFuture;
use k8s_openapi::api::{authentication::v1::TokenReview, core::v1::Secret};
use serde_json::{Value, json};
use tokio::time::timeout;

use super::{
    Request, Shut, at, read,
    world::{self, NOW, REVIEWS, Watches, World},
};
use crate::authn::{
    Authenticators, Certificates, FailureReason, Presented,
    cluster::{ApiError, ApiServer, BoundKind, Cluster},
};

const POD: (&str, &str) = ("kube-system/node-agent-abcde", "63e91910-dc40-413a-9b46-e6d657d14134");

/// A token that a real kube-apiserver has issued, and what it is bound to.
fn issued(name: &str) -> Request {
    let text = recorded(&format!("token-{name}.json"));
    let request: Value = serde_json::from_str(&text).unwrap();
    Request::bearer(request["status"]["token"].as_str().unwrap())
}

/// The answer of that kube-apiserver to a TokenReview.
fn reviewed(name: &str) -> Value {
    let text = recorded(&format!("tokenreview-{name}.txt"));
    serde_json::from_str(text.split_once("\n\n").unwrap().1).unwrap()
}

fn recorded(name: &str) -> String {
    let path = format!("{}/../../tests/data/kubernetes/state/{name}", env!("CARGO_MANIFEST_DIR"));
    std::fs::read_to_string(path).unwrap().replace('\r', "")
}

/// A minute after those tokens were issued.
const ISSUED: i64 = 1_795_826_028 - NOW as i64;

/// Authenticators that know the cluster of those tokens.
fn bound(world: &World) -> (Authenticators, Arc<Watches>) {
    bound_with(world, world.stub.clone())
}

fn bound_with(world: &World, api_server: Arc<dyn ApiServer>) -> (Authenticators, Arc<Watches>) {
    let keys = recorded("jwks.txt");
    world.write("own-jwks.json", keys.split_once("\n\n").unwrap().1);
    let issuer = "https://kubernetes.default.svc";
    let yaml = format!(
        "authentication: [{{service_account: {{issuers: ['{issuer}'], audiences: ['{issuer}'], jwks: {{file: own-jwks.json}}}}}}]"
    );
    let watches = Arc::new(Watches::default());
    watches.appear(
        BoundKind::ServiceAccount,
        "kube-system/node-agent",
        "8f0e165c-0854-4a02-9eab-d37b8d1dea39",
    );
    watches.appear(BoundKind::Pod, POD.0, POD.1);
    watches.appear(BoundKind::Node, "n1", "a42c3ab2-e6b3-4902-8e44-88252e53754e");
    let cluster = Cluster { api_server, ..world.cluster(Some(watches.clone())) };
    let config = read(&yaml, world).unwrap();
    (Authenticators::load(&config, Some(&cluster), &world.tasks).unwrap().0, watches)
}

/// An API server that never answers. It counts the reviews.
#[derive(Default)]
struct Silent(AtomicUsize);

impl ApiServer for Silent {
    fn system_secret<'a>(&'a self, _: &'a str) -> BoxFuture<'a, Result<Option<Secret>, ApiError>> {
        Box::pin(pending())
    }

    fn review<'a>(&'a self, _: &'a TokenReview) -> BoxFuture<'a, Result<TokenReview, ApiError>> {
        self.0.fetch_add(1, Ordering::Relaxed);
        Box::pin(pending())
    }
}

#[tokio::test]
async fn a_token_ends_with_what_it_is_bound_to_although_it_is_remembered() {
    type Delete = fn(&Watches);
    let cases: [(&str, &str, &str, Delete); 3] = [
        ("bound-to-pod", "3-pod-deleted", "service account token has been invalidated", |watches| {
            watches.vanish(BoundKind::Pod, POD.0);
        }),
        ("bound-to-node", "5-node-deleted", "service account token has been invalidated", |watches| {
            watches.appear(BoundKind::Node, "n1", "another");
        }),
        ("unbound", "7-serviceaccount-deleted", "serviceaccounts \"node-agent\" not found", |watches| {
            watches.appear(BoundKind::ServiceAccount, "kube-system/node-agent", "another");
        }),
    ];
    for (token, review, says, delete) in cases {
        let world = World::new().await;
        let (authenticators, watches) = bound(&world);
        watches.listed(true);
        let token = issued(token);
        for second in [0, 1] {
            let found = token.authenticate(&authenticators, at(ISSUED + second)).await.unwrap();
            assert_eq!(found.user.name, "system:serviceaccount:kube-system:node-agent");
            assert!(found.validity.binding.is_some());
        }
        assert_eq!(world.stub.count(REVIEWS), 0, "the watches say it");
        delete(&watches);
        world.stub.serve_only(REVIEWS, reviewed(review));
        for second in [2, 3] {
            let failure = token.authenticate(&authenticators, at(ISSUED + second)).await.unwrap_err();
            assert!(failure.to_string().contains(says), "{failure}");
            assert!(!failure.is_unavailable() && failure.unchecked().is_none());
        }
        assert_eq!(world.stub.count(REVIEWS), 1, "a refusal is remembered for a moment");
    }
}

#[tokio::test]
async fn a_pods_token_is_not_bound_to_the_pods_node() {
    let world = World::new().await;
    let (authenticators, watches) = bound(&world);
    watches.vanish(BoundKind::Node, "n1");
    watches.listed(true);
    assert!(issued("bound-to-pod").authenticate(&authenticators, at(ISSUED)).await.is_ok());
    assert_eq!(world.stub.count(REVIEWS), 0);
}

#[tokio::test]
async fn what_no_watch_shows_the_api_server_is_asked_about_once_in_a_while() {
    let world = World::new().await;
    let (authenticators, watches) = bound(&world);
    let pod = issued("bound-to-pod");
    world.stub.serve_only(REVIEWS, reviewed("1-good"));
    for second in 0..8 {
        assert!(pod.authenticate(&authenticators, at(ISSUED + second)).await.is_ok());
    }
    assert_eq!(world.stub.count(REVIEWS), 1, "nothing has been listed");
    // The API server's answer is about somebody else's token.
    world.stub.serve_only(REVIEWS, {
        let mut other = reviewed("1-good");
        other["status"]["user"]["username"] = json!("system:serviceaccount:kube-system:other");
        other
    });
    let failure = pod.authenticate(&authenticators, at(ISSUED + 8)).await.unwrap_err();
    assert_eq!(failure.reasons().collect::<Vec<_>>(), [&FailureReason::Contradiction]);
    // A guess can't make it be asked.
    let shut = Shut::default();
    let head = issued("bound-to-node").head();
    let certificates = Certificates::default();
    let presented = Presented::of(&head, &certificates).unwrap().guarded(&shut);
    assert!(authenticators.authenticate(presented, at(ISSUED)).await.unwrap_err().not_tried().is_some());
    assert_eq!(world.stub.count(REVIEWS), 2);
    watches.listed(true);
    assert!(pod.authenticate(&authenticators, at(ISSUED + 9)).await.is_ok(), "the watches stand");
}

#[tokio::test]
async fn while_the_api_server_is_away_only_what_was_verified_goes_on() {
    let world = World::new().await;
    let (authenticators, watches) = bound(&world);
    let (pod, node, account) = (issued("bound-to-pod"), issued("bound-to-node"), issued("unbound"));
    let ask = async |token: &Request, second| token.authenticate(&authenticators, at(ISSUED + second)).await;
    watches.listed(true);
    assert!(ask(&pod, 0).await.is_ok() && ask(&node, 0).await.is_ok());
    watches.listed(false);
    for second in [1, 20, 600] {
        assert!(ask(&pod, second).await.is_ok(), "it was verified, and its objects were last seen to exist");
        let failure = ask(&account, second).await.unwrap_err();
        assert!(failure.is_unavailable(), "{failure}");
        let who = failure.unchecked().unwrap();
        assert_eq!(who.user.name, "system:serviceaccount:kube-system:node-agent");
    }
    let before = world.stub.count(REVIEWS);
    for _ in 0..20 {
        assert!(ask(&account, 600).await.is_err());
    }
    assert_eq!(world.stub.count(REVIEWS), before, "it is not asked again at once");
    // The last that was heard is that one of them is gone.
    watches.vanish(BoundKind::Node, "n1");
    assert!(ask(&node, 700).await.unwrap_err().is_unavailable());
    // A credential that is wrong in itself is refused, whatever can be asked.
    let expired = ask(&account, 3600).await.unwrap_err();
    assert_eq!((expired.is_unavailable(), expired.unchecked()), (false, None));
    // It is back, and has refused: then it goes on no longer.
    world.stub.serve(REVIEWS, 201, reviewed("3-pod-deleted"));
    world.stub.serve(REVIEWS, 500, json!({}));
    assert!(!ask(&pod, 800).await.unwrap_err().is_unavailable());
    let refused = ask(&pod, 900).await.unwrap_err();
    assert!(!refused.is_unavailable() && refused.unchecked().is_none(), "what was refused opens no door");
}

#[tokio::test(start_paused = true)]
async fn held_access_ends_once_an_object_stays_missing_although_nobody_can_be_asked() {
    let world = World::new().await;
    let (authenticators, watches) = bound(&world);
    watches.listed(true);
    let found = issued("bound-to-pod").authenticate(&authenticators, at(ISSUED)).await.unwrap();
    let binding = found.validity.binding.unwrap();
    let mut ended = Box::pin(binding.ended());
    let seconds = Duration::from_secs;
    watches.listed(false);
    assert!(timeout(seconds(62), &mut ended).await.is_err(), "nothing is known to be missing");
    watches.vanish(BoundKind::Pod, POD.0);
    assert!(timeout(seconds(10), &mut ended).await.is_err(), "two checks");
    watches.appear(BoundKind::Pod, POD.0, POD.1);
    assert!(timeout(seconds(5), &mut ended).await.is_err());
    watches.vanish(BoundKind::Pod, POD.0);
    assert!(timeout(seconds(10), &mut ended).await.is_err(), "two checks once more");
    assert!(timeout(seconds(5), &mut ended).await.is_ok(), "three in a row");
    assert!(world.stub.count(REVIEWS) > 0, "the API server was asked and gave no answer");
}

#[tokio::test(start_paused = true)]
async fn an_api_server_that_hangs_is_left_alone_for_a_while_after_each_question() {
    let world = World::new().await;
    let silent = Arc::<Silent>::default();
    let (authenticators, _watches) = bound_with(&world, silent.clone());
    let pod = issued("bound-to-pod");
    // The first question ends after three seconds.
    for (second, asked) in [(0, 1), (3, 1), (4, 1), (6, 2)] {
        let failure = pod.authenticate(&authenticators, at(ISSUED + second)).await.unwrap_err();
        assert!(failure.is_unavailable(), "{failure}");
        assert_eq!(silent.0.load(Ordering::Relaxed), asked, "{second}");
    }
}

#[tokio::test]
async fn a_token_in_use_stays_verified() {
    const HOUR: i64 = 3600;
    let world = World::new().await;
    let claims = world::change(world.account_claims(), "exp", json!(NOW + 7 * 24 * 3600));
    let token = Request::bearer(&world.rsa.token(&claims));
    let watches = Arc::new(Watches::default());
    watches.appear(BoundKind::ServiceAccount, "apps/web", "sa-uid");
    watches.appear(BoundKind::Pod, "apps/web-0", "pod-uid");
    let yaml = "authentication: [{service_account: {issuers: [https://cluster], audiences: [api], \
                key_files: [keys.pem]}}]";
    let config = read(yaml, &world).unwrap();
    let cluster = world.cluster(Some(watches.clone()));
    let (authenticators, _) = Authenticators::load(&config, Some(&cluster), &world.tasks).unwrap();
    watches.listed(true);
    for hour in [0, 12, 20] {
        assert!(token.authenticate(&authenticators, at(hour * HOUR)).await.is_ok(), "{hour}");
    }
    watches.listed(false);
    assert!(token.authenticate(&authenticators, at(30 * HOUR)).await.is_ok(), "verified ten hours ago");
    let failure = token.authenticate(&authenticators, at(60 * HOUR)).await.unwrap_err();
    assert!(failure.is_unavailable(), "verified more than a day ago: {failure}");
}
