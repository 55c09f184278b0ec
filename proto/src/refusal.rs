//! How an agent tells its peer why it refuses a link, so that the reason is in both logs.
//!
//! The description of SSH_MSG_DISCONNECT (RFC 4253 §11.1) carries the reason of every refusal. A node-agent, which is the
//! SSH server, does not get to see it, because russh drops it there. To a node-agent the master therefore also sends the
//! reason as the user name of an authentication request with the method `none` (RFC 4252 §5.2), which never succeeds.
//!
//! The reader of such a text does not know yet who wrote it. It is a hint for people, bounded and printable, and nothing
//! is decided by it.

/// The beginning of a node-agent's SSH version.
pub const NODE_AGENT: &str = "SSH-2.0-node-agent";
/// The most characters of a peer's text that are kept.
pub const MOST: usize = 300;

const PREFIX: &str = "refused: ";

/// Encodes a reason as a user name.
pub fn to_login(reason: &str) -> String {
    format!("{PREFIX}{}", printable(reason))
}

/// The reason that a user name encodes, if it encodes one.
pub fn from_login(login: &str) -> Option<String> {
    login.strip_prefix(PREFIX).map(printable)
}

/// Makes a peer's text fit for a log or a terminal: bounds its length, and replaces control characters and all others that
/// could change how the text around it is shown.
pub fn printable(text: &str) -> String {
    let shown = |c: char| if c.is_ascii_graphic() || c.is_alphanumeric() { c } else { ' ' };
    text.chars().take(MOST).map(shown).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_reason_goes_there_and_back() {
        let reason = "the host certificate expired at 2026-01-01T00:00:00Z: join again";
        assert_eq!(from_login(&to_login(reason)).as_deref(), Some(reason));
        for login in ["", "root", "master-agent", "refused", " refused: x"] {
            assert_eq!(from_login(login), None, "{login}");
        }
    }

    #[test]
    fn a_peers_text_harms_no_log() {
        let text = "a\r\nb\u{1b}[2Jc\0d\u{7f}e\u{9b}f\u{202e}g\u{200b}h\u{2028}i\tj é \u{e0041}";
        assert_eq!(printable(text), "a  b [2Jc d e f g h i j é  ");
        assert_eq!(printable(&"x".repeat(100_000)).len(), MOST);
        assert_eq!(from_login(&format!("refused: {}", "\n".repeat(1000))), Some(" ".repeat(MOST)));
    }
}
