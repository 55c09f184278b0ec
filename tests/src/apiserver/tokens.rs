//! Tokens of service accounts. They are issued as `TokenRequest` does it and reviewed as `pkg/serviceaccount/claims.go`
//! does it.

use std::{
    collections::BTreeMap,
    path::{Path, PathBuf},
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use anyhow::Context;
use jsonwebtoken::{Algorithm, DecodingKey, EncodingKey, Header, Validation};
use serde_json::{Value, json};

use super::{ApiServer, Fault, Kind, Shared};

pub(super) const REVIEWS: &str = "/apis/authentication.k8s.io/v1/tokenreviews";
/// The issuer of tokens, and their audience unless a test asks for another.
const ISSUER: &str = "https://kubernetes.default.svc";
/// Seconds for which an object is good after its `deletionTimestamp`.
const LEEWAY: i64 = 60;

/// The object that a token is bound to beside its account.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum BoundTo<'a> {
    Nothing,
    /// A pod in the account's namespace, and the node that it is on, if any.
    Pod(&'a str, Option<&'a str>),
    Node(&'a str),
    Secret(&'a str),
}

pub(super) struct Tokens {
    key: rcgen::KeyPair,
    /// Their UIDs, by namespace and name.
    secrets: BTreeMap<(String, String), String>,
    pub fault: Option<Fault>,
}

impl Tokens {
    /// Writes the public key to `sa.pub`.
    pub fn new(directory: &Path) -> anyhow::Result<Self> {
        let key = rcgen::KeyPair::generate()?;
        std::fs::write(directory.join("sa.pub"), key.public_key_pem())?;
        Ok(Self { key, secrets: BTreeMap::new(), fault: None })
    }
}

impl ApiServer {
    /// The public key that verifies tokens of service accounts.
    pub fn service_account_key(&self) -> PathBuf {
        self.directory().join("sa.pub")
    }

    /// A new object with a UID of its own; no namespace is an empty one.
    pub fn create(&self, kind: Kind, namespace: &str, name: &str) {
        let mut metadata = json!({"name": name, "uid": uid()});
        if !namespace.is_empty() {
            metadata["namespace"] = namespace.into();
        }
        let spec = if kind == Kind::Pods { json!({"containers": []}) } else { json!({}) };
        self.send(kind, "ADDED", json!({"metadata": metadata, "spec": spec}));
    }

    pub fn delete(&self, kind: Kind, namespace: &str, name: &str) {
        let object = self.resource(kind, |r| r.get(namespace, name)).expect("what is deleted is there");
        self.send(kind, "DELETED", versionless(object));
    }

    /// An object is to be deleted at a time in seconds from now; something still keeps it.
    pub fn delete_later(&self, kind: Kind, namespace: &str, name: &str, seconds: i64) {
        let mut object = self.resource(kind, |r| r.get(namespace, name)).expect("what is deleted is there");
        let at = k8s_time(now() + seconds);
        object["metadata"]["deletionTimestamp"] = at.into();
        self.send(kind, "MODIFIED", versionless(object));
    }

    /// Deletes a namespace's pods and service accounts, as the namespace controller does.
    pub fn delete_namespace(&self, namespace: &str) {
        for kind in [Kind::Pods, Kind::ServiceAccounts] {
            for name in self.resource(kind, |r| r.names(namespace)) {
                self.delete(kind, namespace, &name);
            }
        }
        self.shared().tokens.secrets.retain(|(of, _), _| of != namespace);
    }

    /// Secrets can't be listed or watched here.
    pub fn create_secret(&self, namespace: &str, name: &str) {
        self.shared().tokens.secrets.insert((namespace.to_owned(), name.to_owned()), uid());
    }

    pub fn delete_secret(&self, namespace: &str, name: &str) {
        self.shared().tokens.secrets.remove(&(namespace.to_owned(), name.to_owned())).expect("it is there");
    }

    /// Open watches of a kind hear nothing until they are released.
    pub fn hold(&self, kind: Kind) {
        self.resource(kind, super::Resource::hold);
    }

    pub fn release(&self, kind: Kind) {
        self.resource(kind, super::Resource::release);
    }

    /// TokenReviews meet the fault; `None` heals it.
    pub fn fail_reviews(&self, fault: Option<Fault>) {
        self.shared().tokens.fault = fault;
    }

    /// How many TokenReviews were asked for.
    pub fn reviews(&self) -> usize {
        self.shared().asked.iter().filter(|asked| asked.path == REVIEWS).count()
    }

    /// A token of the account `NAMESPACE/NAME`, bound to objects as they are now; claims replace its own.
    pub fn issue(&self, account: &str, bound: BoundTo<'_>, claims: Value) -> anyhow::Result<String> {
        let shared = self.shared();
        let (namespace, name) = account.split_once('/').context("an account is NAMESPACE/NAME")?;
        let reference = |kind, namespace: &str, name: &str| -> anyhow::Result<Value> {
            let uid = shared.uid(kind, namespace, name).with_context(|| format!("no {kind:?} {name}"))?;
            Ok(json!({"name": name, "uid": uid}))
        };
        let mut kubernetes = json!({
            "namespace": namespace,
            "serviceaccount": reference(Kind::ServiceAccounts, namespace, name)?,
        });
        match bound {
            BoundTo::Nothing => {}
            BoundTo::Pod(pod, node) => {
                kubernetes["pod"] = reference(Kind::Pods, namespace, pod)?;
                if let Some(node) = node {
                    kubernetes["node"] = reference(Kind::Nodes, "", node)?;
                }
            }
            BoundTo::Node(node) => kubernetes["node"] = reference(Kind::Nodes, "", node)?,
            BoundTo::Secret(secret) => {
                let key = (namespace.to_owned(), secret.to_owned());
                let uid = shared.tokens.secrets.get(&key).context("no such Secret")?;
                kubernetes["secret"] = json!({"name": secret, "uid": uid});
            }
        }
        let mut all = json!({
            "iss": ISSUER,
            "aud": [ISSUER],
            "sub": format!("system:serviceaccount:{namespace}:{name}"),
            "iat": now() - 1,
            "nbf": now() - 1,
            "exp": now() + 3600,
            "jti": uid(),
            "kubernetes.io": kubernetes,
        });
        for (name, value) in claims.as_object().into_iter().flatten() {
            all[name] = value.clone();
        }
        let key = EncodingKey::from_ec_pem(shared.tokens.key.serialize_pem().as_bytes())?;
        Ok(jsonwebtoken::encode(&Header::new(Algorithm::ES256), &all, &key)?)
    }
}

impl Shared {
    fn uid(&self, kind: Kind, namespace: &str, name: &str) -> Option<String> {
        let object = self.resources.get(&kind)?.get(namespace, name)?;
        object["metadata"]["uid"].as_str().map(str::to_owned)
    }

    /// The answer to a TokenReview.
    pub(super) fn review(&self, review: &Value) -> Value {
        let spec = &review["spec"];
        let status = match self.judge(spec) {
            Ok(status) => status,
            Err(error) => json!({"user": {}, "error": format!("[invalid bearer token, {error}]")}),
        };
        json!({
            "kind": "TokenReview",
            "apiVersion": "authentication.k8s.io/v1",
            "metadata": {},
            "spec": spec,
            "status": status,
        })
    }

    fn judge(&self, spec: &Value) -> Result<Value, String> {
        let token = spec["token"].as_str().unwrap_or_default();
        let key = DecodingKey::from_ec_pem(self.tokens.key.public_key_pem().as_bytes());
        let key = key.map_err(|error| error.to_string())?;
        let mut validation = Validation::new(Algorithm::ES256);
        validation.set_issuer(&[ISSUER]);
        let asked: Vec<&str> =
            spec["audiences"].as_array().into_iter().flatten().flat_map(Value::as_str).collect();
        let asked = if asked.is_empty() { vec![ISSUER] } else { asked };
        validation.set_audience(&asked);
        let claims = jsonwebtoken::decode::<Value>(token, &key, &validation);
        let claims = claims.map_err(|error| error.to_string())?.claims;
        let bound = &claims["kubernetes.io"];
        let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
        let namespace = text(&bound["namespace"]);
        let account = &bound["serviceaccount"];
        self.exists(Kind::ServiceAccounts, &namespace, account)
            .map_err(|()| format!("serviceaccounts {} not found", account["name"]))?;
        let gone = |()| "service account token has been invalidated".to_owned();
        let secret = &bound["secret"];
        if !secret.is_null() {
            let uid = self.tokens.secrets.get(&(namespace.clone(), text(&secret["name"])));
            (uid == Some(&text(&secret["uid"]))).then_some(()).ok_or(()).map_err(gone)?;
        }
        let mut extra = json!({});
        if !bound["pod"].is_null() {
            self.exists(Kind::Pods, &namespace, &bound["pod"]).map_err(gone)?;
        } else if !bound["node"].is_null() {
            self.exists(Kind::Nodes, "", &bound["node"]).map_err(gone)?;
        }
        for object in ["pod", "node"] {
            for field in ["name", "uid"] {
                if let Some(value) = bound[object][field].as_str() {
                    extra[format!("authentication.kubernetes.io/{object}-{field}")] = json!([value]);
                }
            }
        }
        let audiences: Vec<&Value> = claims["aud"].as_array().into_iter().flatten().collect();
        Ok(json!({
            "authenticated": true,
            "user": {
                "username": claims["sub"],
                "uid": account["uid"],
                "groups": [
                    "system:serviceaccounts",
                    format!("system:serviceaccounts:{namespace}"),
                    "system:authenticated",
                ],
                "extra": extra,
            },
            "audiences": audiences.into_iter().filter(|one| one.as_str().is_some_and(|one| asked.contains(&one))).collect::<Vec<_>>(),
        }))
    }

    fn exists(&self, kind: Kind, namespace: &str, reference: &Value) -> Result<(), ()> {
        let name = reference["name"].as_str().ok_or(())?;
        let object = self.resources.get(&kind).and_then(|r| r.get(namespace, name)).ok_or(())?;
        let metadata = &object["metadata"];
        let deleted = metadata["deletionTimestamp"].as_str().map(|at| at.to_owned());
        let late = deleted.is_some_and(|at| at < k8s_time(now() - LEEWAY));
        (metadata["uid"] == reference["uid"] && !late).then_some(()).ok_or(())
    }
}

fn versionless(mut object: Value) -> Value {
    if let Some(metadata) = object["metadata"].as_object_mut() {
        metadata.remove("resourceVersion");
    }
    object
}

fn now() -> i64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs() as i64)
}

