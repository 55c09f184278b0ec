//! Why a host key is refused, in words for the log, for the refused peer and for metrics.

use proto::NodeName;

/// Why a host key is refused.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum HostKeyError {
    #[error(
        "host key {fingerprint} of {who} has no certificate of this master's host CA: join the host (`master-agent token create`), or for a plain sshd run `master-agent sshd-config`, or pin the key in the inventory"
    )]
    NoCertificate { node: Option<NodeName>, who: String, fingerprint: String },
    #[error("{who} shows a certificate of another CA ({ca}); it must be signed by this master's host CA")]
    WrongCa { node: Option<NodeName>, who: String, ca: String },
    #[error("the signature of the certificate that {who} shows is wrong")]
    BadSignature { node: Option<NodeName>, who: String },
    #[error("{who} shows a user certificate in place of a host certificate")]
    NotAHostCertificate { node: Option<NodeName>, who: String },
    #[error(
        "the host certificate of {who} expired at {at}: join the host again with `master-agent token create --node`"
    )]
    Expired { node: Option<NodeName>, who: String, at: String },
    #[error("the host certificate of {who} is not valid before {at}: check both clocks")]
    NotYetValid { node: Option<NodeName>, who: String, at: String },
    #[error("expected node {expected}, but the host certificate is for {principals}")]
    WrongPrincipal { expected: NodeName, principals: String },
    #[error("the host certificate names no node (key id {key_id:?}, principals {principals})")]
    NoName { key_id: String, principals: String },
    #[error("the host certificate of {who} has the critical option {option:?}, which is not known here")]
    CriticalOption { node: Option<NodeName>, who: String, option: String },
    #[error("host key {fingerprint} of node {node} is not one of the pinned keys")]
    NotPinned { node: NodeName, fingerprint: String },
    #[error("host key {fingerprint} of node {node} is not in {file} for the address that was dialled")]
    NotInKnownHosts { node: NodeName, fingerprint: String, file: String },
    #[error("host key {fingerprint} of node {node} is revoked in {file}")]
    Revoked { node: NodeName, fingerprint: String, file: String },
    #[error(
        "node {node} is recognised by its `host_keys:` in the inventory; a certificate (of key {fingerprint}) does not count for it"
    )]
    OtherTrust { node: NodeName, fingerprint: String },
    #[error(
        "the host key of node {node} has changed: first seen {first}, now {fingerprint}. If that is right, forget the old one (`master-agent node forget {node}`)"
    )]
    Changed { node: NodeName, first: String, fingerprint: String },
    #[error("node {node} has joined with another key ({current}) since this certificate was made")]
    Superseded { node: NodeName, current: String },
    #[error(
        "no key of node {node} is known here (it was forgotten, or the state was lost): join it anew with `master-agent token create --node {node}`, or run `master-agent sshd-config {node}` again"
    )]
    Forgotten { node: NodeName },
    #[error("the call home was admitted for node {admitted}, but the host key belongs to node {node}")]
    OtherNode { admitted: NodeName, node: NodeName },
    #[error("the call home was admitted for a host that joins, but the host key belongs to node {node}")]
    NotJoining { node: NodeName },
    #[error("node {node} is not in the inventory")]
    UnknownNode { node: NodeName },
    #[error("the store can't be read: {0}")]
    Store(String),
}

impl HostKeyError {
    /// Returns a short, fixed word for metric labels.
    pub fn kind(&self) -> &'static str {
        match self {
            Self::NoCertificate { .. } => "unknown_key",
            Self::WrongCa { .. } => "wrong_ca",
            Self::BadSignature { .. } => "bad_signature",
            Self::NotAHostCertificate { .. } => "user_certificate",
            Self::Expired { .. } => "expired",
            Self::NotYetValid { .. } => "not_yet_valid",
            Self::WrongPrincipal { .. } | Self::NoName { .. } => "wrong_principal",
            Self::CriticalOption { .. } => "critical_option",
            Self::NotPinned { .. } => "not_pinned",
            Self::NotInKnownHosts { .. } => "not_in_known_hosts",
            Self::Revoked { .. } => "revoked",
            Self::OtherTrust { .. } => "other_trust",
            Self::Changed { .. } => "key_changed",
            Self::Superseded { .. } => "superseded",
            Self::Forgotten { .. } => "forgotten",
            Self::OtherNode { .. } => "other_node",
            Self::NotJoining { .. } => "not_joining",
            Self::UnknownNode { .. } => "unknown_node",
            Self::Store(_) => "store",
        }
    }

    /// Returns the reason as the refused peer may read it. A peer whose key has proved a name learns why that name is refused.
    /// Any other peer learns what is wrong with what it showed, and nothing about this master's nodes and files.
    pub fn for_peer(&self) -> String {
        match self {
            Self::NoCertificate { .. } => {
                "the host key has no certificate of this master's host CA: join the \
                host with a token of `master-agent token create`"
                    .to_owned()
            }
            Self::WrongCa { ca, .. } => format!(
                "the host certificate is signed by another CA ({ca}) than this master's: join the host to this master"
            ),
            Self::BadSignature { .. } => "the signature of the host certificate is wrong".to_owned(),
            Self::NotAHostCertificate { .. } => {
                "the certificate is a user certificate in place of a host certificate".to_owned()
            }
            Self::Expired { at, .. } => format!(
                "the host certificate expired at {at}: join the host again with a token of `master-agent token \
                 create --node`"
            ),
            Self::NotYetValid { at, .. } => {
                format!("the host certificate is not valid before {at}: check both clocks")
            }
            Self::WrongPrincipal { principals, .. } => {
                format!("the host certificate is for {principals}, but another node is expected here")
            }
            Self::CriticalOption { option, .. } => {
                format!("the host certificate has the critical option {option:?}, which is not known here")
            }
            Self::NotPinned { .. } | Self::NotInKnownHosts { .. } | Self::Changed { .. } => {
                "the host key is not the one that this master knows the node by".to_owned()
            }
            Self::Revoked { .. } => "the host key is revoked".to_owned(),
            Self::Superseded { node, .. } => {
                format!("node {node} has joined with another key since this certificate was made")
            }
            Self::NoName { .. }
            | Self::OtherTrust { .. }
            | Self::Forgotten { .. }
            | Self::OtherNode { .. }
            | Self::NotJoining { .. }
            | Self::UnknownNode { .. } => self.to_string(),
            Self::Store(_) => "the master can't check host keys at the moment; its log says why".to_owned(),
        }
    }

    /// Returns the node that was expected or claimed.
    pub fn node(&self) -> Option<&NodeName> {
        match self {
            Self::NoCertificate { node, .. }
            | Self::WrongCa { node, .. }
            | Self::BadSignature { node, .. }
            | Self::NotAHostCertificate { node, .. }
            | Self::Expired { node, .. }
            | Self::NotYetValid { node, .. }
            | Self::CriticalOption { node, .. } => node.as_ref(),
            Self::WrongPrincipal { expected: node, .. }
            | Self::NotPinned { node, .. }
            | Self::NotInKnownHosts { node, .. }
            | Self::Revoked { node, .. }
            | Self::OtherTrust { node, .. }
            | Self::Changed { node, .. }
            | Self::Superseded { node, .. }
            | Self::Forgotten { node }
            | Self::NotJoining { node }
            | Self::OtherNode { admitted: node, .. }
            | Self::UnknownNode { node } => Some(node),
            Self::NoName { .. } | Self::Store(_) => None,
        }
    }
}
