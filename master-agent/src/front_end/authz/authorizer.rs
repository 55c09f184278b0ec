//! What every authorizer is asked and says.

use std::fmt;

use crate::front_end::{future::BoxFuture, request_info::RequestInfo, user::User};

/// Who asks for what.
#[derive(Clone, Copy, Debug)]
pub struct Attributes<'a> {
    pub user: &'a User,
    pub request: &'a RequestInfo,
}

/// One authorizer's word.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Decision {
    Allow { rule: String },
    Deny { rule: String, reason: String },
    NoOpinion { reason: String },
}

/// A source of rights.
pub trait Authorizer: Send + Sync {
    fn authorize<'a>(&'a self, attributes: &'a Attributes<'a>) -> BoxFuture<'a, Decision>;
}

impl Decision {
    /// Without anything to say about it.
    pub fn none() -> Self {
        Self::NoOpinion { reason: String::new() }
    }
}

impl Attributes<'_> {
    /// For the caller: that this is not allowed, and why each authorizer does not allow it.
    pub(super) fn denied(&self, reasons: &[String]) -> String {
        let mut text = self.to_string();
        for (i, reason) in reasons.iter().filter(|reason| !reason.is_empty()).enumerate() {
            text.push_str(if i == 0 { ": " } else { ", " });
            text.push_str(reason);
        }
        text
    }
}

/// `User "x" cannot get resource "pods" in API group "" in the namespace "y"`, as Kubernetes puts it.
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