/// A random UUID.
fn uid() -> String {
    let hex = format!("{:032x}", rand::random::<u128>());
    [&hex[..8], &hex[8..12], &hex[12..16], &hex[16..20], &hex[20..]].join("-")
}

/// RFC 3339 in UTC, by seconds since 1970: such texts sort as their times do.
fn k8s_time(seconds: i64) -> String {
    let since = Duration::from_secs(seconds.unsigned_abs());
    humantime::format_rfc3339_seconds(UNIX_EPOCH + since).to_string()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_token_is_good_while_what_it_is_bound_to_exists() {
        let api = ApiServer::start().await.unwrap();
        let status = |token: &str| {
            api.shared().review(&json!({"spec": {"token": token, "audiences": [ISSUER]}}))["status"].clone()
        };
        let good = |token: &str| status(token)["authenticated"] == true;
        api.create(Kind::ServiceAccounts, "a", "web");
        api.create(Kind::Pods, "a", "web-0");
        api.create_secret("a", "keep");
        let token = |bound| api.issue("a/web", bound, json!({})).unwrap();
        let (pod, node) = (token(BoundTo::Pod("web-0", Some("n1"))), token(BoundTo::Node("n1")));
        let (secret, nothing) = (token(BoundTo::Secret("keep")), token(BoundTo::Nothing));
        let all = [&pod, &node, &secret, &nothing];
        assert!(all.iter().all(|token| good(token)));
        assert_eq!(status(&pod)["user"]["extra"]["authentication.kubernetes.io/node-name"], json!(["n1"]));
        let elsewhere = api.issue("a/web", BoundTo::Nothing, json!({"aud": ["vault"]})).unwrap();
        assert!(!good(&elsewhere));
        api.delete(Kind::Nodes, "", "n1");
        assert!(good(&pod) && !good(&node), "a pod's token is not bound to its node");
        api.delete_later(Kind::Pods, "a", "web-0", -50);
        assert!(good(&pod));
        api.delete_later(Kind::Pods, "a", "web-0", -70);
        assert!(!good(&pod));
        api.delete_secret("a", "keep");
        assert!(!good(&secret) && good(&nothing));
        api.delete_namespace("a");
        assert_eq!(
            status(&nothing),
            json!({"user": {}, "error": "[invalid bearer token, serviceaccounts \"web\" not found]"})
        );
        api.create(Kind::ServiceAccounts, "a", "web");
        assert!(!good(&nothing), "another account of the same name");
    }
}
