//! Starts a master-agent with its front end before a stub kube-apiserver, and makes callers with every kind of
//! credential.

use std::{
    net::SocketAddr,
    path::{Path, PathBuf},
    sync::Arc,
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use anyhow::Context;
use bytes::Bytes;
use http_body_util::{BodyExt, Full};
use hyper::{
    HeaderMap, Request, Response, StatusCode,
    body::Incoming,
    client::conn::{http1, http2},
    header,
};
use hyper_util::rt::{TokioExecutor, TokioIo};
use jsonwebtoken::{Algorithm, EncodingKey, Header};
use rustls::{ClientConfig, pki_types::ServerName};
use serde_json::{Value, json};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt, BufReader},
    net::{TcpSocket, TcpStream},
};
use tokio_rustls::TlsConnector;

use crate::{
    client::Stream,
    cluster::{Cluster, Kind, Options, SOON},
    pki::{Authority, client_config},
    process::{TempDir, eventually, free_port},
    upstream::{HEALTH, Identity, PROXY_NAME, Upstream},
};

/// In `tokens.csv`.
pub const TOKEN: &str = "static-token-of-sam";
/// In `tokens.csv`, of one who does whatever can be done.
pub const GREEDY: &str = "static-token-of-the-greedy";
pub const BOOTSTRAP: &str = "abcdef.0123456789abcdef";
pub const ISSUER: &str = "https://kubernetes.default.svc";

/// The credentials of callers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Credential {
    Certificate,
    Token,
    ServiceAccount,
    Bootstrap,
    None,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Http {
    V1,
    V2,
}

impl Credential {
    pub const ALL: [Self; 4] = [Self::Certificate, Self::Token, Self::ServiceAccount, Self::Bootstrap];

    /// The identity that kube-apiserver must be told.
    pub fn identity(self) -> Identity {
        let identity = |user: &str, uid: Option<&str>, groups: &[&str], extra: &[(&str, &str)]| Identity {
            user: user.to_owned(),
            uid: uid.map(str::to_owned),
            groups: groups.iter().chain(&["system:authenticated"]).map(|group| (*group).to_owned()).collect(),
            extra: extra.iter().map(|(k, v)| ((*k).to_owned(), (*v).to_owned())).collect(),
        };
        match self {
            Self::Certificate => identity("jane", None, &["dev", "a,b"], &[]),
            Self::Token => identity("sam", Some("uid-7"), &["group1", "group2"], &[]),
            Self::ServiceAccount => identity(
                "system:serviceaccount:default:builder",
                Some("sa-uid"),
                &["system:serviceaccounts", "system:serviceaccounts:default"],
                &[
                    ("authentication.kubernetes.io%2fcredential-id", "JTI=token-1"),
                    ("authentication.kubernetes.io%2fpod-name", "pod-1"),
                    ("authentication.kubernetes.io%2fpod-uid", "pod-uid"),
                ],
            ),
            Self::Bootstrap => identity(
                "system:bootstrap:abcdef",
                None,
                &["system:bootstrappers", "system:bootstrappers:workers"],
                &[],
            ),
            Self::None => panic!("nobody has no identity"),
        }
    }
}

/// Describes a front end.
#[derive(Clone, Debug, Default)]
pub struct Setup {
    /// Lines of the section `limits`, which else lets tests do what they want.
    pub limits: Option<String>,
    /// More servers beside the stub.
    pub more_servers: Vec<String>,
    /// HTTP/2 to the stub.
    pub http2: bool,
    /// More of the section `audit`, such as `, queue: 1`.
    pub audit: &'static str,
    /// Further fields of the section `upstream`, each behind a comma.
    pub upstream: &'static str,
    /// Further lines of the section `front_end`.
    pub lines: String,
    /// No authentication section at all.
    pub unconfigured: bool,
    /// The rest of the master's configuration.
    pub master_config: String,
    /// Nodes whose local endpoints lead here, each with an address of its own for that.
    pub nodes: Vec<(String, Kind)>,
    /// Ports that their policies allow on their own addresses.
    pub ports: Vec<u16>,
    /// The rest of the cluster's description.
    pub cluster: Options,
}

const LIMITS: &str = "{head_timeout: 3s, body_timeout: 3s, failures_per_second_per_address: 1000000, \
    requests_per_second_per_user: 1000000, requests_per_second_per_address: 1000000}";

