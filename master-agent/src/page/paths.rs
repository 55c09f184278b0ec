//! The sites at which the page is served, and its paths.

/// The prefix of the page on the admin address.
pub const ADMIN: &str = "/page/";
/// The prefix of the page on the front end.
pub const FRONT_END: &str = "/agent/page/";

/// A site at which the page is served.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Site {
    Admin,
    /// The front end, whose callers are many users.
    FrontEnd {
        user: String,
    },
}

/// The path of the live events, below either prefix.
pub(super) const EVENTS: &str = "events";
/// The result of [`below`] for the prefix without its last slash. No path below the prefix equals it.
pub(super) const WITHOUT_SLASH: &str = "/";

/// Returns the rest of a path behind the prefix, or [`WITHOUT_SLASH`] for the prefix without its last slash.
pub(super) fn below<'a>(path: &'a str, prefix: &str) -> Option<&'a str> {
    path.strip_prefix(prefix).or_else(|| (prefix.strip_suffix('/') == Some(path)).then_some(WITHOUT_SLASH))
}
