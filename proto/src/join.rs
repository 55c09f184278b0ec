//! The messages between a joining host and the master. They travel in an SSH channel (subsystem [`SUBSYSTEM`]) of a session
//! in which the master has authenticated. Each message is a length (u32, big endian) and JSON.

use std::{fmt, net::IpAddr};

use base64::{Engine, engine::general_purpose::URL_SAFE_NO_PAD};
use serde::{Deserialize, Serialize, de::DeserializeOwned};

use crate::NodeName;

/// The SSH subsystem that a joining host serves.
pub const SUBSYSTEM: &str = "join-v1";
/// The most bytes of a message.
pub const MAX_MESSAGE: usize = 64 * 1024;

/// A join token: `mat1.`, an id of 12 characters, a dot, and a secret of 43 characters (256 bits). Only
/// [`JoinToken::reveal`] shows the secret.
#[derive(Clone, PartialEq, Eq)]
pub struct JoinToken {
    pub id: String,
    secret: String,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "this is not a join token: copy the whole `node-agent join` line that `master-agent token create` printed"
)]
pub struct MalformedToken;

impl JoinToken {
    const ID: usize = 12;
    const SECRET: usize = 43;

    /// A new token from two independent random numbers.
    pub fn from_random(id: [u8; 12], secret: [u8; 32]) -> Self {
        const LETTERS: &[u8; 32] = b"abcdefghijklmnopqrstuvwxyz234567";
        let letter = |b: &u8| LETTERS.get(usize::from(b % 32)).map_or('a', |c| char::from(*c));
        Self { id: id.iter().map(letter).collect(), secret: URL_SAFE_NO_PAD.encode(secret) }
    }

    pub fn parse(text: &str) -> Result<Self, MalformedToken> {
        let rest = text.trim().strip_prefix("mat1.").ok_or(MalformedToken)?;
        let (id, secret) = rest.split_once('.').ok_or(MalformedToken)?;
        let id_ok = id.len() == Self::ID && id.bytes().all(|b| matches!(b, b'a'..=b'z' | b'2'..=b'7'));
        let secret_ok = secret.len() == Self::SECRET
            && secret.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'-' || b == b'_');
        if id_ok && secret_ok {
            Ok(Self { id: id.to_owned(), secret: secret.to_owned() })
        } else {
            Err(MalformedToken)
        }
    }

    /// The whole token, for the host that is to use it.
    pub fn reveal(&self) -> String {
        format!("mat1.{}.{}", self.id, self.secret)
    }

    /// The hash that is stored in place of the secret.
    pub fn hash(&self) -> [u8; 32] {
        use sha2::Digest;
        sha2::Sha256::digest(self.secret.as_bytes()).into()
    }
}

/// What a joining host presents to a front end's HTTPS port, in the form of a token: the hash of a token's secret. It
/// admits the host to an SSH session, in which the master proves itself before it is sent the token. Whoever reads it on
/// the way, such as a proxy whose CA the host trusts, can't join with it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Admission {
    pub id: String,
    pub hash: [u8; 32],
}

impl Admission {
    pub fn of(token: &JoinToken) -> Self {
        Self { id: token.id.clone(), hash: token.hash() }
    }

    pub fn parse(text: &str) -> Result<Self, MalformedToken> {
        let JoinToken { id, secret } = JoinToken::parse(text)?;
        let hash = URL_SAFE_NO_PAD.decode(secret).ok().and_then(|hash| hash.try_into().ok());
        hash.map(|hash| Self { id, hash }).ok_or(MalformedToken)
    }
}

impl fmt::Display for Admission {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "mat1.{}.{}", self.id, URL_SAFE_NO_PAD.encode(self.hash))
    }
}

impl fmt::Debug for JoinToken {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "JoinToken({}.***)", self.id)
    }
}

/// What the host asks for. The host key to be certified is the one that its SSH session has proved.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct JoinRequest {
    pub version: u32,
    pub token: String,
    pub node: Option<NodeName>,
    pub addresses: Vec<IpAddr>,
}

impl fmt::Debug for JoinRequest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("JoinRequest")
            .field("version", &self.version)
            .field("token", &"***")
            .field("node", &self.node)
            .field("addresses", &self.addresses)
            .finish()
    }
}

/// The master's answer, with keys and certificates in OpenSSH's text form.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "snake_case")]
pub enum JoinResponse {
    Accepted { node: NodeName, host_certificate: String, host_ca: String, user_ca: String },
    Refused { reason: String, hint: String },
}