/// A cluster role with one rule, bound to subjects, as files of `rbac` have it.
pub fn role(name: &str, rule: &str, subjects: &[&str]) -> String {
    let group = "rbac.authorization.k8s.io";
    let subjects: String = subjects.iter().map(|subject| format!("- {{{subject}}}\n")).collect();
    format!(
        "---\napiVersion: {group}/v1\nkind: ClusterRole\nmetadata: {{name: {name}}}\nrules:\n- {{{rule}}}\n\
         ---\napiVersion: {group}/v1\nkind: ClusterRoleBinding\nmetadata: {{name: {name}}}\n\
         roleRef: {{apiGroup: {group}, kind: ClusterRole, name: {name}}}\nsubjects:\n{subjects}"
    )
}

/// A subject of [`role`].
pub const JANE: &str = "apiGroup: rbac.authorization.k8s.io, kind: User, name: jane";
pub const SAM: &str = "apiGroup: rbac.authorization.k8s.io, kind: User, name: sam";

fn roles() -> String {
    let page = "nonResourceURLs: [/agent/page, /agent/page/*], verbs: [get]";
    role("impersonator", "apiGroups: [''], resources: [users, groups], verbs: [impersonate]", &[JANE])
        + &role("page", page, &[JANE, SAM])
        + &role("explain", "nonResourceURLs: [/agent/page/explain], verbs: [post]", &[JANE])
}

/// The running front end.
pub struct FrontEnd {
    pub dir: TempDir,
    pub upstream: Upstream,
    pub address: SocketAddr,
    pub cluster: Cluster,
    /// The authorities of its own certificates, and of its callers'.
    pub servers: Authority,
    pub clients: Authority,
    service_accounts: rcgen::KeyPair,
}

impl FrontEnd {
    pub async fn start(setup: Setup) -> anyhow::Result<Self> {
        let upstream = Upstream::start().await?;
        let dir = TempDir::new("front-end")?;
        let path = dir.path();
        let servers = Authority::new("front end CA")?;
        std::fs::write(path.join("ca.crt"), servers.pem())?;
        servers.server(path, "front-end", &["localhost", "127.0.0.1"])?;
        servers.server(path, "other", &["other.example"])?;
        let clients = Authority::new("clients CA")?;
        std::fs::write(path.join("clients-ca.crt"), clients.pem())?;
        clients.client_in(path, "jane", "jane", ["dev", "a,b"])?;
        let service_accounts = rcgen::KeyPair::generate()?;
        std::fs::write(path.join("sa.pub"), service_accounts.public_key_pem())?;
        write_secret(
            &path.join("tokens.csv"),
            &format!("{TOKEN},sam,uid-7,\"group1,group2\"\n{GREEDY},greedy,uid-8\n"),
        )?;
        write_secret(
            &path.join("bootstrap.csv"),
            &format!("{BOOTSTRAP},,\"system:bootstrappers:workers\"\n"),
        )?;
        std::fs::write(path.join("rbac.yaml"), roles())?;
        for (from, to) in [
            ("ca.crt", "apiserver-ca.crt"),
            (&format!("{PROXY_NAME}.crt"), "front-proxy.crt"),
            (&format!("{PROXY_NAME}.key"), "front-proxy.key"),
        ] {
            std::fs::copy(upstream.file(from), path.join(to))?;
        }
        let address = SocketAddr::from(([127, 0, 0, 1], free_port()));
        let config = configuration(path, address, &upstream, &setup);
        let https = format!("{{ca: {}, cert: client.crt, key: client.key}}", path.join("ca.crt").display());
        let cluster = Cluster::start(Options {
            master_config: format!("{config}{}", setup.master_config),
            local_endpoints: (0..setup.nodes.len())
                .map(|i| SocketAddr::from(([127, 0, 0, i as u8 + 1], free_port())))
                .collect(),
            nodes: setup.nodes,
            ports: setup.ports,
            front_end_at: Some(address),
            https: Some(https),
            ..setup.cluster
        })
        .await?;
        Ok(Self { dir, upstream, address, cluster, servers, clients, service_accounts })
    }

    pub fn path(&self) -> &Path {
        self.dir.path()
    }

    pub fn file(&self, name: &str) -> PathBuf {
        self.path().join(name)
    }

    pub fn url(&self) -> String {
        format!("https://{}", self.address)
    }

    /// The audit record of the first request for a path that begins so, once there is one.
    pub async fn audited(&self, path: &str) -> Value {
        eventually("the audit record", SOON, async || {
            let text = std::fs::read_to_string(self.file("audit.log")).unwrap_or_default();
            let mut lines = text.lines().filter_map(|line| serde_json::from_str::<Value>(line).ok());
            lines.find(|line| line["path"].as_str().is_some_and(|found| found.starts_with(path)))
        })
        .await
    }

