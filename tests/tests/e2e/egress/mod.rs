//! Egress listeners, with the clients that they are made for.

mod certificates;
mod hostile;
mod konnectivity;
mod konnectivity_dials;
mod konnectivity_recorded;
mod kubectl;
mod proxy_url_bodies;
mod proxy_url_connections;
mod proxy_urls;
mod socks5;
mod socks5_clients;
