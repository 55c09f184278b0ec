//! What a request asks for, as kube-apiserver's RequestInfo resolver reads it.
//!
//! Authorization here and in kube-apiserver must be about the same thing. Ambiguous requests are therefore rejected
//! ([`Unreadable`]): those with empty or dot segments, encoded slashes or broken escapes in the path, and those whose query
//! names one key twice. What follows a `proxy` subresource belongs to the target, and nothing before the target decodes
//! it, so encoded slashes and empty segments are allowed there.

mod info;
mod path;
mod query;
mod unreadable;

pub use info::{OWN_GROUP, RequestInfo};
pub use path::read_alike;
pub use query::FieldRequirement;
pub use unreadable::Unreadable;

#[cfg(test)]
mod tests;