    pub fn log(&self) -> String {
        self.cluster.master.log_text()
    }

    /// Replaces a file as a whole.
    pub fn replace(&self, name: &str, text: &str) -> anyhow::Result<()> {
        write_secret(&self.file(name), text)
    }

    /// A token of the service account `builder`, with some claims replaced.
    pub fn service_account_token(&self, claims: &[(&str, Value)]) -> anyhow::Result<String> {
        self.service_account_token_by(&self.service_accounts, claims)
    }

    /// The same, signed by another key.
    pub fn service_account_token_by(
        &self,
        key: &rcgen::KeyPair,
        claims: &[(&str, Value)],
    ) -> anyhow::Result<String> {
        let now = SystemTime::now().duration_since(UNIX_EPOCH)?.as_secs();
        let mut all = json!({
            "iss": ISSUER,
            "aud": [ISSUER],
            "sub": "system:serviceaccount:default:builder",
            "iat": now - 1,
            "nbf": now - 1,
            "exp": now + 3600,
            "jti": "token-1",
            "kubernetes.io": {
                "namespace": "default",
                "serviceaccount": {"name": "builder", "uid": "sa-uid"},
                "pod": {"name": "pod-1", "uid": "pod-uid"},
            },
        });
        for (name, value) in claims {
            all[name] = value.clone();
        }
        let key = EncodingKey::from_ec_pem(key.serialize_pem().as_bytes())?;
        Ok(jsonwebtoken::encode(&Header::new(Algorithm::ES256), &all, &key)?)
    }

    /// The bearer token of a credential, if it has one.
    pub fn bearer(&self, credential: Credential) -> Option<String> {
        match credential {
            Credential::Token => Some(TOKEN.to_owned()),
            Credential::Bootstrap => Some(BOOTSTRAP.to_owned()),
            Credential::ServiceAccount => Some(self.service_account_token(&[]).expect("a token is signed")),
            Credential::Certificate | Credential::None => None,
        }
    }

    pub fn tls(&self, credential: Credential, http: Http) -> anyhow::Result<Arc<ClientConfig>> {
        let identity = (credential == Credential::Certificate).then(|| (self.path(), "jane"));
        let mut config = ClientConfig::clone(&*client_config(&self.file("ca.crt"), identity)?);
        config.alpn_protocols = match http {
            Http::V1 => vec![b"http/1.1".to_vec()],
            Http::V2 => vec![b"h2".to_vec()],
        };
        Ok(Arc::new(config))
    }

    /// A TLS connection, with the certificate if that is the credential.
    pub async fn connect(&self, credential: Credential, http: Http) -> anyhow::Result<Stream> {
        self.connect_from([127, 0, 0, 1], credential, http).await
    }

    /// The same from another address of loopback.
    pub async fn connect_from(
        &self,
        source: [u8; 4],
        credential: Credential,
        http: Http,
    ) -> anyhow::Result<Stream> {
        self.connect_with(source, self.tls(credential, http)?, http).await
    }

    /// The same with a configuration that is there already, for those who come often.
    pub async fn connect_with(
        &self,
        source: [u8; 4],
        config: Arc<ClientConfig>,
        http: Http,
    ) -> anyhow::Result<Stream> {
        let socket = TcpSocket::new_v4()?;
        socket.bind((source, 0).into())?;
        let socket = socket.connect(self.address).await?;
        socket.set_nodelay(true)?;
        let tls = TlsConnector::from(config).connect(ServerName::try_from("localhost")?, socket).await?;
        let wanted: &[u8] = if http == Http::V2 { b"h2" } else { b"http/1.1" };
        anyhow::ensure!(tls.get_ref().1.alpn_protocol() == Some(wanted), "no {http:?} was agreed on");
        Ok(Box::new(BufReader::new(tls)))
    }

    /// The certificate that is shown for a name.
    pub async fn served_certificate(&self, name: &'static str) -> anyhow::Result<Vec<u8>> {
        let socket = TcpStream::connect(self.address).await?;
        let connector = TlsConnector::from(self.tls(Credential::None, Http::V1)?);
        let tls = connector.connect(ServerName::try_from(name)?, socket).await?;
        let chain = tls.get_ref().1.peer_certificates().context("no certificate")?;
        Ok(chain.first().context("no certificate")?.to_vec())
    }

    pub async fn caller(&self, credential: Credential, http: Http) -> anyhow::Result<Caller> {
        self.caller_with(credential, self.bearer(credential), http).await
    }

