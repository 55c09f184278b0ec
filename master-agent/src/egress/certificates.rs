//! The certificates of the egress listeners and of proxy URLs, as metrics tell when they expire.

use super::config::{HttpConnectConfig, KonnectivityConfig, ProxyUrlsConfig};
use crate::metrics::Expiry;

/// Of the files, which are read once.
pub fn expiries(
    http_connect: &HttpConnectConfig,
    konnectivity: &KonnectivityConfig,
    proxy_urls: Option<&ProxyUrlsConfig>,
) -> Vec<Expiry> {
    let mut all = Vec::new();
    for (tls, name, authorities) in [
        (&http_connect.tls, "connect", "connect_client_ca"),
        (&konnectivity.tls, "konnectivity", "konnectivity_client_ca"),
    ] {
        let Some(tls) = tls else { continue };
        all.push(Expiry::chain(name, &tls.cert));
        all.push(Expiry::authorities(authorities, &tls.client_ca));
    }
    if let Some(urls) = proxy_urls {
        all.push(urls.kubelet_client.as_ref().and_then(|(cert, _)| Expiry::chain("kubelet_client", cert)));
        all.push(urls.kubelet_ca.as_ref().and_then(|ca| Expiry::authorities("kubelet_ca", ca)));
        all.push(urls.target_ca.as_ref().and_then(|ca| Expiry::authorities("target_ca", ca)));
    }
    all.into_iter().flatten().collect()
}
