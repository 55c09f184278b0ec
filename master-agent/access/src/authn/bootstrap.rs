//! Bootstrap tokens, with which machines join a cluster. A token is `ID.SECRET`, from a file or from the cluster's
//! Secrets.
//!
//! Each line of a file is `TOKEN,EXPIRATION,"GROUP1,GROUP2"`. The expiration (RFC 3339) may be empty, and the groups
//! may be left out.

use std::{
    collections::HashMap,
    path::{Path, PathBuf},
    sync::Arc,
    time::{Duration, SystemTime},
};

use anyhow::{Context, bail, ensure};
use futures_util::future::BoxFuture;
use k8s_openapi::{api::core::v1, jiff::Timestamp};
use proto_config::secret_file;
use proto_net::file_watcher::FileWatcher;
use tokio::sync::Semaphore;
use zeroize::Zeroizing;

use super::{
    authenticated::Recognized, authenticator::Authenticator, cluster::ApiServer, credential::Presented, csv,
    reason::FailureReason,
};
use crate::{cache::Cache, moment::Moment, secret::Secret, user::User};

const GROUP: &str = "system:bootstrappers";
const SECRET_TYPE: &str = "bootstrap.kubernetes.io/token";

/// A bootstrap token as its source describes it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BootstrapToken {
    pub secret: Secret,
    /// `None` means that the token never expires.
    pub expiration: Option<SystemTime>,
    /// Groups besides `system:bootstrappers`.
    pub extra_groups: Vec<String>,
}

/// A source of bootstrap tokens.
pub trait BootstrapTokens: Send + Sync {
    /// Returns the token with this ID. `None` means that there is none, and an error that it can't be used.
    fn get<'a>(
        &'a self,
        id: &'a str,
        presented: &'a Presented<'a>,
        now: Moment,
    ) -> BoxFuture<'a, Result<Option<BootstrapToken>, FailureReason>>;
}

pub struct Bootstrap(Vec<Box<dyn BootstrapTokens>>);

impl Bootstrap {
    pub fn new(sources: Vec<Box<dyn BootstrapTokens>>) -> Self {
        Self(sources)
    }

    async fn check(
        &self,
        presented: &Presented<'_>,
        now: Moment,
    ) -> Result<Option<Recognized>, FailureReason> {
        let Some((id, secret)) = presented.bearer.as_ref().and_then(|token| split(token.expose())) else {
            return Ok(None);
        };
        let mut outcome = FailureReason::UnknownBootstrapToken;
        for source in &self.0 {
            match source.get(id, presented, now).await {
                Ok(Some(token)) => return token.check(id, &Secret::new(secret), now).map(Some),
                Ok(None) => {}
                Err(reason) => outcome = reason,
            }
        }
        Err(outcome)
    }
}

impl Authenticator for Bootstrap {
    fn authenticate<'a>(
        &'a self,
        presented: &'a Presented<'a>,
        now: Moment,
    ) -> BoxFuture<'a, Result<Option<Recognized>, FailureReason>> {
        Box::pin(self.check(presented, now))
    }
}

/// Splits a token of the form `[a-z0-9]{6}\.[a-z0-9]{16}` into its ID and its secret.
fn split(token: &str) -> Option<(&str, &str)> {
    let (id, secret) = token.split_once('.')?;
    let form = |text: &str| text.bytes().all(|b| b.is_ascii_lowercase() || b.is_ascii_digit());
    (id.len() == 6 && secret.len() == 16 && form(id) && form(secret)).then_some((id, secret))
}

impl BootstrapToken {
    fn check(self, id: &str, secret: &Secret, now: Moment) -> Result<Recognized, FailureReason> {
        if self.secret != *secret {
            return Err(FailureReason::WrongSecret);
        }
        if self.expiration.is_some_and(|end| now.wall >= end) {
            return Err(FailureReason::Expired);
        }
        let name = format!("system:bootstrap:{id}");
        let groups = [vec![GROUP.to_owned()], self.extra_groups].concat();
        let user = User { name, groups, ..User::default() };
        Ok(Recognized { user: user.into(), expires: self.expiration, bound: None })
    }

