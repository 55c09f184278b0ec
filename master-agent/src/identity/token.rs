//! Join tokens, and the decision whether a host may join.

use std::{
    net::IpAddr,
    sync::{Mutex, PoisonError},
    time::{Duration, SystemTime},
};

use anyhow::bail;
use proto::{
    NodeName,
    join::{JoinRequest, JoinResponse, JoinToken},
};
use russh::keys::PublicKey;

use super::{
    authorities::Authorities,
    host_key::fingerprint,
    store::{Grant, Store, TokenError, TokenRecord},
};

/// The longest that a token can be valid.
const MAX_TTL: Duration = Duration::from_secs(30 * 24 * 3600);
/// The most addresses that a host may ask for.
const MAX_ADDRESSES: usize = 32;
/// One host joins at a time: between the check that a name or an address is free and the record that it is taken, no
/// other host may take it.
static JOINING: Mutex<()> = Mutex::new(());

/// Makes a token and stores its hash.
pub fn create(
    store: &dyn Store,
    node: Option<NodeName>,
    ttl: Duration,
    now: SystemTime,
) -> anyhow::Result<JoinToken> {
    let Some(expires) = now.checked_add(ttl).filter(|_| ttl <= MAX_TTL) else {
        bail!("a token can be valid for at most {} days", MAX_TTL.as_secs() / (24 * 3600));
    };
    let token = JoinToken::from_random(rand::random(), rand::random());
    store.add_token(&token.id, &token.hash(), node.as_ref(), expires)?;
    Ok(token)
}

/// The tokens that have not expired.
pub fn list(store: &dyn Store, now: SystemTime) -> anyhow::Result<Vec<TokenRecord>> {
    store.tokens(now)
}

pub fn revoke(store: &dyn Store, id: &str) -> anyhow::Result<()> {
    if !store.remove_token(id)? {
        bail!("there is no token {id:?}: `master-agent token list` shows the ids");
    }
    Ok(())
}

/// The part of the inventory that joining needs.
pub trait Listed {
    /// The addresses listed for a node; `None` when the node is not listed.
    fn addresses(&self, node: &NodeName) -> Option<Vec<IpAddr>>;

    /// The node that an address is listed for.
    fn owner(&self, address: &IpAddr) -> Option<NodeName>;
}

/// Decides who may join. Addresses are granted as the inventory lists them; where it lists none for a node, the node is
/// granted the one at which it was seen.
pub struct Admission<'a> {
    pub authorities: &'a Authorities,
    pub store: &'a dyn Store,
    pub listed: &'a dyn Listed,
    /// The lifetime of the certificates that are issued.
    pub host_ttl: Duration,
}

/// A host that wants to join.
#[derive(Clone, Copy, Debug)]
pub struct Applicant<'a> {
    /// The key that its session has proved.
    pub host_key: &'a PublicKey,
    /// The address from which it calls.
    pub peer: IpAddr,
}

/// Why a host may not join, and what to do about it.
type Refusal = (String, String);

impl Admission<'_> {
    /// Decides about a request. This blocks.
    pub fn decide(&self, request: &JoinRequest, applicant: Applicant<'_>, now: SystemTime) -> JoinResponse {
        match self.admit(request, applicant, now) {
            Ok(accepted) => accepted,
            Err((reason, hint)) => JoinResponse::Refused { reason, hint },
        }
    }

    fn admit(
        &self,
        request: &JoinRequest,
        applicant: Applicant<'_>,
        now: SystemTime,
    ) -> Result<JoinResponse, Refusal> {
        // What can be refused without using the token up comes first. A stranger's token makes nobody wait.
        let token = acceptable(request)?;
        let refusal = |error: TokenError| (error.to_string(), hint(&error).to_owned());
        self.store.check(&token.id, &token.hash(), now).map_err(refusal)?;
        let _one_at_a_time = JOINING.lock().unwrap_or_else(PoisonError::into_inner);
        let (key, seen) = (fingerprint(applicant.host_key), applicant.peer.to_canonical());
        let owner = self.owner(&seen).map_err(|error| refusal(TokenError::Store(format!("{error:#}"))))?;
        let grant = |node: &NodeName| {
            let listed = self.listed.addresses(node);
            let is_listed = listed.is_some();
            let addresses = listed.filter(|addresses| !addresses.is_empty());
            let seen = Seen { at: seen, owner: owner.as_ref() };
            let addresses = addresses.unwrap_or_else(|| unclaimed(&request.addresses, seen, node));
            Grant { listed: is_listed, addresses }
        };
        let redeemed = self.store.redeem(&token.id, &token.hash(), request.node.as_ref(), &key, now, &grant);
        let (node, addresses) = redeemed.map_err(refusal)?;
        self.certify(node, &addresses, applicant.host_key, now).map_err(|error| {
            tracing::error!(%error, "joining failed");
            ("the master failed".to_owned(), "Its log says why.".to_owned())
        })
    }

    fn certify(
        &self,
        node: NodeName,
        addresses: &[IpAddr],
        host_key: &PublicKey,
        now: SystemTime,
    ) -> anyhow::Result<JoinResponse> {
        let certificate = self.authorities.sign_host(host_key, &node, addresses, now, self.host_ttl)?;
        Ok(JoinResponse::Accepted {
            node,
            host_certificate: certificate.to_openssh()?,
            host_ca: self.authorities.host_ca().to_openssh()?,
            user_ca: self.authorities.user_ca().to_openssh()?,
        })
    }

    /// The node that an address is listed or was certified for.
    fn owner(&self, address: &IpAddr) -> anyhow::Result<Option<NodeName>> {
        match self.listed.owner(address) {
            Some(owner) => Ok(Some(owner)),
            None => self.store.address_owner(address),
        }
    }
}

