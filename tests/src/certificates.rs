//! Serves `certificates.k8s.io/v1` for a stub kube-apiserver, as far as a kubelet's TLS bootstrap needs it. A request
//! is created, watched, approved by a test, and signed by the real OpenSSL as kube-controller-manager's signer would.

use std::path::Path;

use anyhow::{Context as _, ensure};
use base64::{Engine, prelude::BASE64_STANDARD};
use bytes::Bytes;
use futures_util::stream;
use http_body_util::{BodyExt, StreamBody};
use hyper::{Response, StatusCode, Uri, body::Frame, header};
use serde_json::{Value, json};
use tokio::sync::watch;

use crate::{
    apiserver::{Body, failure, json_body},
    openssh::run,
};

pub const PATH: &str = "/apis/certificates.k8s.io/v1/certificatesigningrequests";
/// The signer of certificates that kubelets show to kube-apiserver.
pub const SIGNER: &str = "kubernetes.io/kube-apiserver-client-kubelet";

/// The requests that have been made.
#[derive(Clone)]
pub struct Requests(watch::Sender<Vec<Value>>);

impl Default for Requests {
    fn default() -> Self {
        Self(watch::Sender::new(Vec::new()))
    }
}

impl Requests {
    /// Answers a request for [`PATH`] or what is below it. `user` and `groups` are the caller's.
    pub(crate) fn answer(
        &self,
        method: &str,
        uri: &Uri,
        body: &[u8],
        user: &str,
        groups: &[String],
    ) -> Response<Body> {
        let name = uri.path().strip_prefix(PATH).unwrap_or_default().trim_start_matches('/');
        let query = uri.query().unwrap_or_default();
        match (method, name) {
            ("POST", "") => match self.create(body, user, groups) {
                Ok(object) => json_body(StatusCode::CREATED, &object),
                Err(error) => failure(StatusCode::UNPROCESSABLE_ENTITY, "Invalid", &format!("{error:#}")),
            },
            ("GET", "") if query.split('&').any(|pair| pair == "watch=true" || pair == "watch=1") => {
                match query.split('&').find_map(|pair| pair.strip_prefix("fieldSelector=metadata.name%3D")) {
                    Some(name) => self.watch(name.to_owned()),
                    None => failure(StatusCode::BAD_REQUEST, "BadRequest", "which one is to be watched?"),
                }
            }
            ("GET", name) => match self.get(name) {
                Some(object) => json_body(StatusCode::OK, &object),
                None => failure(StatusCode::NOT_FOUND, "NotFound", name),
            },
            _ => failure(StatusCode::METHOD_NOT_ALLOWED, "MethodNotAllowed", method),
        }
    }

    fn create(&self, body: &[u8], user: &str, groups: &[String]) -> anyhow::Result<Value> {
        let mut object: Value = serde_json::from_slice(body)?;
        ensure!(object["kind"] == "CertificateSigningRequest", "{}", object["kind"]);
        ensure!(object["spec"]["signerName"] == SIGNER, "{}", object["spec"]["signerName"]);
        // kube-apiserver fills these in, from who the proxy says is asking.
        object["spec"]["username"] = json!(user);
        object["spec"]["groups"] = json!(groups);
        if object["metadata"]["name"].is_null() {
            let prefix = object["metadata"]["generateName"].as_str().context("no name")?;
            object["metadata"]["name"] = json!(format!("{prefix}{:05x}", rand::random::<u32>() & 0xfffff));
        }
        object["metadata"]["uid"] = json!("csr-uid");
        object["metadata"]["resourceVersion"] = json!("100");
        object["status"] = json!({});
        self.0.send_modify(|all| all.push(object.clone()));
        Ok(object)
    }

    pub fn get(&self, name: &str) -> Option<Value> {
        self.0.borrow().iter().find(|object| object["metadata"]["name"] == name).cloned()
    }

    pub fn names(&self) -> Vec<String> {
        let name = |object: &Value| object["metadata"]["name"].as_str().map(str::to_owned);
        self.0.borrow().iter().filter_map(name).collect()
    }

    /// One event, once the certificate is there; then the watch ends.
    fn watch(&self, name: String) -> Response<Body> {
        let mut changes = self.0.subscribe();
        let event = async move {
            let of_name = |object: &&Value| object["metadata"]["name"] == name.as_str();
            let signed = |object: &&Value| !object["status"]["certificate"].is_null();
            let all = changes.wait_for(|all| all.iter().filter(of_name).any(|object| signed(&object))).await;
            let object = all.ok().and_then(|all| all.iter().find(of_name).cloned());
            let event = json!({"type": "MODIFIED", "object": object}).to_string() + "\n";
            Ok::<_, std::io::Error>(Frame::data(Bytes::from(event)))
        };
        let mut response = Response::new(StreamBody::new(stream::once(event)).boxed_unsync());
        let json = header::HeaderValue::from_static("application/json");
        response.headers_mut().insert(header::CONTENT_TYPE, json);
        response
    }

    /// Approves a request, and signs it with the CA of these files.
    pub fn approve(&self, name: &str, ca: &Path, key: &Path) -> anyhow::Result<()> {
        let request = self.get(name).context("there is no such request")?;
        let directory = ca.parent().context("the CA has no directory")?;
        let (csr, extensions, certificate) =
            (directory.join("csr.pem"), directory.join("csr.ext"), directory.join("csr.crt"));
        std::fs::write(
            &csr,
            BASE64_STANDARD.decode(request["spec"]["request"].as_str().unwrap_or_default())?,
        )?;
        std::fs::write(
            &extensions,
            "extendedKeyUsage = clientAuth\nkeyUsage = critical, digitalSignature\n",
        )?;
        let mut openssl = std::process::Command::new("openssl");
        openssl.args(["x509", "-req", "-days", "1", "-set_serial", "4242"]);
        openssl.arg("-in").arg(&csr).arg("-CA").arg(ca).arg("-CAkey").arg(key);
        run(openssl.arg("-extfile").arg(&extensions).arg("-out").arg(&certificate))?;
        let certificate = BASE64_STANDARD.encode(std::fs::read(&certificate)?);
        self.0.send_modify(|all| {
            for object in all.iter_mut().filter(|object| object["metadata"]["name"] == name) {
                object["status"] = json!({
                    "conditions": [{"type": "Approved", "status": "True", "reason": "AutoApproved"}],
                    "certificate": certificate,
                });
            }
        });
        Ok(())
    }
}
