//! The HTTP proxy between this node and masters, if there is one. The configuration names it, or the environment, which
//! is read as other programs on a cluster's nodes read it (Go's `httpproxy`).

use std::{fmt, io, net::IpAddr, path::PathBuf, str::FromStr};

use base64::{Engine, engine::general_purpose::STANDARD};
use ipnet::IpNet;
use percent_encoding::percent_decode_str;
use proto::{Host, Target};
use proto_config::{At, Shape, Value, secret_file};
use zeroize::Zeroizing;

/// The port of a proxy whose address names none.
const HTTP: u16 = 80;

/// An HTTP proxy. Neither `Display` nor `Debug` shows its credentials.
#[derive(Clone, PartialEq, Eq)]
pub struct Proxy {
    pub address: Target,
    login: Option<Login>,
}

#[derive(Clone, PartialEq, Eq)]
struct Login {
    user: Zeroizing<Vec<u8>>,
    password: Password,
}

#[derive(Clone, PartialEq, Eq)]
enum Password {
    None,
    Given(Zeroizing<Vec<u8>>),
    /// The file is read for each link.
    File(PathBuf),
}

#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum InvalidProxy {
    #[error("expected http://[USER:PASSWORD@]HOST:PORT; other kinds of proxies are not supported")]
    Scheme,
    /// The error does not show the text, which may hold a password.
    #[error("the proxy's address is not of the form http://[USER:PASSWORD@]HOST:PORT")]
    Address,
}

impl FromStr for Proxy {
    type Err = InvalidProxy;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let rest = match text.split_once("://") {
            Some((scheme, rest)) if scheme.eq_ignore_ascii_case("http") => rest,
            Some(_) => return Err(InvalidProxy::Scheme),
            None => text,
        };
        let rest = rest.strip_suffix('/').unwrap_or(rest);
        let (user, authority) = match rest.rsplit_once('@') {
            Some((user, authority)) => (Some(user), authority),
            None => (None, rest),
        };
        let address = Target::parse_authority(authority, HTTP);
        let decoded = |text| Zeroizing::new(percent_decode_str(text).collect::<Vec<u8>>());
        let login = user.map(|login| match login.split_once(':') {
            Some((user, password)) => {
                Login { user: decoded(user), password: Password::Given(decoded(password)) }
            }
            None => Login { user: decoded(login), password: Password::None },
        });
        Ok(Self { address: address.map_err(|_| InvalidProxy::Address)?, login })
    }
}

impl Proxy {
    /// Takes the password from a file; `None` if the address names no user, or has a password already.
    pub fn with_password_file(mut self, file: PathBuf) -> Option<Self> {
        let login = self.login.as_mut().filter(|login| login.password == Password::None)?;
        login.password = Password::File(file);
        Some(self)
    }

    /// The value of `Proxy-Authorization` (RFC 7617). Blocks while it reads the password's file, if there is one.
    pub fn authorization(&self) -> Result<Option<Zeroizing<String>>, CredentialsError> {
        let Some(Login { user, password }) = &self.login else { return Ok(None) };
        let mut plain = Zeroizing::new([user.as_slice(), b":"].concat());
        match password {
            Password::None => {}
            Password::Given(password) => plain.extend_from_slice(password),
            Password::File(file) => {
                let text = secret_file::read_given(file)?;
                let password = text.trim_end_matches(['\r', '\n']);
                if password.is_empty() || password.contains(char::is_control) {
                    return Err(CredentialsError::NoPassword(file.clone()));
                }
                plain.extend_from_slice(password.as_bytes());
            }
        }
        Ok(Some(Zeroizing::new(format!("Basic {}", STANDARD.encode(&*plain)))))
    }
}

impl fmt::Display for Proxy {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "http://{}", self.address)
    }
}

impl fmt::Debug for Proxy {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

/// Why the credentials for a proxy can't be used. No variant shows them.
#[derive(Debug, thiserror::Error)]
pub enum CredentialsError {
    /// The text names the file.
    #[error(transparent)]
    File(#[from] io::Error),
    #[error("{} does not hold one line with a password", .0.display())]
    NoPassword(PathBuf),
}

/// The configuration's choice of a proxy.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum ProxyChoice {
    /// The proxy that `HTTPS_PROXY` names, except for targets that `NO_PROXY` names.
    #[default]
    Environment,
    None,
    Use(Proxy),
}

impl ProxyChoice {
    /// The proxy on the way to a target.
    pub fn towards(&self, target: &Target) -> Result<Option<Proxy>, InvalidProxy> {
        match self {
            Self::Environment => Environment::read().towards(target),
            Self::None => Ok(None),
            Self::Use(proxy) => Ok(Some(proxy.clone())),
        }
    }

    /// As [`Proxy::with_password_file`].
    pub fn with_password_file(self, file: PathBuf) -> Option<Self> {
        match self {
            Self::Use(proxy) => proxy.with_password_file(file).map(Self::Use),
            Self::Environment | Self::None => None,
        }
    }
}

impl fmt::Display for ProxyChoice {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Environment => f.write_str("environment"),
            Self::None => f.write_str("none"),
            Self::Use(proxy) => fmt::Display::fmt(proxy, f),
        }
    }
}