/// The address at which a host was seen.
#[derive(Clone, Copy)]
struct Seen<'a> {
    at: IpAddr,
    /// The node that the address belongs to.
    owner: Option<&'a NodeName>,
}

/// Returns the requested addresses that the host has as far as the master can see, and that no other node has.
fn unclaimed(asked: &[IpAddr], seen: Seen<'_>, node: &NodeName) -> Vec<IpAddr> {
    let mut granted = Vec::new();
    for address in asked.iter().map(IpAddr::to_canonical) {
        if address != seen.at || !offerable(&address) {
            let peer = seen.at;
            tracing::warn!(%node, %address, %peer, "a joining host asked for an address that only the inventory can give; not granted");
        } else if let Some(owner) = seen.owner.filter(|owner| *owner != node) {
            tracing::warn!(%node, %address, %owner, "a joining host asked for another node's address; not granted");
        } else {
            granted.push(address);
        }
    }
    granted
}

/// Returns the token of a request, or an error if the request can be refused without using the token up.
fn acceptable(request: &JoinRequest) -> Result<JoinToken, Refusal> {
    if request.version != 1 {
        return Err((
            "this node-agent speaks another version of joining".to_owned(),
            "Install the same version on both sides.".to_owned(),
        ));
    }
    let token = JoinToken::parse(&request.token)
        .map_err(|e| (e.to_string(), "The token was not used up.".to_owned()))?;
    if request.addresses.len() > MAX_ADDRESSES {
        return Err((
            format!("more than {MAX_ADDRESSES} addresses"),
            "Give the node's own addresses with --address.".to_owned(),
        ));
    }
    Ok(token)
}

fn hint(error: &TokenError) -> &'static str {
    match error {
        TokenError::Store(_) => "The token was not used up: join again once the master's state is in order.",
        TokenError::Unknown
        | TokenError::Expired
        | TokenError::Used
        | TokenError::WrongNode { .. }
        | TokenError::NotListed(_)
        | TokenError::NoName
        | TokenError::Joined(_) => "Tokens are made on the master.",
    }
}

fn offerable(address: &IpAddr) -> bool {
    let address = address.to_canonical();
    let link_local = match address {
        IpAddr::V4(a) => a.is_link_local() || a.is_broadcast(),
        IpAddr::V6(a) => a.is_unicast_link_local(),
    };
    !(address.is_loopback() || address.is_unspecified() || address.is_multicast() || link_local)
}

#[cfg(test)]
mod tests {
    use std::collections::HashMap;

    use russh::keys::{Certificate, PrivateKey};

    use super::*;
    use crate::identity::{
        sqlite::SqliteStore,
        tests::{TempDir, new_key},
    };

    #[derive(Default)]
    struct Table(HashMap<NodeName, Vec<IpAddr>>);

    impl Listed for Table {
        fn addresses(&self, node: &NodeName) -> Option<Vec<IpAddr>> {
            self.0.get(node).cloned()
        }

        fn owner(&self, address: &IpAddr) -> Option<NodeName> {
            self.0.iter().find(|(_, addresses)| addresses.contains(address)).map(|(node, _)| node.clone())
        }
    }

    struct Master {
        _dir: TempDir,
        authorities: Authorities,
        store: SqliteStore,
        listed: Table,
    }

    const HOUR: Duration = Duration::from_secs(3600);

    fn now() -> SystemTime {
        SystemTime::UNIX_EPOCH + Duration::from_secs(1_800_000_000)
    }

    fn node(s: &str) -> NodeName {
        s.parse().unwrap()
    }

    impl Master {
        fn new() -> Self {
            let dir = TempDir::new();
            let mut listed = Table::default();
            for i in 0..10 {
                listed.0.insert(node(&format!("n{i}")), vec![]);
                listed.0.insert(node(&format!("m{i}")), vec![]);
            }
            listed.0.insert(node("n9"), vec!["10.0.0.9".parse().unwrap()]);
            Self {
                authorities: Authorities::load_or_create(&dir.0).unwrap(),
                store: SqliteStore::open(&dir.0).unwrap(),
                listed,
                _dir: dir,
            }
        }

