//! Why bytes are not a usable list, and how large a list may be.

/// The most bytes of a list.
pub const MAX_LIST: usize = 1024 * 1024;

/// The most ranges of serial numbers: as many as a list of the greatest size could name one by one.
pub(super) const MAX_RANGES: usize = MAX_LIST / 8;

/// The bytes are not a usable list.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum KrlError {
    #[error("it has {0} bytes; {MAX_LIST} are allowed")]
    TooLarge(usize),
    #[error("it is not an OpenSSH key revocation list")]
    Magic,
    #[error("its format version {0} is not known here")]
    Format(u32),
    #[error("it ends in the middle of something")]
    Truncated,
    #[error("it has a section of type {0}, which is not known here")]
    Section(u8),
    #[error("it has the critical extension {0:?}, which is not known here")]
    Extension(String),
    #[error("it has an embedded signature, which OpenSSH has given up; sign it with `ssh-keygen -Y sign`")]
    Signature,
    #[error("a range of serial numbers in it is empty, contains 0 or exceeds 64 bits")]
    Serial,
    #[error("it names more than {MAX_RANGES} ranges of serial numbers")]
    Ranges,
    #[error("a key id in it contains a zero byte")]
    KeyId,
}
