//! The interface of all authorizers.

use std::fmt;

use futures_util::future::BoxFuture;

use crate::{request_info::RequestInfo, user::User};

/// A user and their request.
#[derive(Clone, Copy, Debug)]
pub struct Attributes<'a> {
    pub user: &'a User,
    pub request: &'a RequestInfo,
}

/// The decision of one authorizer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Decision {
    Allow { rule: String },
    Deny { rule: String, reason: String },
    NoOpinion { reason: String },
}

/// Decides about requests.
pub trait Authorizer: Send + Sync {
    fn authorize<'a>(&'a self, attributes: &'a Attributes<'a>) -> BoxFuture<'a, Decision>;
}

impl Decision {
    /// Returns `NoOpinion` without a reason.
    pub fn none() -> Self {
        Self::NoOpinion { reason: String::new() }
    }
}

impl Attributes<'_> {
    /// Returns the text for a caller whose request is denied, with the reasons of all authorizers.
    pub(super) fn denied(&self, reasons: &[String]) -> String {
        let mut text = self.to_string();
        for (i, reason) in reasons.iter().filter(|reason| !reason.is_empty()).enumerate() {
            text.push_str(if i == 0 { ": " } else { ", " });
            text.push_str(reason);
        }
        text
    }
}

/// Writes the text that Kubernetes uses: `User "x" cannot get resource "pods" in API group "" in the namespace "y"`.
impl fmt::Display for Attributes<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { user, request } = self;
        write!(f, "User {:?} cannot {} ", user.name, request.verb)?;
        if !request.is_resource {
            return write!(f, "path {:?}", request.path);
        }
        write!(f, "resource {:?} in API group {:?} ", request.combined_resource(), request.group)?;
        match request.namespace.as_str() {
            "" => f.write_str("at the cluster scope"),
            namespace => write!(f, "in the namespace {namespace:?}"),
        }
    }
}
