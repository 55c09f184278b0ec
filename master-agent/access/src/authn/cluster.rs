//! The traits through which authentication asks the cluster. The agent implements them.

use std::sync::Arc;

use futures_util::future::BoxFuture;
use k8s_openapi::api::{authentication::v1::TokenReview, core::v1::Secret};
use sha2::{Digest, Sha256};

/// The cluster whose callers are authenticated.
#[derive(Clone)]
pub struct Cluster {
    pub api_server: Arc<dyn ApiServer>,
    /// The watched objects. It is `None` if no watches show which objects exist.
    pub objects: Option<Arc<dyn Objects>>,
}

/// Asks kube-apiserver.
pub trait ApiServer: Send + Sync {
    /// Returns the Secret of this name in `kube-system`, or `None` if there is none.
    fn system_secret<'a>(&'a self, name: &'a str) -> BoxFuture<'a, Result<Option<Secret>, ApiError>>;

    /// Sends a TokenReview, and returns it with its status.
    fn review<'a>(&'a self, review: &'a TokenReview) -> BoxFuture<'a, Result<TokenReview, ApiError>>;
}

/// Why kube-apiserver has not answered a question.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ApiError {
    /// The agent's user is not allowed to ask this.
    #[error("{0}")]
    Forbidden(String),
    #[error("{0}")]
    Failed(String),
}

/// Answers from the watches which objects exist.
pub trait Objects: Send + Sync {
    /// Checks whether these objects exist at a time in seconds since 1970.
    fn check(&self, objects: &[BoundObject], now: i64) -> Existence;
}

/// The combined existence of several objects.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Existence {
    /// All of them exist.
    Exist,
    /// No object is known to be missing, but the watches are not up to date.
    Unknown,
    /// At least one of them does not exist or no longer exists.
    Missing,
}

/// An object with its UID. An object that was recreated under the same name is a different object.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BoundObject {
    pub kind: BoundKind,
    /// `NAME` of a node, or `NAMESPACE/NAME`.
    pub key: Arc<str>,
    pub uid: Uid,
}

/// The kinds of objects to which tokens are bound.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum BoundKind {
    Node,
    Pod,
    ServiceAccount,
}

/// A digest of a UID, since UIDs are opaque text of any length.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Uid([u8; 16]);

impl Uid {
    pub fn of(text: &str) -> Self {
        let digest: [u8; 32] = Sha256::digest(text).into();
        let mut uid = [0; 16];
        uid.iter_mut().zip(digest).for_each(|(to, from)| *to = from);
        Self(uid)
    }
}
