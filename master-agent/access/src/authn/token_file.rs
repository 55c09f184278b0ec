//! The authenticator of static tokens from a file. Each line is `TOKEN,USER,UID,"GROUP1,GROUP2"`, and the groups may be
//! left out.

use std::{
    collections::HashMap,
    path::{Path, PathBuf},
    sync::Arc,
};

use anyhow::{Context, bail};
use futures_util::future::BoxFuture;
use proto_config::secret_file;
use proto_net::file_watcher::FileWatcher;

use super::{
    authenticated::Recognized, authenticator::Authenticator, credential::Presented, csv,
    reason::FailureReason,
};
use crate::{
    moment::Moment,
    secret::{Digest, Secret},
    user::User,
};

/// Users by the digests of their tokens. The tokens themselves are not kept.
type Tokens = HashMap<Digest, Arc<User>>;

pub struct TokenFile(Arc<FileWatcher<Tokens>>);

impl TokenFile {
    /// Reads the file, which its group may read and others may not.
    pub fn load(path: PathBuf) -> anyhow::Result<(Self, Arc<FileWatcher<Tokens>>)> {
        let what = format!("the token file {}", path.display());
        let tokens = FileWatcher::load(what, vec![path.clone()], move || read(&path))?;
        Ok((Self(tokens.clone()), tokens))
    }
}

impl Authenticator for TokenFile {
    fn authenticate<'a>(
        &'a self,
        presented: &'a Presented<'a>,
        _: Moment,
    ) -> BoxFuture<'a, Result<Option<Recognized>, FailureReason>> {
        let user = presented.bearer.as_ref().and_then(|token| self.0.get().get(&Digest::of(token)).cloned());
        Box::pin(std::future::ready(Ok(user.map(Recognized::from))))
    }
}

fn read(path: &Path) -> anyhow::Result<Tokens> {
    let text = secret_file::read_given(path)?;
    parse(&text).with_context(|| path.display().to_string())
}

/// Parses a file of tokens. An error names the line and contains nothing of its text.
fn parse(text: &str) -> anyhow::Result<Tokens> {
    let mut tokens = HashMap::new();
    let mut lines = HashMap::new();
    for (line, fields) in csv::records(text).map_err(anyhow::Error::msg)? {
        let mut fields = fields.into_iter();
        let (Some(token), Some(name), Some(uid)) = (fields.next(), fields.next(), fields.next()) else {
            bail!("line {line} lacks one of the columns token, user, uid");
        };
        let groups = fields.next().unwrap_or_default();
        if fields.next().is_some() {
            bail!("line {line} has more than 4 columns: put several groups in one pair of quotes");
        }
        if token.is_empty() || name.is_empty() {
            bail!("line {line} has no {}", if token.is_empty() { "token" } else { "user" });
        }
        let groups = groups.split(',').filter(|group| !group.is_empty()).map(str::to_owned).collect();
        let uid = Some(uid).filter(|uid| !uid.is_empty());
        let digest = Digest::of(&Secret::new(token));
        if let Some(first) = lines.insert(digest, line) {
            bail!("line {line} has the same token as line {first}");
        }
        tokens.insert(digest, Arc::new(User { name, uid, groups, ..User::default() }));
    }
    Ok(tokens)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_mistake_is_named_by_its_line_and_the_token_never() {
        for (text, error) in [
            ("s3cr3t,u", "line 1 lacks one of the columns token, user, uid"),
            ("s3cr3t,u,1\n\ns3cr3t,v,2", "line 3 has the same token as line 1"),
            (",u,1", "line 1 has no token"),
            ("s3cr3t,,1", "line 1 has no user"),
            ("s3cr3t,u,1,a,b", "line 1 has more than 4 columns: put several groups in one pair of quotes"),
            ("s3cr3t,\"u,1", "line 1: a quote is not closed"),
        ] {
            let shown = format!("{:#}", parse(text).err().unwrap());
            assert_eq!(shown, error);
            assert!(!shown.contains("s3cr3t"));
        }
    }
}
