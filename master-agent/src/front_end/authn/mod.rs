//! Authentication: who a caller is, one file for each kind of credential.
//!
//! The authenticators are asked in the configured order, and the first that recognises the caller wins. One that
//! finds a credential of its kind bad says why; the others are still asked, and if none recognises the caller,
//! the request fails with all that was said. The caller learns nothing but that it failed; the log gets the
//! [`Failure`], which holds no secret. Anonymous is for requests without any credential: a bad one never becomes
//! anonymous.
//!
//! What costs something, such as a signature to check or a webhook to ask, stands behind a [`Guard`], so that callers can
//! be kept from having it done for one guess after the other. What costs nothing is always done, and a token that was
//! good a while ago is no guess.
//!
//! Nothing here reads the clock: each call gets the [`Moment`] at which it happens.

mod anonymous;
mod authenticated;
mod authenticator;
mod bootstrap;
mod bound;
mod cache;
mod certificates;
mod chain;
mod config;
mod credential;
mod csv;
mod failure;
mod guard;
mod jwt;
mod keys;
mod load;
mod moment;
mod oidc;
mod reason;
mod service_account;
mod token_file;
mod webhook;
mod x509;

pub use anonymous::Anonymous;
pub use authenticated::{Authenticated, Recognized, Validity};
pub use authenticator::Authenticator;
pub use bootstrap::{Bootstrap, BootstrapToken, BootstrapTokens, ClusterTokens, FileTokens};
pub use cache::Digest;
pub use certificates::Certificates;
pub use chain::Authenticators;
pub use config::{
    AuthenticatorConfig, AuthnConfig, BootstrapConfig, CacheConfig, KeysConfig, OidcConfig,
    ServiceAccountConfig, WebhookConfig, X509Config,
};
pub use credential::{Presented, strip};
pub use failure::Failure;
pub use guard::Guard;
pub use moment::Moment;
pub use oidc::Oidc;
pub use reason::Reason;
pub use service_account::ServiceAccounts;
pub use token_file::TokenFile;
pub use webhook::Webhook;
pub use x509::X509;

#[cfg(test)]
mod tests;
