//! The attributes of a request, read in the same way as by kube-apiserver's RequestInfo resolver.
//!
//! The front end and kube-apiserver must authorize the same request. Ambiguous requests are therefore rejected
//! ([`Unreadable`]): those with empty or dot segments, encoded slashes or broken escapes in the path, and those whose
//! query names one key twice. The path after a `proxy` subresource belongs to the target, and nothing before the target
//! decodes it, so encoded slashes and empty segments are allowed there.

mod info;
mod path;
mod query;
mod unreadable;

pub use info::{OWN_GROUP, RequestInfo};
pub(crate) use path::escapes_are_whole;
pub use path::read_alike;
pub use query::FieldRequirement;
pub use unreadable::Unreadable;

#[cfg(test)]
mod tests;