/// Why bytes are not a message.
#[derive(Debug, thiserror::Error)]
pub enum MessageError {
    #[error("a message of {0} bytes; {MAX_MESSAGE} are allowed")]
    TooLarge(usize),
    /// The parser's own text is left out, since it may quote a token.
    #[error("not a message of this protocol")]
    Malformed,
}

pub(crate) fn encode(message: &impl Serialize) -> Vec<u8> {
    let json = serde_json::to_vec(message).unwrap_or_default();
    let mut bytes = u32::try_from(json.len()).unwrap_or_default().to_be_bytes().to_vec();
    bytes.extend(json);
    bytes
}

pub(crate) fn decode<T: DeserializeOwned>(bytes: &[u8]) -> Result<Option<T>, MessageError> {
    let Some((len, rest)) = bytes.split_first_chunk::<4>() else { return Ok(None) };
    let len = usize::try_from(u32::from_be_bytes(*len)).unwrap_or(usize::MAX);
    if len > MAX_MESSAGE {
        return Err(MessageError::TooLarge(len));
    }
    let Some(json) = rest.get(..len) else { return Ok(None) };
    serde_json::from_slice(json).map(Some).map_err(|_| MessageError::Malformed)
}

impl JoinRequest {
    pub fn encode(&self) -> Vec<u8> {
        encode(self)
    }

    /// Decodes the message at the beginning of `bytes`; `None` if more bytes are needed.
    pub fn decode(bytes: &[u8]) -> Result<Option<Self>, MessageError> {
        decode(bytes)
    }
}

impl JoinResponse {
    pub fn encode(&self) -> Vec<u8> {
        encode(self)
    }

    /// Decodes the message at the beginning of `bytes`; `None` if more bytes are needed.
    pub fn decode(bytes: &[u8]) -> Result<Option<Self>, MessageError> {
        decode(bytes)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn request() -> JoinRequest {
        JoinRequest {
            version: 1,
            token: JoinToken::from_random([7; 12], [9; 32]).reveal(),
            node: Some("n1".parse().unwrap()),
            addresses: vec!["10.0.0.1".parse().unwrap()],
        }
    }

    #[test]
    fn round_trips_when_complete() {
        let bytes = request().encode();
        for len in 0..bytes.len() {
            assert!(JoinRequest::decode(&bytes[..len]).unwrap().is_none());
        }
        assert_eq!(JoinRequest::decode(&bytes).unwrap(), Some(request()));
        let refused = JoinResponse::Refused { reason: "a".into(), hint: "b".into() };
        assert_eq!(JoinResponse::decode(&refused.encode()).unwrap(), Some(refused));
    }

    #[test]
    fn bytes_that_are_not_a_message_are_refused() {
        for bytes in [&b"\xff\xff\xff\xff"[..], b"\0\0\0\x02{}", b"\0\0\0\x01x", b"\0\0\0\0"] {
            assert!(JoinRequest::decode(bytes).is_err(), "{bytes:?}");
        }
    }

    #[test]
    fn an_admission_is_no_token_that_joins() {
        let token = JoinToken::from_random([1; 12], [2; 32]);
        let admission = Admission::of(&token);
        assert_eq!(Admission::parse(&admission.to_string()), Ok(admission.clone()));
        let as_token = JoinToken::parse(&admission.to_string()).unwrap();
        assert_eq!(as_token.id, token.id);
        assert_ne!(as_token.hash(), token.hash());
        // A token's own secret admits nobody.
        assert_ne!(Admission::parse(&token.reveal()), Ok(admission));
        assert_eq!(Admission::parse("mat1.aaaaaaaaaaaa.x"), Err(MalformedToken));
    }

    #[test]
    fn tokens_parse_and_keep_their_secret() {
        let token = JoinToken::from_random([1; 12], [2; 32]);
        assert_eq!(JoinToken::parse(&token.reveal()), Ok(token.clone()));
        let secret = token.reveal().rsplit('.').next().unwrap().to_owned();
        assert!(!format!("{token:?} {:?}", request()).contains(&secret));
        let good = token.reveal();
        for bad in [
            "",
            "mat1",
            "mat1..",
            &good[1..],
            &good[..good.len() - 1],
            &good.replace("mat1", "mat2"),
            &good.replace('b', "B"),
        ] {
            assert_eq!(JoinToken::parse(bad), Err(MalformedToken), "{bad}");
        }
    }
}