    /// A caller with another token than the credential's own.
    pub async fn caller_with(
        &self,
        credential: Credential,
        bearer: Option<String>,
        http: Http,
    ) -> anyhow::Result<Caller> {
        let stream = self.connect(credential, http).await?;
        self.caller_on(stream, bearer, http).await
    }

    pub async fn caller_on(
        &self,
        stream: Stream,
        bearer: Option<String>,
        http: Http,
    ) -> anyhow::Result<Caller> {
        let socket = TokioIo::new(stream);
        let sender = match http {
            Http::V1 => {
                let (sender, connection) = http1::handshake(socket).await?;
                tokio::spawn(connection.with_upgrades());
                Sender::V1(sender)
            }
            Http::V2 => {
                let (sender, connection) = http2::handshake(TokioExecutor::new(), socket).await?;
                tokio::spawn(connection);
                Sender::V2(sender)
            }
        };
        Ok(Caller { sender, bearer, authority: self.address.to_string() })
    }

    /// Writes a kubeconfig for a caller.
    pub fn write_kubeconfig(&self, path: &Path, credential: Credential) -> anyhow::Result<()> {
        let user = match self.bearer(credential) {
            Some(token) => json!({ "token": token }),
            None => json!({
                "client-certificate": self.file("jane.crt"),
                "client-key": self.file("jane.key"),
            }),
        };
        let config = json!({
            "apiVersion": "v1",
            "kind": "Config",
            "clusters": [{
                "name": "stub",
                "cluster": {"server": self.url(), "certificate-authority": self.file("ca.crt")},
            }],
            "users": [{"name": "tester", "user": user}],
            "contexts": [{"name": "stub", "context": {"cluster": "stub", "user": "tester"}}],
            "current-context": "stub",
        });
        write_secret(path, &config.to_string())
    }
}

fn write_secret(path: &Path, text: &str) -> anyhow::Result<()> {
    proto_config::secret_file::replace(path, text.as_bytes()).with_context(|| path.display().to_string())
}

fn configuration(path: &Path, address: SocketAddr, upstream: &Upstream, setup: &Setup) -> String {
    let file = |name: &str| path.join(name).display().to_string();
    let mut servers = vec![upstream.url()];
    servers.extend(setup.more_servers.iter().cloned());
    let mut yaml = format!(
        "front_end:\n  listen: '{address}'\n  certificates: [{{cert: {}, key: {}}}, {{cert: {}, key: {}}}]\n",
        file("front-end.crt"),
        file("front-end.key"),
        file("other.crt"),
        file("other.key"),
    );
    if !setup.unconfigured {
        yaml += &format!(
            "  authentication:\n  - x509: {{ca: {}}}\n  - token_file: {}\n  - service_account: {{issuers: ['{ISSUER}'], \
             audiences: ['{ISSUER}'], key_files: [{}]}}\n  - bootstrap_tokens: {{file: {}}}\n  authorization:\n  - \
             rbac: {{files: [{}]}}\n",
            file("clients-ca.crt"),
            file("tokens.csv"),
            file("sa.pub"),
            file("bootstrap.csv"),
            file("rbac.yaml"),
        );
        if setup.nodes.iter().any(|(_, kind)| *kind == Kind::CallHomeHttps) {
            yaml += "  - node: {}\n";
        }
        yaml += &format!("  limits: {}\n", setup.limits.as_deref().unwrap_or(LIMITS));
    }
    yaml += &format!(
        "  upstream: {{servers: [{}], ca: {}, cert: {}, key: {}, http2: {}, health_path: {HEALTH}, \
         health_interval: 1s{}}}\n",
        servers.iter().map(|server| format!("'{server}'")).collect::<Vec<_>>().join(", "),
        file("apiserver-ca.crt"),
        file("front-proxy.crt"),
        file("front-proxy.key"),
        setup.http2,
        setup.upstream,
    );
    yaml += &format!("  audit: {{file: {}{}}}\n", file("audit.log"), setup.audit);
    yaml += &setup.lines;
    yaml
}

enum Sender {
    V1(http1::SendRequest<Full<Bytes>>),
    V2(http2::SendRequest<Full<Bytes>>),
}

/// Somebody with a connection to the front end.
pub struct Caller {
    sender: Sender,
    bearer: Option<String>,
    authority: String,
}

/// An answer that was read to its end.
#[derive(Clone, Debug)]
pub struct Answer {
    pub status: StatusCode,
    pub headers: HeaderMap,
    pub body: Bytes,
}

impl Answer {
    pub fn json(&self) -> Value {
        serde_json::from_slice(&self.body).unwrap_or(Value::Null)
    }
}

