//! The questions that authentication asks the API server.

use access::authn::cluster::{ApiError, ApiServer};
use futures_util::future::BoxFuture;
use k8s_openapi::api::{authentication::v1::TokenReview, core::v1::Secret};
use kube::{Api, Client, api::PostParams};

/// Asks the API server of a client.
pub struct KubeApiServer(pub Client);

impl ApiServer for KubeApiServer {
    fn system_secret<'a>(&'a self, name: &'a str) -> BoxFuture<'a, Result<Option<Secret>, ApiError>> {
        let secrets = Api::<Secret>::namespaced(self.0.clone(), "kube-system");
        Box::pin(async move { secrets.get_opt(name).await.map_err(failed) })
    }

    fn review<'a>(&'a self, review: &'a TokenReview) -> BoxFuture<'a, Result<TokenReview, ApiError>> {
        let reviews = Api::<TokenReview>::all(self.0.clone());
        Box::pin(async move { reviews.create(&PostParams::default(), review).await.map_err(failed) })
    }
}

fn failed(error: kube::Error) -> ApiError {
    let text = error.to_string();
    if matches!(&error, kube::Error::Api(status) if status.code == 403) {
        return ApiError::Forbidden(text);
    }
    ApiError::Failed(text)
}
