//! Makes the authenticators that are configured, and reads their files for the first time.

use std::{sync::Arc, time::Duration};

use anyhow::Context;

use super::{
    anonymous::Anonymous,
    authenticator::Authenticator,
    bootstrap::{Bootstrap, BootstrapTokens, ClusterTokens, FileTokens},
    bound::BoundObjects,
    chain::Authenticators,
    config::{AuthenticatorConfig, AuthnConfig, KeysConfig},
    keys::{KeySource, Location, RemoteKeys},
    oidc::Oidc,
    service_account::ServiceAccounts,
    token_file::TokenFile,
    webhook::Webhook,
    x509::X509,
};
use crate::{
    client_certificates::ClientCa,
    front_end::https_client::{ClientTls, JsonClient},
    kubernetes::Cluster,
    reloaded::{Follow, Reloaded},
};

/// How long a key set or discovery may take to come.
const FETCH_TIMEOUT: Duration = Duration::from_secs(5);

impl Authenticators {
    /// Reads all files for the first time; afterwards what is returned must be followed. `cluster` is for its bootstrap
    /// tokens, and for what the tokens of its service accounts are bound to.
    pub fn load(
        config: &AuthnConfig,
        cluster: Option<&Cluster>,
    ) -> anyhow::Result<(Self, Vec<Arc<dyn Follow>>)> {
        let mut files = Vec::new();
        let mut chain = Vec::new();
        let mut client_ca = None;
        for one in &config.authenticators {
            let kind = one.kind();
            let authenticator = one
                .load(cluster, &mut files, &mut client_ca)
                .with_context(|| format!("authentication: {kind}"))?;
            chain.push((kind, authenticator));
        }
        let authenticators = Self::new(chain, files.clone(), client_ca, config.cache);
        Ok((authenticators, files))
    }
}

impl AuthenticatorConfig {
    fn load(
        &self,
        cluster: Option<&Cluster>,
        files: &mut Vec<Arc<dyn Follow>>,
        client_ca: &mut Option<Arc<Reloaded<ClientCa>>>,
    ) -> anyhow::Result<Box<dyn Authenticator>> {
        Ok(match self {
            Self::X509(config) => {
                let (x509, ca) = X509::load(config.clone())?;
                files.push(ca.clone());
                *client_ca = Some(ca);
                Box::new(x509)
            }
            Self::TokenFile(path) => {
                let (tokens, file) = TokenFile::load(path.clone())?;
                files.push(file);
                Box::new(tokens)
            }
            Self::BootstrapTokens(config) => {
                let mut sources: Vec<Box<dyn BootstrapTokens>> = Vec::new();
                if let Some(path) = &config.file {
                    let (tokens, file) = FileTokens::load(path.clone())?;
                    files.push(file);
                    sources.push(Box::new(tokens));
                }
                if config.cluster {
                    let cluster = cluster.context("there is no cluster: cluster: true needs kubernetes")?;
                    sources.push(Box::new(ClusterTokens::new(cluster.client.clone())));
                }
                Box::new(Bootstrap::new(sources))
            }
            Self::ServiceAccount(config) => {
                let mut keys = Vec::new();
                for path in &config.key_files {
                    let file = KeySource::pem(path.clone())?;
                    files.push(file.clone());
                    keys.push(KeySource::File(file));
                }
                match config.jwks.clone() {
                    Some(KeysConfig::File(path)) => {
                        let file = KeySource::jwks_file(path)?;
                        files.push(file.clone());
                        keys.push(KeySource::File(file));
                    }
                    Some(KeysConfig::Url { url, ca, refresh_pause }) => {
                        let client =
                            client("the key set's CA", ClientTls { ca, identity: None }, FETCH_TIMEOUT)?;
                        files.push(client.clone());
                        let remote = RemoteKeys::new(client, Location::Jwks(url), refresh_pause);
                        keys.push(KeySource::Remote(Box::new(remote)));
                    }
                    None => {}
                }
                let (issuers, audiences) = (config.issuers.clone(), config.audiences.clone());
                let checked = cluster.filter(|_| config.check_bound_objects != Some(false));
                let checked = checked.and_then(|cluster| BoundObjects::new(cluster, audiences.clone()));
                Box::new(ServiceAccounts::new(issuers, audiences, keys, checked))
            }
            Self::Oidc(config) => {
                let tls = ClientTls { ca: config.ca.clone(), identity: None };
                let client = client("the OIDC provider's CA", tls, FETCH_TIMEOUT)?;
                files.push(client.clone());
                let location = Location::Discovery(config.issuer.clone());
                let keys = RemoteKeys::new(client, location, config.refresh_pause);
                Box::new(Oidc::new(config.clone(), KeySource::Remote(Box::new(keys))))
            }
            Self::Webhook(config) => {
                let client = client("the authentication webhook's TLS", config.tls.clone(), config.timeout)?;
                files.push(client.clone());
                Box::new(Webhook::new(config, client))
            }
            Self::Anonymous(paths) => Box::new(Anonymous::new(paths.clone())),
        })
    }
}

fn client(what: &str, tls: ClientTls, timeout: Duration) -> anyhow::Result<Arc<Reloaded<JsonClient>>> {
    Reloaded::load(what, tls.files(), move || JsonClient::new(&tls, timeout))
}
