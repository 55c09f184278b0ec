//! Builds the configured authenticators and reads their files for the first time.

use std::{path::PathBuf, sync::Arc, time::Duration};

use anyhow::Context;
use proto_net::{
    file_watcher::{FileWatcher, Watcher},
    https_client::JsonClient,
    tasks::Tasks,
    tls::ClientTls,
};

use super::{
    anonymous::Anonymous,
    authenticator::Authenticator,
    bootstrap::{Bootstrap, BootstrapTokens, ClusterTokens, FileTokens},
    bound::BoundObjects,
    chain::{Authenticators, NamedAuthenticator},
    cluster::Cluster,
    config::{
        AuthenticatorConfig, AuthnConfig, BootstrapConfig, KeysConfig, OidcConfig, ServiceAccountConfig,
        TokenReviewConfig, X509Config,
    },
    keys::{KeySource, KeysLocation, RemoteKeys},
    oidc::Oidc,
    service_account::ServiceAccounts,
    token_file::TokenFile,
    webhook::TokenReviewer,
    x509::X509,
};
use crate::client_certificates::ClientCa;

/// The longest time in which a key set or a discovery document is fetched.
const FETCH_TIMEOUT: Duration = Duration::from_secs(5);

impl Authenticators {
    /// Reads all files for the first time. The returned watchers must be polled from then on. `cluster` provides
    /// the bootstrap tokens and the objects to which tokens of service accounts are bound. `background` owns the tasks
    /// that fetch keys.
    pub fn load(
        config: &AuthnConfig,
        cluster: Option<&Cluster>,
        background: &Tasks,
    ) -> anyhow::Result<(Self, Vec<Arc<dyn Watcher>>)> {
        let mut loader = Loader { cluster, background, files: Vec::new(), client_ca: None };
        let mut chain = Vec::new();
        for one in &config.authenticators {
            let name = one.kind();
            let authenticator = loader.load(one).with_context(|| format!("authentication: {name}"))?;
            chain.push(NamedAuthenticator { name, authenticator });
        }
        let Loader { files, client_ca, .. } = loader;
        Ok((Self::new(chain, files.clone(), client_ca, config.cache), files))
    }
}

/// Builds authenticators and collects the watchers of their files.
struct Loader<'a> {
    cluster: Option<&'a Cluster>,
    background: &'a Tasks,
    files: Vec<Arc<dyn Watcher>>,
    client_ca: Option<Arc<FileWatcher<ClientCa>>>,
}

impl Loader<'_> {
    fn load(&mut self, config: &AuthenticatorConfig) -> anyhow::Result<Box<dyn Authenticator>> {
        Ok(match config {
            AuthenticatorConfig::X509(config) => Box::new(self.x509(config.clone())?),
            AuthenticatorConfig::TokenFile(path) => Box::new(self.token_file(path.clone())?),
            AuthenticatorConfig::BootstrapTokens(config) => Box::new(self.bootstrap_tokens(config)?),
            AuthenticatorConfig::ServiceAccount(config) => Box::new(self.service_account(config)?),
            AuthenticatorConfig::Oidc(config) => Box::new(self.oidc(config)?),
            AuthenticatorConfig::Webhook(config) => Box::new(self.webhook(config)?),
            AuthenticatorConfig::Anonymous(paths) => Box::new(Anonymous::new(paths.clone())),
        })
    }

    fn x509(&mut self, config: X509Config) -> anyhow::Result<X509> {
        let (x509, ca) = X509::load(config)?;
        self.files.push(ca.clone());
        self.client_ca = Some(ca);
        Ok(x509)
    }

    fn token_file(&mut self, path: PathBuf) -> anyhow::Result<TokenFile> {
        let (tokens, file) = TokenFile::load(path)?;
        self.files.push(file);
        Ok(tokens)
    }

    fn bootstrap_tokens(&mut self, config: &BootstrapConfig) -> anyhow::Result<Bootstrap> {
        let mut sources: Vec<Box<dyn BootstrapTokens>> = Vec::new();
        if let Some(path) = &config.file {
            let (tokens, file) = FileTokens::load(path.clone())?;
            self.files.push(file);
            sources.push(Box::new(tokens));
        }
        if config.cluster {
            let cluster = self.cluster.context("there is no cluster: cluster: true needs kubernetes")?;
            sources.push(Box::new(ClusterTokens::new(cluster.api_server.clone())));
        }
        Ok(Bootstrap::new(sources))
    }

    fn service_account(&mut self, config: &ServiceAccountConfig) -> anyhow::Result<ServiceAccounts> {
        let mut keys = Vec::new();
        for path in &config.key_files {
            let file = KeySource::pem(path.clone())?;
            self.files.push(file.clone());
            keys.push(KeySource::File(file));
        }
        match config.jwks.clone() {
            Some(KeysConfig::File(path)) => {
                let file = KeySource::jwks_file(path)?;
                self.files.push(file.clone());
                keys.push(KeySource::File(file));
            }
            Some(KeysConfig::Url { url, ca, refresh_pause }) => {
                let tls = ClientTls { ca, identity: None };
                let client = self.client("the key set's CA", tls, FETCH_TIMEOUT)?;
                let (location, fetches) = (KeysLocation::Jwks(url), self.background.child());
                let remote = RemoteKeys::new(client, location, refresh_pause, fetches);
                keys.push(KeySource::Remote(Arc::new(remote)));
            }
            None => {}
        }
        let (issuers, audiences) = (config.issuers.clone(), config.audiences.clone());
        let checked = self.cluster.filter(|_| config.check_bound_objects != Some(false));
        let bound = checked.and_then(|cluster| BoundObjects::new(cluster, audiences.clone()));
        Ok(ServiceAccounts::new(issuers, audiences, keys, bound))
    }

    fn oidc(&mut self, config: &OidcConfig) -> anyhow::Result<Oidc> {
        let tls = ClientTls { ca: config.ca.clone(), identity: None };
        let client = self.client("the OIDC provider's CA", tls, FETCH_TIMEOUT)?;
        let location = KeysLocation::Discovery(config.issuer.clone());
        let keys = RemoteKeys::new(client, location, config.refresh_pause, self.background.child());
        Ok(Oidc::new(config.clone(), KeySource::Remote(Arc::new(keys))))
    }

    fn webhook(&mut self, config: &TokenReviewConfig) -> anyhow::Result<TokenReviewer> {
        let client = self.client("the authentication webhook's TLS", config.tls.clone(), config.timeout)?;
        Ok(TokenReviewer::new(config, client))
    }

    /// Returns a client that follows its TLS files.
    fn client(
        &mut self,
        what: &str,
        tls: ClientTls,
        timeout: Duration,
    ) -> anyhow::Result<Arc<FileWatcher<JsonClient>>> {
        let client = FileWatcher::load(what, tls.files(), move || Ok(JsonClient::new(&tls, timeout)?))?;
        self.files.push(client.clone());
        Ok(client)
    }
}
