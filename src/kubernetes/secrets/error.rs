//! Why a Secret was not read or written.

/// Why a Secret was not read or written.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum SecretError {
    /// The account lacks a right.
    #[error(
        "Kubernetes does not let this account {verb} secrets in the namespace {namespace}, which deploy/kustomize/rbac-own-ca.yaml grants: {reason}"
    )]
    Forbidden {
        /// The verb of the right.
        verb: &'static str,
        /// The namespace.
        namespace: String,
        /// What the API server says.
        reason: String,
    },
    /// An admission policy, a webhook or a quota.
    #[error("Kubernetes refuses the Secret: {0}")]
    Refused(String),
    /// Another process has changed it meanwhile.
    #[error("the Secret was changed meanwhile")]
    Changed,
    /// No answer, or one that says to try again.
    #[error("Kubernetes cannot be asked: {0}")]
    Unavailable(String),
}

/// Why a Secret was not changed.
#[derive(Debug)]
pub enum UpdateError<E> {
    /// The change itself is refused.
    Refused(E),
    /// It was not written, or nobody knows whether it was.
    Secret(SecretError),
}

impl<E> From<SecretError> for UpdateError<E> {
    fn from(err: SecretError) -> Self {
        Self::Secret(err)
    }
}