        fn token(&self, bound: Option<&str>) -> String {
            create(&self.store, bound.map(node), HOUR, now()).unwrap().reveal()
        }

        fn join_at(
            &self,
            token: &str,
            name: Option<&str>,
            addresses: &[&str],
            now: SystemTime,
        ) -> Result<Vec<String>, String> {
            self.join_with(&new_key(), token, name, addresses, now)
        }

        fn join_with(
            &self,
            key: &PrivateKey,
            token: &str,
            name: Option<&str>,
            addresses: &[&str],
            now: SystemTime,
        ) -> Result<Vec<String>, String> {
            let request = JoinRequest {
                version: 1,
                token: token.to_owned(),
                node: name.map(node),
                addresses: addresses.iter().map(|a| a.parse().unwrap()).collect(),
            };
            // Seen at the last address that it asks for.
            let peer = addresses.last().map_or([192, 0, 2, 1].into(), |a| a.parse().unwrap());
            let admission = Admission {
                authorities: &self.authorities,
                store: &self.store,
                listed: &self.listed,
                host_ttl: HOUR,
            };
            match admission.decide(&request, Applicant { host_key: key.public_key(), peer }, now) {
                JoinResponse::Accepted { node, host_certificate, .. } => {
                    let certificate = Certificate::from_openssh(&host_certificate).unwrap();
                    assert_eq!(certificate.public_key(), key.public_key().key_data());
                    assert_eq!(certificate.key_id(), format!("node:{node}"));
                    Ok(certificate.valid_principals().to_vec())
                }
                JoinResponse::Refused { reason, hint } => {
                    let secret = token.rsplit('.').next().unwrap_or_default();
                    assert!(secret.len() < 20 || !format!("{reason} {hint}").contains(secret));
                    Err(format!("{reason} {hint}"))
                }
            }
        }

        fn join(&self, token: &str, name: Option<&str>, addresses: &[&str]) -> Result<Vec<String>, String> {
            self.join_at(token, name, addresses, now())
        }
    }

    fn refused(got: Result<Vec<String>, String>, part: &str) {
        let reason = got.unwrap_err();
        assert!(reason.contains(part), "{part:?} in {reason:?}");
    }

    #[test]
    fn a_token_is_good_once_for_its_node_while_it_lasts() {
        let master = Master::new();
        let bound = master.token(Some("n1"));
        refused(master.join(&bound, Some("n2"), &[]), "bound to node n1");
        refused(
            master.join_at(&bound, None, &[], now() + HOUR),
            "has expired: make a new one with `master-agent token create`",
        );
        assert_eq!(master.join(&bound, None, &[]), Ok(vec!["n1".to_owned()]));
        refused(master.join(&bound, None, &[]), "has been used before");
        refused(master.join(&master.token(None), None, &[]), "--node");
        assert_eq!(master.join(&master.token(None), Some("n2"), &[]), Ok(vec!["n2".to_owned()]));

        let wrong_secret = master.token(None);
        let other = master.token(None);
        let mixed = format!("{}.{}", &wrong_secret[..17], other.rsplit('.').next().unwrap());
        refused(master.join(&mixed, Some("n3"), &[]), "not known here");
        let revoked = master.token(None);
        revoke(&master.store, revoked.split('.').nth(1).unwrap()).unwrap();
        refused(master.join(&revoked, Some("n3"), &[]), "not known here");
        for malformed in ["", "x", "mat1.", &bound[..bound.len() - 1], "mat1.aaaaaaaaaaaa.\u{e9}"] {
            refused(master.join(malformed, Some("n3"), &[]), "token create");
        }
        assert!(revoke(&master.store, "nonesuch").unwrap_err().to_string().contains("token list"));
    }

    #[test]
    fn a_host_that_asks_again_gets_another_certificate_for_its_key() {
        let master = Master::new();
        let (key, other) = (new_key(), new_key());
        for (token, name) in [(master.token(Some("n1")), None), (master.token(None), Some("n2"))] {
            let join = |key, now| master.join_with(key, &token, name, &[], now);
            let principals = join(&key, now()).unwrap();
            assert_eq!(join(&key, now() + HOUR / 2), Ok(principals));
            refused(join(&other, now() + HOUR / 2), "has been used before");
            refused(join(&key, now() + HOUR), "has expired");
        }
    }

