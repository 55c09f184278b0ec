//! The paths of the page, in both places.

/// Where the page is on the admin address.
pub const ADMIN: &str = "/page/";
/// Where it is on the front end.
pub const FRONT_END: &str = "/agent/page/";
/// What is told live, below either.
pub(super) const EVENTS: &str = "events";
/// The prefix itself without its last slash; no path below it is so.
pub(super) const WITHOUT_SLASH: &str = "/";

/// What is behind the prefix, or the prefix itself without its last slash.
pub(super) fn below<'a>(path: &'a str, prefix: &str) -> Option<&'a str> {
    path.strip_prefix(prefix).or_else(|| (prefix.strip_suffix('/') == Some(path)).then_some(WITHOUT_SLASH))
}
