//! JSON Web Tokens (RFC 7515, RFC 7519), as service accounts and OpenID Connect use them.
//!
//! Before its signature is verified, a token serves to choose the keys of its issuer and for nothing else. The key
//! decides which algorithms it may verify. JSON in which an object has a name twice is rejected as ambiguous.

use std::{
    fmt,
    time::{Duration, SystemTime},
};

use base64::{Engine, engine::general_purpose::URL_SAFE_NO_PAD};
use jsonwebtoken::Algorithm;
use serde::{
    Deserialize, Deserializer,
    de::{self, MapAccess, SeqAccess, Visitor},
};
use serde_json::{Map, Value};

use super::{
    guard::Cost,
    keys::{KeySet, KeySource},
    reason::FailureReason,
};
use crate::moment::Moment;

/// How far the clock of an issuer may be ahead, in seconds.
const LEEWAY: u64 = 10;

/// The longest encoded header, in bytes.
const MAX_HEADER: usize = 4096;
/// The longest key ID, in bytes.
const MAX_KEY_ID: usize = 256;

/// A token whose signature has not been verified.
pub struct Unverified<'a> {
    algorithm: Option<Algorithm>,
    key_id: Option<String>,
    claims: Map<String, Value>,
    message: &'a str,
    signature: &'a str,
}

/// The claims of a verified token.
#[derive(Debug)]
pub struct Claims(Map<String, Value>);

impl<'a> Unverified<'a> {
    /// Parses a token. Returns `None` if the text is not a JSON Web Token.
    pub fn read(token: &'a str) -> Result<Option<Self>, FailureReason> {
        let Some((message, signature)) = token.rsplit_once('.') else { return Ok(None) };
        let Some((header, payload)) = message.split_once('.') else { return Ok(None) };
        if payload.contains('.') {
            return Ok(None);
        }
        if header.len() > MAX_HEADER {
            return Err(FailureReason::Malformed("its header is too long"));
        }
        let header =
            object(header).map_err(|()| FailureReason::Malformed("its header is not a JSON object"))?;
        let claims =
            object(payload).map_err(|()| FailureReason::Malformed("its payload is not a JSON object"))?;
        if header.contains_key("crit") {
            return Err(FailureReason::Malformed("its header has critical extensions"));
        }
        let algorithm = header.get("alg").and_then(Value::as_str).and_then(|name| name.parse().ok());
        let key_id = match header.get("kid") {
            None => None,
            Some(Value::String(id)) if id.len() <= MAX_KEY_ID => Some(id.clone()),
            Some(_) => return Err(FailureReason::Malformed("its key ID is not a short text")),
        };
        Ok(Some(Self { algorithm, key_id, claims, message, signature }))
    }

    /// Returns the issuer that the token names.
    pub fn issuer(&self) -> Option<&str> {
        self.claims.get("iss").and_then(Value::as_str)
    }

    /// Verifies the signature and then the times.
    pub(super) async fn verify(
        self,
        keys: &[KeySource],
        cost: &Cost<'_>,
        now: Moment,
    ) -> Result<Claims, FailureReason> {
        cost.incur()?;
        let (mut outcome, mut unavailable) = (FailureReason::UnknownKey, None);
        for source in keys {
            match self.verify_by(source, now).await {
                Ok(()) => return self.timely(now),
                Err(FailureReason::UnknownKey) => {}
                Err(reason @ FailureReason::Unavailable(_)) => unavailable = Some(reason),
                Err(reason) => outcome = reason,
            }
        }
        // The right key may be one of those that could not be fetched.
        Err(unavailable.unwrap_or(outcome))
    }

    async fn verify_by(&self, source: &KeySource, now: Moment) -> Result<(), FailureReason> {
        let set = source.current(now).await?;
        match self.verify_with(&set) {
            Err(FailureReason::UnknownKey) => {}
            decided => return decided,
        }
        match source.newer(&set, now).await? {
            Some(newer) => self.verify_with(&newer),
            None => Err(FailureReason::UnknownKey),
        }
    }

    fn verify_with(&self, set: &KeySet) -> Result<(), FailureReason> {
        let Some(algorithm) = self.algorithm else { return Err(FailureReason::Algorithm) };
        let mut outcome = FailureReason::UnknownKey;
        for key in set.select(self.key_id.as_deref()) {
            if !key.allows(algorithm) {
                // A wrong signature by a key of the right type is the more helpful reason.
                if outcome != FailureReason::Signature {
                    outcome = FailureReason::Algorithm;
                }
            } else if key.verifies(self.message, self.signature, algorithm) {
                return Ok(());
            } else {
                outcome = FailureReason::Signature;
            }
        }
        Err(outcome)
    }

