//! The reasons for not recognising a caller.

/// A reason for the log. It contains no secret, and it is not for the caller.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum FailureReason {
    #[error("no credential")]
    NoCredential,
    #[error("no authenticator knows the credential")]
    Unrecognized,

    #[error("more than one Authorization header")]
    TwoAuthorizations,
    #[error("the Authorization header is not of the form `Bearer TOKEN`")]
    MalformedAuthorization,
    #[error("more than one bearer token")]
    TwoTokens,
    #[error("the bearer token is longer than {0} bytes")]
    TokenTooLong(usize),
    #[error("the WebSocket subprotocol's token is not base64url of a token")]
    MalformedSubprotocol,
    #[error("the WebSocket subprotocol with the token is the only one: another must be offered as well")]
    LoneSubprotocol,

    #[error("the certificate has expired")]
    CertificateExpired,
    #[error("the certificate is not valid yet")]
    CertificateNotYetValid,
    #[error("the certificate is revoked")]
    CertificateRevoked,
    #[error("no CRL says whether the certificate is revoked")]
    RevocationUnknown,
    #[error("the certificate is not for TLS clients: it lacks the extended key usage clientAuth")]
    CertificateUsage,
    #[error("the certificate is from a CA that is not trusted")]
    CertificateIssuer,
    #[error("the certificate can't be used: {0}")]
    Certificate(String),
    #[error("the certificate's subject does not have exactly one common name")]
    CommonName,
    #[error("the certificate's subject has a malformed attribute, or two UIDs")]
    SubjectAttribute,

    #[error("the token is malformed: {0}")]
    Malformed(&'static str),
    #[error("the token's algorithm is not allowed for the key")]
    Algorithm,
    #[error("the token is signed with a key that is not known")]
    UnknownKey,
    #[error("the token's signature is wrong")]
    Signature,
    #[error("the token has no expiry")]
    NoExpiry,
    #[error("the token has expired")]
    Expired,
    #[error("the token is not valid yet")]
    NotYetValid,
    #[error("the token is for another audience")]
    Audience,
    #[error("the token's subject is not a service account")]
    Subject,
    #[error("the token's claims contradict each other")]
    Contradiction,
    #[error("legacy tokens, which are kept in Secrets and never expire, are not accepted")]
    Legacy,
    #[error("the API server no longer accepts the token: {0}")]
    Withdrawn(String),
    #[error("the token has no usable claim {0:?}")]
    Claim(String),
    #[error("the token's email address is not verified")]
    EmailNotVerified,
    #[error("the token claims a name that begins with `system:`")]
    SystemName,

    #[error("no such bootstrap token")]
    UnknownBootstrapToken,
    #[error("the bootstrap token's secret is wrong")]
    WrongSecret,
    #[error("the bootstrap token is not for authentication")]
    NotForAuthentication,
    #[error("the bootstrap token can't be used: {0}")]
    BootstrapToken(&'static str),

    #[error("the webhook refuses the token")]
    Refused,
    #[error("could not be asked: {0}")]
    Unavailable(String),
    /// The time is that until it may be tried.
    #[error("was not tried: too many attempts from the caller's address have failed")]
    NotTried(std::time::Duration),

    #[error("the user has no name")]
    NoName,
    #[error("a name or group has control characters")]
    ControlCharacters,
    #[error("the user's names and groups are too long together")]
    UserTooLarge,
}
