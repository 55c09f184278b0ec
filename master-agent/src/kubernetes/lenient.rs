//! Objects that may be malformed, so that a bad one does not keep the good ones of its list from being read.

use std::{borrow::Cow, fmt::Debug};

use k8s_openapi::apimachinery::pkg::apis::meta::v1::{ObjectMeta, Time};
use serde::{Deserialize, Deserializer, de::DeserializeOwned};
use serde_json::Value;

/// An object of a kind, or why it can't be read. The metadata holds at least what could be read of it.
#[derive(Clone, Debug)]
pub(super) struct Lenient<K> {
    pub metadata: ObjectMeta,
    pub object: Result<K, String>,
}

impl<'de, K: DeserializeOwned> Deserialize<'de> for Lenient<K> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let value = Value::deserialize(deserializer)?;
        let text = |name| value.pointer(name).and_then(Value::as_str).map(str::to_owned);
        let deletion = text("/metadata/deletionTimestamp").map(|time| time.parse().map(Time));
        let metadata = ObjectMeta {
            name: text("/metadata/name"),
            namespace: text("/metadata/namespace"),
            resource_version: text("/metadata/resourceVersion"),
            // If the time of deletion can't be read, the object is not known to exist.
            uid: text("/metadata/uid").filter(|_| !matches!(deletion, Some(Err(_)))),
            deletion_timestamp: deletion.and_then(Result::ok),
            ..ObjectMeta::default()
        };
        Ok(Self { metadata, object: serde_json::from_value(value).map_err(|e| e.to_string()) })
    }
}

/// Requests are those of the kind itself.
impl<K: kube::Resource> kube::Resource for Lenient<K> {
    type DynamicType = K::DynamicType;
    type Scope = K::Scope;

    fn kind(dt: &Self::DynamicType) -> Cow<'_, str> {
        K::kind(dt)
    }

    fn group(dt: &Self::DynamicType) -> Cow<'_, str> {
        K::group(dt)
    }

    fn version(dt: &Self::DynamicType) -> Cow<'_, str> {
        K::version(dt)
    }

    fn plural(dt: &Self::DynamicType) -> Cow<'_, str> {
        K::plural(dt)
    }

    fn meta(&self) -> &ObjectMeta {
        &self.metadata
    }

    fn meta_mut(&mut self) -> &mut ObjectMeta {
        &mut self.metadata
    }
}
