//! The headers in which an authenticating proxy tells servers who a caller is and where it comes from. Callers must not
//! send any of them.

use hyper::{HeaderMap, header::HeaderName};

use super::hop::remove_all;

/// The prefixes of the headers that Kubernetes uses, that proxies such as oauth2-proxy and Traefik's forward
/// authentication use, and that say where a request came from.
const PREFIXES: [&str; 4] = ["x-remote-", "impersonate-", "x-auth-request-", "x-forwarded-"];
const NAMES: [&str; 2] = ["forwarded", "x-real-ip"];

/// Names of headers, in every spelling that some server takes for the same name. CGI and similar interfaces replace all
/// characters except letters and digits with the same one.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Claims {
    names: Vec<String>,
    prefixes: Vec<String>,
}

impl Default for Claims {
    fn default() -> Self {
        Self { names: NAMES.map(fold).into(), prefixes: PREFIXES.map(fold).into() }
    }
}

impl Claims {
    /// Adds names and prefixes to those that are always claims.
    pub fn with<'a>(names: impl Iterator<Item = &'a str>, prefixes: impl Iterator<Item = &'a str>) -> Self {
        let mut this = Self::default();
        this.names.extend(names.map(fold));
        this.prefixes.extend(prefixes.map(fold));
        this
    }

    pub fn contains(&self, name: &HeaderName) -> bool {
        let name = name.as_str();
        let begins_with = |prefix: &String| {
            name.len() >= prefix.len() && name.bytes().map(folded).zip(prefix.bytes()).all(|(a, b)| a == b)
        };
        self.prefixes.iter().any(begins_with)
            || self.names.iter().any(|other| other.len() == name.len() && begins_with(other))
    }

    pub fn remove(&self, headers: &mut HeaderMap) {
        remove_all(headers, |name| self.contains(name));
    }
}

/// Returns the spelling of a header's name that stands for all its spellings.
pub fn fold(name: &str) -> String {
    name.bytes().map(|byte| char::from(folded(byte))).collect()
}

fn folded(byte: u8) -> u8 {
    if byte.is_ascii_alphanumeric() { byte.to_ascii_lowercase() } else { b'-' }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_spelling_of_a_name_is_the_same_claim() {
        let claims = Claims::with(["X-Kube-User", "x_kube_group"].into_iter(), ["X-Kube-Extra-"].into_iter());
        for name in [
            "X-Remote-User",
            "x-remote-user",
            "X-REMOTE-USER",
            "x_remote_user",
            "X_Remote-User",
            "X-Remote_Group",
            "x.remote.user",
            "x~remote!user",
            "X-Remote-Uid",
            "X-Remote-Extra-Scopes",
            "X-Remote-Anything",
            "X-Remote-",
            "Impersonate-User",
            "Impersonate_Group",
            "Impersonate-Extra-a",
            "X-Forwarded-User",
            "X_Forwarded_User",
            "X-Forwarded-Group",
            "X-Forwarded-Groups",
            "X-Forwarded-Email",
            "X-Forwarded-Preferred-Username",
            "x_forwarded_preferred_username",
            "X-Forwarded-Access-Token",
            "X-Forwarded-Client-Cert",
            "X-Forwarded-Tls-Client-Cert",
            "X-Forwarded-For",
            "X_Forwarded_For",
            "X-Forwarded-Host",
            "X-Auth-Request-User",
            "X-Auth-Request-Groups",
            "x_auth_request_email",
            "X-Auth-Request-Access-Token",
            "Forwarded",
            "X-Real-IP",
            "x_real_ip",
            "X-Kube-User",
            "x_kube_user",
            "X-Kube-Group",
            "x-kube_group",
            "X-Kube-Extra-Scopes",
            "x_kube_extra_scopes",
        ] {
            assert!(claims.contains(&HeaderName::try_from(name).unwrap()), "{name}");
        }
        for name in [
            "X-Remote",
            "X-Remoteuser",
            "X-Kube-Users",
            "X-Kube-Extra",
            "X-Real-IPs",
            "Forwarded-For",
            "X-Request-Id",
            "Authorization",
            "Cookie",
            "User-Agent",
            "Accept",
        ] {
            assert!(!claims.contains(&HeaderName::try_from(name).unwrap()), "{name}");
        }
        assert!(!Claims::default().contains(&HeaderName::from_static("x-kube-user")));
    }
}