    #[test]
    fn strangers_do_not_wait_for_hosts_that_join() {
        let master = Master::new();
        let used = master.token(None);
        let _joining = JOINING.lock().unwrap_or_else(PoisonError::into_inner);
        for (token, part) in [
            (format!("mat1.aaaaaaaaaaaa.{}", used.rsplit('.').next().unwrap()), "not known here"),
            ("nonsense".to_owned(), "token create"),
        ] {
            refused(master.join(&token, Some("n3"), &[]), part);
        }
        refused(master.join_at(&used, Some("n3"), &[], now() + HOUR), "has expired");
    }

    #[test]
    fn a_joined_name_is_taken_over_only_with_a_token_bound_to_it() {
        let master = Master::new();
        master.join(&master.token(None), Some("n1"), &[]).unwrap();
        let before = master.store.joined_key(&node("n1")).unwrap();
        refused(master.join(&master.token(None), Some("n1"), &[]), "master-agent token create --node n1");
        assert_eq!(master.store.joined_key(&node("n1")), Some(before.clone()));
        master.join(&master.token(Some("n1")), None, &[]).unwrap();
        assert_ne!(master.store.joined_key(&node("n1")), Some(before));
    }

    #[test]
    fn of_hosts_that_claim_one_name_or_address_at_a_time_one_gets_it() {
        let master = Master::new();
        let tokens: Vec<String> = (0..8).map(|_| master.token(None)).collect();
        let joined = |claims: fn(usize) -> (String, &'static str)| {
            std::thread::scope(|scope| {
                let tasks: Vec<_> = tokens
                    .iter()
                    .enumerate()
                    .map(|(i, _)| {
                        let (master, token) = (&master, master.token(None));
                        scope.spawn(move || {
                            let (name, address) = claims(i);
                            master.join(&token, Some(&name), &[address])
                        })
                    })
                    .collect();
                tasks.into_iter().filter_map(|t| t.join().unwrap().ok()).collect::<Vec<_>>()
            })
        };
        assert_eq!(joined(|_| ("n1".to_owned(), "10.0.0.1")).len(), 1);
        let principals = joined(|i| (format!("m{i}"), "10.0.0.2"));
        assert_eq!(principals.len(), 8);
        assert_eq!(
            principals.iter().filter(|p| p.contains(&"10.0.0.2".to_owned())).count(),
            1,
            "{principals:?}"
        );
    }

    #[test]
    fn addresses_come_from_the_inventory_or_are_nobody_elses() {
        let master = Master::new();
        let join = |name: &str, asked: &[&str]| {
            master.join(&master.token(None), Some(name), asked).unwrap().split_off(1)
        };
        assert_eq!(join("n9", &["10.0.0.66", "127.0.0.1"]), ["10.0.0.9"], "as listed");
        assert_eq!(join("n8", &["10.0.0.1", "fd00::8"]), ["fd00::8"], "where it was seen");
        assert_eq!(join("n7", &["10.0.0.9", "10.0.0.8", "10.0.0.7"]), ["10.0.0.7"]);
        assert_eq!(join("n6", &["::ffff:10.0.0.8", "::ffff:10.0.0.6"]), ["10.0.0.6"]);
        let none: [&str; 0] = [];
        for (i, taken) in
            ["10.0.0.9", "10.0.0.7", "127.0.0.1", "::1", "::ffff:127.0.0.1", "169.254.1.1", "fe80::1", "::"]
                .iter()
                .enumerate()
        {
            assert_eq!(join(&format!("m{i}"), &[taken]), none, "{taken}");
        }
        let many: Vec<String> = (0..33).map(|i| format!("10.1.0.{i}")).collect();
        let many: Vec<&str> = many.iter().map(String::as_str).collect();
        refused(master.join(&master.token(None), Some("n4"), &many), "addresses");
        let token = master.token(None);
        refused(master.join(&token, Some("unlisted"), &[]), "not in the master's inventory");
        assert_eq!(master.join(&token, Some("n4"), &[]).unwrap(), ["n4"], "the token was not used up");
    }

    #[test]
    fn lists_show_no_secret_and_lifetimes_are_bounded() {
        let master = Master::new();
        let token = create(&master.store, Some(node("n1")), HOUR, now()).unwrap();
        let secret = token.reveal().rsplit('.').next().unwrap().to_owned();
        let listed = list(&master.store, now()).unwrap();
        let hash: String = token.hash().iter().map(|b| format!("{b:02x}")).collect();
        for text in [format!("{listed:?} {token:?}"), serde_json::to_string(&listed).unwrap()] {
            assert!(text.contains(&token.id) && !text.contains(&secret) && !text.contains(&hash), "{text}");
        }
        // What was written last may still be in the log beside the database.
        for file in ["state.sqlite", "state.sqlite-wal"] {
            let stored = std::fs::read(master._dir.0.join(file)).unwrap();
            assert!(!stored.windows(secret.len()).any(|w| w == secret.as_bytes()));
        }
        assert!(create(&master.store, None, Duration::MAX, now()).is_err());
    }
}
