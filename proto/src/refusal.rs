//! How an agent tells its peer why it refuses a link, so that the reason is in both logs.
//!
//! The description of SSH_MSG_DISCONNECT (RFC 4253 §11.1) carries the reason of every refusal. A node-agent, which is the
//! SSH server, does not get to see it, because russh drops it there. To a node-agent the master therefore also sends the
//! reason as the user name of an authentication request with the method `none` (RFC 4252 §5.2), which never succeeds.
//!
//! A master to which too many nodes call home at once tells a node when to call again ([`come_again`]), before any
//! cryptography. The time is in the comment of the master's SSH identification (RFC 4253 §4.2), which it sends before it
//! disconnects. A node that does not read the comment sees a session that ends.
//!
//! The reader of all this does not know yet who wrote it. A reason is a hint for people, bounded and printable, and nothing
//! is decided by it. A time decides about the next call alone, and is bounded as well.

use std::time::Duration;

/// The beginning of a node-agent's SSH version.
pub const NODE_AGENT: &str = "SSH-2.0-node-agent";
/// The SSH version of a master-agent.
pub const MASTER_AGENT: &str = "SSH-2.0-master-agent";
/// The most characters of a peer's text that are kept.
pub const MOST: usize = 300;
/// The longest time after which a node is told to call again, and for which it waits, whatever it is told.
pub const LONGEST_WAIT: Duration = Duration::from_secs(30);

const PREFIX: &str = "refused: ";
const RETRY_AFTER: &str = "retry-after=";
/// SSH_MSG_DISCONNECT, and its reason SSH_DISCONNECT_TOO_MANY_CONNECTIONS (RFC 4253 §11.1).
const DISCONNECT: u8 = 1;
const TOO_MANY_CONNECTIONS: u32 = 12;
/// The length of which unencrypted packets are multiples, and the least padding (RFC 4253 §6).
const BLOCK: usize = 8;
const LEAST_PADDING: usize = 4;

/// Encodes a reason as a user name.
pub fn to_login(reason: &str) -> String {
    format!("{PREFIX}{}", printable(reason))
}

/// The reason that a user name encodes, if it encodes one.
pub fn from_login(login: &str) -> Option<String> {
    login.strip_prefix(PREFIX).map(printable)
}

/// A time in whole seconds, rounded up, and at most [`LONGEST_WAIT`].
pub fn whole_seconds(after: Duration) -> u32 {
    let milliseconds = after.min(LONGEST_WAIT).as_millis().div_ceil(1000);
    u32::try_from(milliseconds).unwrap_or(u32::MAX)
}

/// What a master sends in place of a handshake to a node that is to call again after some time.
pub fn come_again(after: Duration) -> Vec<u8> {
    let seconds = whole_seconds(after);
    let mut bytes = format!("{MASTER_AGENT} {RETRY_AFTER}{seconds}\r\n").into_bytes();
    bytes.extend(disconnect(&format!("too many nodes call home at once: come again in {seconds} s")));
    bytes
}

/// The time after which a node is to call again, if an SSH identification names one.
pub fn retry_after(identification: &str) -> Option<Duration> {
    let (_, comment) = identification.strip_prefix(MASTER_AGENT)?.split_once(' ')?;
    let seconds = comment.split_whitespace().find_map(|word| word.strip_prefix(RETRY_AFTER))?;
    Some(Duration::from_secs(seconds.parse().ok()?).min(LONGEST_WAIT))
}

/// SSH_MSG_DISCONNECT as an unencrypted packet.
fn disconnect(description: &str) -> Vec<u8> {
    let mut payload = vec![DISCONNECT];
    payload.extend(TOO_MANY_CONNECTIONS.to_be_bytes());
    for text in [description, ""] {
        payload.extend(length(text.len()));
        payload.extend(text.bytes());
    }
    // What the length counts follows it: the length of the padding, the payload, and the padding.
    let unpadded = 4 + 1 + payload.len();
    let padding = (unpadded + LEAST_PADDING).next_multiple_of(BLOCK) - unpadded;
    let mut packet = Vec::from(length(1 + payload.len() + padding));
    packet.extend(u8::try_from(padding));
    packet.extend(payload);
    packet.resize(packet.len() + padding, 0);
    packet
}

fn length(bytes: usize) -> [u8; 4] {
    u32::try_from(bytes).unwrap_or(u32::MAX).to_be_bytes()
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
    fn a_time_is_in_the_comment_of_an_identification_and_a_packet_follows() {
        let bytes = come_again(Duration::from_millis(16_200));
        let line = b"SSH-2.0-master-agent retry-after=17\r\n";
        let (identification, packet) = bytes.split_at(line.len());
        assert_eq!(identification, line);
        let told = retry_after(std::str::from_utf8(identification).unwrap());
        assert_eq!(told, Some(Duration::from_secs(17)));
        let number = |at: usize| u32::from_be_bytes(packet[at..at + 4].try_into().unwrap()) as usize;
        let padding = usize::from(packet[4]);
        assert_eq!((number(0) + 4, packet.len() % 8, packet[5], number(6)), (packet.len(), 0, 1, 12));
        assert!((4..12).contains(&padding));
        let text = "too many nodes call home at once: come again in 17 s";
        assert_eq!((number(10), &packet[14..14 + text.len()]), (text.len(), text.as_bytes()));
        assert_eq!((number(14 + text.len()), packet.len()), (0, 14 + text.len() + 4 + padding));
    }

    #[test]
    fn nobody_is_told_to_wait_for_longer_than_the_bound() {
        for (after, seconds) in [(0, 0), (1, 1), (1000, 1), (29_001, 30), (30_001, 30), (u64::MAX, 30)] {
            assert_eq!(whole_seconds(Duration::from_millis(after)), seconds, "{after} ms");
        }
        for (identification, told) in [
            ("SSH-2.0-master-agent retry-after=4\r", Some(4)),
            ("SSH-2.0-master-agent x retry-after=4 y", Some(4)),
            ("SSH-2.0-master-agent retry-after=18446744073709551615", Some(30)),
            ("SSH-2.0-master-agent-2 retry-after=4", Some(4)),
            ("SSH-2.0-master-agent retry-after=18446744073709551616", None),
            ("SSH-2.0-master-agent retry-after=-1", None),
            ("SSH-2.0-master-agent retry-after=", None),
            ("SSH-2.0-master-agent", None),
            ("SSH-2.0-OpenSSH_9.9 retry-after=4", None),
            ("", None),
        ] {
            assert_eq!(retry_after(identification), told.map(Duration::from_secs), "{identification}");
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