    /// Reads the Secret `kube-system/bootstrap-token-ID`.
    pub fn from_secret(id: &str, secret: &v1::Secret) -> Result<Self, FailureReason> {
        if secret.metadata.deletion_timestamp.is_some() {
            return Err(FailureReason::BootstrapToken("its Secret is being deleted"));
        }
        if secret.type_.as_deref() != Some(SECRET_TYPE) {
            return Err(FailureReason::BootstrapToken("its Secret is of another type"));
        }
        let field = |name: &str| -> Result<Option<&str>, FailureReason> {
            let Some(value) = secret.data.as_ref().and_then(|data| data.get(name)) else { return Ok(None) };
            let text = std::str::from_utf8(&value.0);
            text.map(Some).map_err(|_| FailureReason::BootstrapToken("a field of its Secret is not text"))
        };
        if field("token-id")? != Some(id) {
            return Err(FailureReason::BootstrapToken("its Secret has another token-id"));
        }
        let token = field("token-secret")?.filter(|secret| !secret.is_empty());
        let token = token.ok_or(FailureReason::BootstrapToken("its Secret has no token-secret"))?;
        if field("usage-bootstrap-authentication")? != Some("true") {
            return Err(FailureReason::NotForAuthentication);
        }
        let expiration = match field("expiration")? {
            None => None,
            Some(text) => {
                Some(time(text).ok_or(FailureReason::BootstrapToken("its expiration is not RFC 3339"))?)
            }
        };
        let groups = field("auth-extra-groups")?.unwrap_or_default();
        let extra_groups = extra_groups(groups)
            .ok_or(FailureReason::BootstrapToken("its groups don't begin with system:bootstrappers:"))?;
        Ok(Self { secret: Secret::new(token), expiration, extra_groups })
    }
}

/// Reads a time after 1970 as RFC 3339 writes it.
fn time(text: &str) -> Option<SystemTime> {
    let form = text.is_ascii() && text.as_bytes().get(10) == Some(&b'T') && !text.contains('[');
    let time: Timestamp = form.then_some(text)?.parse().ok()?;
    SystemTime::UNIX_EPOCH.checked_add(Duration::from_secs(u64::try_from(time.as_second()).ok()?))
}

fn extra_groups(text: &str) -> Option<Vec<String>> {
    let group = |group: &str| {
        let name = group.strip_prefix("system:bootstrappers:")?;
        let character = |b: u8| b.is_ascii_lowercase() || b.is_ascii_digit() || matches!(b, b':' | b'-');
        let ends = name.ends_with(|c: char| c.is_ascii_lowercase() || c.is_ascii_digit());
        (ends && name.len() <= 256 && name.bytes().all(character)).then(|| group.to_owned())
    };
    text.split(',').filter(|one| !one.is_empty()).map(group).collect()
}

/// Tokens by their IDs.
type Tokens = HashMap<String, BootstrapToken>;

/// The tokens of a file.
pub struct FileTokens(Arc<FileWatcher<Tokens>>);

impl FileTokens {
    /// Reads the file, which its group may read and others may not.
    pub fn load(path: PathBuf) -> anyhow::Result<(Self, Arc<FileWatcher<Tokens>>)> {
        let what = format!("the bootstrap tokens of {}", path.display());
        let tokens = FileWatcher::load(what, vec![path.clone()], move || read(&path))?;
        Ok((Self(tokens.clone()), tokens))
    }
}

impl BootstrapTokens for FileTokens {
    fn get<'a>(
        &'a self,
        id: &'a str,
        _: &'a Presented<'a>,
        _: Moment,
    ) -> BoxFuture<'a, Result<Option<BootstrapToken>, FailureReason>> {
        Box::pin(std::future::ready(Ok(self.0.get().get(id).cloned())))
    }
}

fn read(path: &Path) -> anyhow::Result<Tokens> {
    let text = secret_file::read_given(path)?;
    parse(&text).with_context(|| path.display().to_string())
}

/// Parses a file of tokens. An error names the line and contains nothing of its text.
fn parse(text: &str) -> anyhow::Result<Tokens> {
    let mut tokens = HashMap::new();
    for (line, fields) in csv::records(text).map_err(anyhow::Error::msg)? {
        let mut fields = fields.into_iter();
        let token = Zeroizing::new(fields.next().unwrap_or_default());
        let Some((id, secret)) = split(&token) else {
            bail!("line {line} has no token of the form [a-z0-9]{{6}}.[a-z0-9]{{16}}");
        };
        let expiration = match fields.next().filter(|text| !text.is_empty()) {
            None => None,
            Some(text) => {
                Some(time(&text).with_context(|| format!("line {line}: the expiration is not RFC 3339"))?)
            }
        };
        let extra_groups = extra_groups(&fields.next().unwrap_or_default())
            .with_context(|| format!("line {line}: groups must begin with system:bootstrappers:"))?;
        ensure!(
            fields.next().is_none(),
            "line {line} has more than 3 columns: put several groups in one pair of quotes"
        );
        let token = BootstrapToken { secret: Secret::new(secret), expiration, extra_groups };
        ensure!(tokens.insert(id.to_owned(), token).is_none(), "line {line} has the ID of a line before");
    }
    Ok(tokens)
}