impl Value for ProxyChoice {
    const SHAPE: Shape = Shape::text("proxy");

    fn read(at: &At<'_>) -> Option<Self> {
        match at.text()? {
            "environment" => Some(Self::Environment),
            "none" => Some(Self::None),
            text => match text.parse() {
                Ok(proxy) => Some(Self::Use(proxy)),
                Err(error) => {
                    at.error(format!("expected environment, none or an address: {error}"));
                    None
                }
            },
        }
    }
}

/// The environment variables that name proxies.
#[derive(Clone, Default)]
pub struct Environment {
    pub https_proxy: String,
    pub no_proxy: String,
}

impl Environment {
    /// Reads the variables. Names in capital letters take precedence.
    pub fn read() -> Self {
        let variable = |names: [&str; 2]| {
            let mut set = names.into_iter().filter_map(|name| std::env::var(name).ok());
            set.find(|value| !value.is_empty()).unwrap_or_default()
        };
        Self {
            https_proxy: variable(["HTTPS_PROXY", "https_proxy"]),
            no_proxy: variable(["NO_PROXY", "no_proxy"]),
        }
    }

    fn towards(&self, target: &Target) -> Result<Option<Proxy>, InvalidProxy> {
        match self.https_proxy.trim() {
            "" => Ok(None),
            _ if self.exempts(target) => Ok(None),
            proxy => proxy.parse().map(Some),
        }
    }

    /// Whether a target is reached without the proxy, as this host always is.
    fn exempts(&self, target: &Target) -> bool {
        let this_host = match &target.host {
            Host::Addr(address) => address.is_loopback(),
            Host::Name(name) => name == "localhost",
        };
        let entries = self.no_proxy.split([',', ' ']).map(str::trim).filter(|entry| !entry.is_empty());
        this_host || entries.into_iter().any(|entry| applies(&entry.to_ascii_lowercase(), target))
    }
}