impl Caller {
    /// Sends a request for a path; gives the answer once its head has come.
    pub async fn send(&mut self, mut request: Request<Full<Bytes>>) -> anyhow::Result<Response<Incoming>> {
        if let Some(bearer) = &self.bearer {
            let value = format!("Bearer {bearer}").parse()?;
            request.headers_mut().entry(header::AUTHORIZATION).or_insert(value);
        }
        Ok(match &mut self.sender {
            Sender::V1(sender) => {
                request.headers_mut().insert(header::HOST, self.authority.parse()?);
                sender.ready().await?;
                sender.send_request(request).await?
            }
            Sender::V2(sender) => {
                let target = request.uri().path_and_query().map_or("/", |target| target.as_str());
                *request.uri_mut() = format!("https://{}{target}", self.authority).parse()?;
                sender.ready().await?;
                sender.send_request(request).await?
            }
        })
    }

    pub async fn ask(&mut self, request: Request<Full<Bytes>>) -> anyhow::Result<Answer> {
        let (head, body) = self.send(request).await?.into_parts();
        Ok(Answer { status: head.status, headers: head.headers, body: body.collect().await?.to_bytes() })
    }

    pub async fn get(&mut self, target: &str) -> anyhow::Result<Answer> {
        self.ask(Request::get(target).body(Full::default())?).await
    }
}

/// A response over HTTP/1.1, as it was read off a stream.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Heard {
    pub status: u16,
    /// Names in lower case.
    pub headers: Vec<(String, String)>,
    pub body: Vec<u8>,
}

impl Heard {
    pub fn header(&self, name: &str) -> Option<&str> {
        self.headers.iter().find(|(n, _)| n == name).map(|(_, value)| value.as_str())
    }
}

/// Reads one response; `None` where the stream ends before it.
pub async fn hear(stream: &mut Stream) -> anyhow::Result<Option<Heard>> {
    let mut head = Vec::new();
    while !head.ends_with(b"\r\n\r\n") {
        match stream.read_u8().await {
            Ok(byte) => head.push(byte),
            Err(_) if head.is_empty() => return Ok(None),
            Err(error) => return Err(error).context(String::from_utf8_lossy(&head).into_owned()),
        }
        anyhow::ensure!(head.len() < 64 * 1024, "an endless head");
    }
    let head = String::from_utf8(head)?;
    let mut lines = head.split("\r\n");
    let line = lines.next().unwrap_or_default();
    let status = line.strip_prefix("HTTP/1.1 ").or_else(|| line.strip_prefix("HTTP/1.0 "));
    let status = status.and_then(|rest| rest.get(..3)).with_context(|| line.to_owned())?;
    let mut heard = Heard { status: status.parse()?, ..Heard::default() };
    for line in lines.filter(|line| !line.is_empty()) {
        let (name, value) = line.split_once(':').with_context(|| line.to_owned())?;
        heard.headers.push((name.to_ascii_lowercase(), value.trim().to_owned()));
    }
    let bodiless = heard.status < 200 || heard.status == 204 || heard.status == 304;
    if let Some(length) = heard.header("content-length").filter(|_| !bodiless) {
        heard.body = vec![0; length.parse()?];
        stream.read_exact(&mut heard.body).await?;
    } else if heard.header("transfer-encoding").is_some() {
        loop {
            let mut line = Vec::new();
            while !line.ends_with(b"\r\n") {
                line.push(stream.read_u8().await?);
            }
            let size = usize::from_str_radix(std::str::from_utf8(&line)?.trim(), 16)?;
            let mut chunk = vec![0; size + 2];
            stream.read_exact(&mut chunk).await?;
            chunk.truncate(size);
            heard.body.extend(chunk);
            if size == 0 {
                break;
            }
        }
    }
    Ok(Some(heard))
}

/// Writes `bytes` and reads responses until the server ends the connection. An upgraded one is ended from this side,
/// and what comes then is the body of the 101.
pub async fn exchange(stream: &mut Stream, bytes: &[u8]) -> anyhow::Result<Vec<Heard>> {
    // A server that has refused the beginning need not read the rest.
    let _ = stream.write_all(bytes).await;
    let _ = stream.flush().await;
    let mut all = Vec::new();
    while let Some(mut heard) = hear(stream).await? {
        if heard.status == 101 {
            let _ = stream.shutdown().await;
            let _ = stream.read_to_end(&mut heard.body).await;
            all.push(heard);
            break;
        }
        all.push(heard);
    }
    Ok(all)
}

/// A replaced file takes effect within this time.
pub const RELOADED: Duration = Duration::from_secs(2);