/// The tokens of a cluster. The answers of its API server are cached for a short time, even if there is no such token.
pub struct ClusterTokens {
    api_server: Arc<dyn ApiServer>,
    questions: Semaphore,
    known: Cache<[u8; 6], Result<BootstrapToken, FailureReason>>,
    /// A cache of its own, so that guesses do not evict known tokens.
    unknown: Cache<[u8; 6], ()>,
}

const REMEMBERED: Duration = Duration::from_secs(10);
const MAX_REMEMBERED: usize = 1000;
const MAX_QUESTIONS: usize = 8;
const TIMEOUT: Duration = Duration::from_secs(5);

impl ClusterTokens {
    pub fn new(api_server: Arc<dyn ApiServer>) -> Self {
        Self {
            api_server,
            questions: Semaphore::new(MAX_QUESTIONS),
            known: Cache::new(MAX_REMEMBERED),
            unknown: Cache::new(MAX_REMEMBERED),
        }
    }

    async fn find(
        &self,
        id: &str,
        presented: &Presented<'_>,
        now: Moment,
    ) -> Result<Option<BootstrapToken>, FailureReason> {
        let Ok(key) = <[u8; 6]>::try_from(id.as_bytes()) else { return Ok(None) };
        if let Some(known) = self.known.get(&key, now.monotonic) {
            return known.map(Some);
        }
        if self.unknown.get(&key, now.monotonic).is_some() {
            return Ok(None);
        }
        presented.cost.incur()?;
        let ask = async {
            let _permit = self.questions.acquire().await.map_err(|_| unavailable("it is closed"))?;
            let secret = self.api_server.system_secret(&format!("bootstrap-token-{id}")).await;
            secret.map_err(|error| unavailable(&error.to_string()))
        };
        let answer = tokio::time::timeout(TIMEOUT, ask).await;
        match answer.unwrap_or_else(|_| Err(unavailable("it did not answer in time")))? {
            Some(secret) => {
                let token = BootstrapToken::from_secret(id, &secret);
                self.known.put(key, token.clone(), REMEMBERED, now.monotonic);
                token.map(Some)
            }
            None => {
                self.unknown.put(key, (), REMEMBERED, now.monotonic);
                Ok(None)
            }
        }
    }
}

fn unavailable(error: &str) -> FailureReason {
    FailureReason::Unavailable(format!("the API server, for a bootstrap token: {error}"))
}

impl BootstrapTokens for ClusterTokens {
    fn get<'a>(
        &'a self,
        id: &'a str,
        presented: &'a Presented<'a>,
        now: Moment,
    ) -> BoxFuture<'a, Result<Option<BootstrapToken>, FailureReason>> {
        Box::pin(self.find(id, presented, now))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_mistake_is_named_by_its_line_and_the_token_never() {
        for (text, error) in [
            ("abcdef.0123456789abcde", "line 1 has no token of the form [a-z0-9]{6}.[a-z0-9]{16}"),
            ("ABCDEF.0123456789abcdef", "line 1 has no token of the form [a-z0-9]{6}.[a-z0-9]{16}"),
            ("abcdef.0123456789abcdef,tomorrow", "line 1: the expiration is not RFC 3339"),
            (
                "abcdef.0123456789abcdef,,system:masters",
                "line 1: groups must begin with system:bootstrappers:",
            ),
            ("abcdef.0123456789abcdef\nabcdef.0123456789abcdee", "line 2 has the ID of a line before"),
        ] {
            let shown = format!("{:#}", parse(text).err().unwrap());
            assert_eq!(shown, error);
            assert!(!shown.contains("0123"));
        }
    }

    #[test]
    fn times_are_rfc_3339() {
        let at = |seconds| Some(SystemTime::UNIX_EPOCH + Duration::from_secs(seconds));
        assert_eq!(time("2001-09-09T01:46:40Z"), at(1_000_000_000));
        assert_eq!(time("2001-09-09T03:46:40+02:00"), at(1_000_000_000));
        for text in ["", "2001-09-09", "2001-09-09 01:46:40Z", "2001-09-09T01:46:40", "1000000000"] {
            assert_eq!(time(text), None, "{text}");
        }
    }
}