/// Whether one entry of `NO_PROXY` applies to a target. An entry is `*`, a network, or an address or a domain, either of
/// which may have a port. A domain includes its subdomains, and `.example` stands for those alone.
fn applies(entry: &str, target: &Target) -> bool {
    if entry == "*" {
        return true;
    }
    let address = match &target.host {
        Host::Addr(address) => Some(*address),
        Host::Name(_) => None,
    };
    if let Ok(network) = entry.parse::<IpNet>() {
        return address.is_some_and(|address| network.contains(&address));
    }
    let (host, port) = match entry.rsplit_once(':') {
        Some((host, port)) if !host.contains(':') || host.ends_with(']') => (host, Some(port)),
        Some(_) | None => (entry, None),
    };
    if port.is_some_and(|port| port != target.port.to_string()) {
        return false;
    }
    let host = host.trim_start_matches('[').trim_end_matches(']');
    if let Ok(of_entry) = host.parse::<IpAddr>() {
        return address == Some(of_entry.to_canonical());
    }
    let Host::Name(name) = &target.host else { return false };
    let host = host.strip_prefix('*').unwrap_or(host);
    let below = |domain: &str| name.strip_suffix(domain).is_some_and(|rest| !rest.is_empty());
    match host.strip_prefix('.') {
        Some("") => false,
        Some(_) => below(host),
        None => !host.is_empty() && (name == host || below(&format!(".{host}"))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_proxy_exempts_what_its_entries_apply_to() {
        for (no_proxy, target, exempt) in [
            ("", "a.example:443", false),
            ("*", "a.example:443", true),
            ("b.example,*", "a.example:443", true),
            ("", "localhost:443", true),
            ("", "127.0.0.1:443", true),
            ("", "[::1]:443", true),
            ("a.example", "a.example:443", true),
            ("A.Example", "a.example:443", true),
            ("a.example", "b.a.example:443", true),
            ("a.example", "ba.example:443", false),
            (".a.example", "b.a.example:443", true),
            (".a.example", "a.example:443", false),
            ("*.a.example", "b.a.example:443", true),
            ("*.a.example", "a.example:443", false),
            ("b.example, a.example", "a.example:443", true),
            ("b.example a.example", "a.example:443", true),
            (",, ,", "a.example:443", false),
            ("a.example:443", "a.example:443", true),
            ("a.example:6443", "a.example:443", false),
            (".example:443", "a.example:443", true),
            ("10.0.0.1", "10.0.0.1:443", true),
            ("10.0.0.1", "10.0.0.10:443", false),
            ("10.0.0.1:443", "10.0.0.1:443", true),
            ("10.0.0.1:80", "10.0.0.1:443", false),
            ("10.0.0.0/8", "10.1.2.3:443", true),
            ("10.0.0.0/8", "11.1.2.3:443", false),
            ("10.0.0.0/8", "a.example:443", false),
            ("10.0.0.0/33", "10.1.2.3:443", false),
            ("fd00::/8", "[fd00::1]:443", true),
            ("fd00::1", "[fd00::1]:443", true),
            ("[fd00::1]", "[fd00::1]:443", true),
            ("[fd00::1]:443", "[fd00::1]:443", true),
            ("[fd00::1]:80", "[fd00::1]:443", false),
            ("::ffff:10.0.0.1", "10.0.0.1:443", true),
            ("1", "10.0.0.1:443", false),
            (".", "a.example:443", false),
            ("example", "a.example:443", true),
        ] {
            let environment =
                Environment { https_proxy: "http://proxy:3128".into(), no_proxy: no_proxy.into() };
            let proxy = environment.towards(&target.parse().unwrap()).unwrap();
            assert_eq!(proxy.is_none(), exempt, "NO_PROXY={no_proxy} {target}");
        }
    }

    #[test]
    fn addresses_of_proxies_and_their_credentials() {
        for (text, address, authorization) in [
            ("http://proxy.example:3128", "proxy.example:3128", None),
            ("HTTP://proxy.example:3128/", "proxy.example:3128", None),
            ("proxy.example:3128", "proxy.example:3128", None),
            ("http://proxy.example", "proxy.example:80", None),
            ("http://[fd00::1]", "[fd00::1]:80", None),
            ("http://[fd00::1]:3128", "[fd00::1]:3128", None),
            ("http://user:pass@proxy.example:3128", "proxy.example:3128", Some("user:pass")),
            ("http://user@proxy.example:3128", "proxy.example:3128", Some("user:")),
            ("http://us%3Aer:p%40ss:@proxy.example:3128", "proxy.example:3128", Some("us:er:p@ss:")),
            ("user:p@ss@proxy.example:3128", "proxy.example:3128", Some("user:p@ss")),
        ] {
            let proxy: Proxy = text.parse().unwrap();
            assert_eq!(proxy.address.to_string(), address, "{text}");
            let expected = authorization.map(|plain| format!("Basic {}", STANDARD.encode(plain)));
            assert_eq!(proxy.authorization().unwrap().as_deref(), expected.as_ref(), "{text}");
            assert_eq!(format!("{proxy} {proxy:?}"), format!("http://{address} http://{address}"));
        }
        for text in [
            "",
            "http://",
            "https://proxy.example",
            "socks5://user:secret@proxy:1080",
            "http://user:secret@",
            "http://proxy:secret@proxy:99999",
            "http://proxy.example/path",
        ] {
            let error = text.parse::<Proxy>().unwrap_err().to_string();
            assert!(!error.contains("secret"), "{error}");
        }
    }

    #[test]
    fn a_password_in_a_file_is_read_each_time_and_never_shown() {
        let file = std::env::temp_dir().join(format!("proxy-password-{:016x}", rand::random::<u64>()));
        let proxy: Proxy = "http://user@proxy.example:3128".parse().unwrap();
        let proxy = proxy.with_password_file(file.clone()).unwrap();
        let missing = proxy.authorization().unwrap_err().to_string();
        assert!(missing.contains(&file.display().to_string()), "{missing}");
        for password in ["first", "p@ss:word ", "third\n", "fourth\r\n"] {
            secret_file::replace(&file, password.as_bytes()).unwrap();
            let plain = format!("user:{}", password.trim_end_matches(['\r', '\n']));
            let expected = format!("Basic {}", STANDARD.encode(plain));
            assert_eq!(proxy.authorization().unwrap().as_deref(), Some(&expected));
        }
        for bad in ["", "\n", "wonder\nland", "wonderland\u{7f}"] {
            secret_file::replace(&file, bad.as_bytes()).unwrap();
            let error = proxy.authorization().unwrap_err().to_string();
            assert!(error.contains("one line with a password") && !error.contains("wonder"), "{error}");
        }
        secret_file::replace(&file, b"wonderland").unwrap();
        std::fs::set_permissions(&file, std::os::unix::fs::PermissionsExt::from_mode(0o644)).unwrap();
        let error = proxy.authorization().unwrap_err().to_string();
        assert!(error.contains("chmod 600") && !error.contains("wonderland"), "{error}");
        std::fs::remove_file(&file).unwrap();
        assert_eq!(format!("{proxy} {proxy:?}"), "http://proxy.example:3128 http://proxy.example:3128");
        for text in ["http://proxy:3128", "http://user:secret@proxy:3128", "http://user:@proxy:3128"] {
            assert!(text.parse::<Proxy>().unwrap().with_password_file(file.clone()).is_none(), "{text}");
        }
    }

    #[test]
    fn without_variables_there_is_no_proxy_and_a_bad_one_is_an_error() {
        let target: Target = "a.example:443".parse().unwrap();
        assert_eq!(Environment::default().towards(&target), Ok(None));
        let broken = Environment { https_proxy: "ftp://proxy".into(), no_proxy: String::new() };
        assert_eq!(broken.towards(&target), Err(InvalidProxy::Scheme));
        assert_eq!(ProxyChoice::None.towards(&target), Ok(None));
    }
}