    fn timely(self, now: Moment) -> Result<Claims, FailureReason> {
        let claims = Claims(self.claims);
        let seconds = |name: &str| {
            claims.0.get(name).map(|value| seconds(value).ok_or_else(|| FailureReason::Claim(name.into())))
        };
        let expiry = seconds("exp").ok_or(FailureReason::NoExpiry)??;
        if now.unix() >= expiry {
            return Err(FailureReason::Expired);
        }
        for name in ["nbf", "iat"] {
            if seconds(name).transpose()?.is_some_and(|begin| begin > now.unix().saturating_add(LEEWAY)) {
                return Err(FailureReason::NotYetValid);
            }
        }
        Ok(claims)
    }
}

impl Claims {
    pub fn get(&self, name: &str) -> Option<&Value> {
        self.0.get(name)
    }

    /// Returns the text of a required claim.
    pub fn text(&self, name: &str) -> Result<&str, FailureReason> {
        self.0.get(name).and_then(Value::as_str).ok_or_else(|| FailureReason::Claim(name.into()))
    }

    /// Returns the text of a claim within other claims, or `None` if it is absent.
    pub fn nested(&self, path: &[&str]) -> Result<Option<&str>, FailureReason> {
        let wrong = || FailureReason::Claim(path.join("."));
        let Some((first, rest)) = path.split_first() else { return Ok(None) };
        let mut value = self.0.get(*first);
        for name in rest {
            value = match value {
                None | Some(Value::Null) => None,
                Some(Value::Object(object)) => object.get(*name),
                Some(_) => return Err(wrong()),
            };
        }
        match value {
            None | Some(Value::Null) => Ok(None),
            Some(Value::String(text)) => Ok(Some(text)),
            Some(_) => Err(wrong()),
        }
    }

    /// Checks that the token is for one of these audiences.
    pub fn check_audience(&self, audiences: &[String]) -> Result<(), FailureReason> {
        let ours = |audience: &str| audiences.iter().any(|one| one == audience);
        let found = match self.0.get("aud") {
            Some(Value::String(one)) => ours(one),
            Some(Value::Array(all)) if all.iter().all(Value::is_string) => {
                all.iter().filter_map(Value::as_str).any(ours)
            }
            Some(_) | None => false,
        };
        found.then_some(()).ok_or(FailureReason::Audience)
    }

    pub fn expires(&self) -> Option<SystemTime> {
        let seconds = self.0.get("exp").and_then(seconds)?;
        SystemTime::UNIX_EPOCH.checked_add(Duration::from_secs(seconds))
    }
}

/// Reads a NumericDate of RFC 7519: seconds, possibly with a fraction.
fn seconds(value: &Value) -> Option<u64> {
    let fraction = || value.as_f64().filter(|f| (0.0..1e15).contains(f)).map(|f| f as u64);
    value.as_u64().or_else(fraction)
}

/// Decodes a JSON object from base64url without padding.
fn object(encoded: &str) -> Result<Map<String, Value>, ()> {
    let json = URL_SAFE_NO_PAD.decode(encoded).map_err(|_| ())?;
    match serde_json::from_slice::<Strict>(&json) {
        Ok(Strict(Value::Object(object))) => Ok(object),
        Ok(_) | Err(_) => Err(()),
    }
}

/// JSON in which no object has a name twice.
struct Strict(Value);

impl<'de> Deserialize<'de> for Strict {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_any(StrictVisitor)
    }
}

struct StrictVisitor;

impl<'de> Visitor<'de> for StrictVisitor {
    type Value = Strict;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("JSON")
    }

    fn visit_bool<E>(self, value: bool) -> Result<Strict, E> {
        Ok(Strict(value.into()))
    }

    fn visit_i64<E>(self, value: i64) -> Result<Strict, E> {
        Ok(Strict(value.into()))
    }

    fn visit_u64<E>(self, value: u64) -> Result<Strict, E> {
        Ok(Strict(value.into()))
    }

    fn visit_f64<E>(self, value: f64) -> Result<Strict, E> {
        Ok(Strict(value.into()))
    }

    fn visit_str<E>(self, value: &str) -> Result<Strict, E> {
        Ok(Strict(value.into()))
    }

    fn visit_unit<E>(self) -> Result<Strict, E> {
        Ok(Strict(Value::Null))
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut items: A) -> Result<Strict, A::Error> {
        let mut list = Vec::new();
        while let Some(Strict(item)) = items.next_element()? {
            list.push(item);
        }
        Ok(Strict(Value::Array(list)))
    }

    fn visit_map<A: MapAccess<'de>>(self, mut entries: A) -> Result<Strict, A::Error> {
        let mut object = Map::new();
        while let Some((name, Strict(value))) = entries.next_entry::<String, Strict>()? {
            if object.insert(name, value).is_some() {
                return Err(de::Error::custom("duplicate name"));
            }
        }
        Ok(Strict(Value::Object(object)))
    }
}
