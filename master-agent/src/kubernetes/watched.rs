//! The API's types of the kinds that are followed, and how each becomes what routing knows of it.

use std::fmt::Debug;

use k8s_openapi::api::{core::v1 as core, discovery::v1 as discovery};
use serde::de::DeserializeOwned;

use super::{followed::Followed, objects};
use crate::routing::cluster::{Kind, Object};

/// A type of the API.
pub(super) trait Watched:
    kube::Resource<DynamicType = ()> + DeserializeOwned + Clone + Debug + Send + 'static
{
    const KIND: Followed;

    /// `None` if nothing can be routed by it.
    fn object(self) -> Option<Object>;
}

macro_rules! watched {
    ($($type:ty, $kind:expr, $convert:path;)*) => {$(
        impl Watched for $type {
            const KIND: Followed = Followed::Routed($kind);

            fn object(self) -> Option<Object> {
                $convert(self)
            }
        }
    )*};
}

watched! {
    core::Node, Kind::Nodes, objects::node;
    core::Pod, Kind::Pods, objects::pod;
    core::Service, Kind::Services, objects::service;
    discovery::EndpointSlice, Kind::EndpointSlices, objects::endpoint_slice;
}

impl Watched for core::ServiceAccount {
    const KIND: Followed = Followed::ServiceAccounts;

    fn object(self) -> Option<Object> {
        None
    }
}
