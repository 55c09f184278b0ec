//! Serves on every socket, and registers all metrics.

use std::sync::Arc;

use access::authn::cluster::Cluster;
use prometheus_client::registry::Registry;
use proto_net::{
    admin::Endpoints, exposition::Exposition, file_watcher::watch, handover::reload::Reloads,
    telemetry::LinesLost,
};

use super::{
    components::Components,
    egress::Egress,
    groups::Groups,
    sockets::{FrontEndSockets, Sockets},
};
use crate::{
    admin::Admin,
    config::Config,
    egress::certificates::EgressCertificates,
    front_end::{
        self, audit::Writer, call_home::CallHomeServices, config::FrontEndConfig, local, server::FrontEnd,
    },
    joined::StoredTokens,
    kubernetes,
    metrics::Certificates,
    page::Page,
    tunnels::{self, compatibility},
};

/// The parts of the agent that only the admin endpoints use.
pub(super) struct AdminParts {
    pub(super) page: Arc<Page>,
    pub(super) reloads: Reloads,
    pub(super) log_lines_lost: LinesLost,
}

/// Serves on every socket. Returns the front end and the writer of its audit log, if a front end is configured.
pub(super) fn serve(
    config: &Config,
    components: &Components,
    sockets: Sockets,
    cluster: Option<&Cluster>,
    groups: &Groups,
    parts: AdminParts,
) -> anyhow::Result<Option<(Arc<FrontEnd>, Writer)>> {
    let Groups { callers, listeners, background, health, .. } = groups;
    let AdminParts { page, reloads, log_lines_lost } = parts;
    let Sockets { egress: egress_sockets, call_home, front_end, admin, admin_unix } = sockets;
    let certificates = egress_sockets.certificates();
    background.spawn(watch(certificates.watchers()));
    let egress = Egress {
        dialer: components.dialer.clone(),
        directory: components.dialer.clone(),
        metrics: &components.streams,
        generations: &components.generations,
        callers,
        listeners,
    };
    let proxy_urls = egress.serve(egress_sockets, config);
    let front_end = match front_end.zip(config.front_end.as_ref()) {
        Some((sockets, section)) => {
            let dependencies = front_end::server::Dependencies {
                cluster,
                proxy_urls: proxy_urls.map(|urls| urls as _),
                page: page.clone(),
                call_home: config.calls_over_https().then(|| call_home_services(components)),
                streams: components.streams.clone(),
                generations: components.generations.clone(),
            };
            Some(serve_front_end(sockets, section, dependencies, groups)?)
        }
        None => None,
    };
    if let Some(listener) = call_home {
        listeners.spawn(components.call_home.clone().accept(listener));
    }
    let served = front_end.as_ref().map(|(front_end, _)| front_end);
    let metrics = Exposition::new(registry(config, components, served, certificates, &log_lines_lost));
    let answers = Admin {
        registry: components.registry.clone(),
        explainer: components.explainer.clone(),
        drains: components.drains.clone(),
        watches: components.watches.clone(),
        store: components.store_health.clone(),
        legacy_names: legacy_names(config),
        page,
        front_end: served.cloned(),
        reloads,
        leaving: components.leaving.clone(),
    };
    let endpoints = Endpoints { metrics, admin: Arc::new(answers) };
    health.spawn(endpoints.clone().serve_tcp(admin, health.clone()));
    health.spawn(endpoints.serve_unix(admin_unix, health.clone()));
    Ok(front_end)
}

/// Returns the services of nodes that call home over the front end's port.
fn call_home_services(components: &Components) -> CallHomeServices {
    CallHomeServices {
        links: components.call_home.clone(),
        join_tokens: Arc::new(StoredTokens(components.store.clone())),
        tasks: components.sessions.clone(),
        runtime: tokio::runtime::Handle::current(),
    }
}

fn serve_front_end(
    sockets: FrontEndSockets,
    config: &FrontEndConfig,
    dependencies: front_end::server::Dependencies<'_>,
    groups: &Groups,
) -> anyhow::Result<(Arc<FrontEnd>, Writer)> {
    let Groups { callers, listeners, background, .. } = groups;
    let (front_end, writer) = FrontEnd::load(config, dependencies, callers, background)?;
    front_end.watch(background);
    if let (Some(listener), Some(config)) = (sockets.local_unix, &config.local) {
        listeners.spawn(local::accept_unix(front_end.clone(), config.clone(), listener));
    }
    if let (Some(listener), Some(config)) = (sockets.local_tcp, &config.local) {
        listeners.spawn(local::accept_tcp(front_end.clone(), config.clone(), listener));
    }
    listeners.spawn(front_end.clone().accept(sockets.https));
    Ok((front_end, writer))
}

/// Returns the registry of all metrics.
fn registry(
    config: &Config,
    components: &Components,
    front_end: Option<&Arc<FrontEnd>>,
    egress_certificates: EgressCertificates,
    log_lines_lost: &LinesLost,
) -> Registry {
    let Components { streams, tunnels, registry: nodes, watches, .. } = components;
    let mut root = Registry::default();
    let r = root.sub_registry_with_prefix("master_agent");
    log_lines_lost.register(r);
    streams.register(r);
    tunnels.register(r);
    tunnels::metrics::register(nodes, tunnels, config.metrics.per_node, r);
    r.register_collector(Box::new(certificates_in_use(components, front_end, egress_certificates)));
    if let Some(front_end) = front_end {
        front_end::metrics::register(front_end, r);
    }
    if let Some(watches) = watches {
        kubernetes::metrics::register(watches, r);
    }
    if let Some(watches) = watches.as_ref().filter(|_| legacy_names(config)) {
        compatibility::register_legacy(tunnels, watches, &mut root);
    }
    if config.metrics.konnectivity_names {
        compatibility::register_konnectivity(streams, tunnels, nodes, &mut root);
    }
    root
}

fn legacy_names(config: &Config) -> bool {
    config.kubernetes.as_ref().is_some_and(|cluster| cluster.legacy_names)
}

fn certificates_in_use(
    components: &Components,
    front_end: Option<&Arc<FrontEnd>>,
    egress: EgressCertificates,
) -> Certificates {
    let (login, nodes) = (components.login.clone(), components.registry.clone());
    let front_end = front_end.cloned();
    Certificates::new(move || {
        let mut all = tunnels::metrics::expiries(&login, &nodes).to_vec();
        all.extend(egress.expiries());
        all.extend(front_end.as_ref().map(|front_end| front_end.expiries()).unwrap_or_default());
        all
    })
}
