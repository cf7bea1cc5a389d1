//! Where tokens and registrants are kept: in the data directory of one process, or, with Kubernetes, in Secrets that all
//! processes share. What may be changed, and into what, is the same for both, and not decided here.

use std::{sync::Arc, time::SystemTime};

use super::{
    JoinedRegistrant, JoiningError, Scope, Token, TokenId,
    cluster::{ClusterStore, NotFound},
    directory::DirectoryStore,
};

/// One machine that joins.
#[derive(Debug, Clone)]
pub(super) struct JoinAttempt {
    pub(super) token: TokenId,
    pub(super) secret: Vec<u8>,
    /// The user that it becomes, or already is.
    pub(super) user: String,
    pub(super) host: String,
    /// When its certificate ends.
    pub(super) expires: SystemTime,
    pub(super) now: SystemTime,
}

impl JoinAttempt {
    /// The registrant that it becomes, by a token that was checked. `known` is what is stored under its name.
    pub(super) fn registrant(
        &self,
        token: &Token,
        known: Option<&JoinedRegistrant>,
    ) -> Result<JoinedRegistrant, JoiningError> {
        // Revoked since its name was looked up.
        if known.is_some_and(|known| known.revoked.is_some()) {
            return Err(JoiningError::Revoked);
        }
        let (scope, host) = (token.scope.clone(), self.host.clone());
        let (joined, expires) = (self.now, self.expires);
        Ok(JoinedRegistrant { scope, host, token: self.token, joined, expires, revoked: None })
    }
}

/// The one that is used. Each change is stored when it returns, or in doubt if it fails.
#[derive(Debug)]
pub(super) enum Store {
    Directory(Arc<DirectoryStore>),
    Cluster(Arc<ClusterStore>),
}

impl Store {
    /// Adds a token.
    pub(super) async fn add_token(&self, id: TokenId, token: Token, now: SystemTime) -> Result<(), JoiningError> {
        match self {
            Self::Directory(directory) => directory.add_token(id, token, now).await,
            Self::Cluster(cluster) => cluster.add_token(id, token).await,
        }
    }

    /// Removes a token. Returns whether there was one.
    pub(super) async fn remove_token(&self, id: TokenId, now: SystemTime) -> Result<bool, JoiningError> {
        match self {
            Self::Directory(directory) => directory.remove_token(id, now).await,
            Self::Cluster(cluster) => cluster.remove_token(id).await,
        }
    }

    /// Checks a token and uses it once, and adds or replaces the registrant. Returns what that may do.
    pub(super) async fn join(&self, attempt: JoinAttempt) -> Result<Scope, JoiningError> {
        match self {
            Self::Directory(directory) => directory.join(attempt).await,
            Self::Cluster(cluster) => cluster.join(attempt).await,
        }
    }

    /// Changes a registrant; `change` may be called again with a later version of it. `None` if there is no such one.
    pub(super) async fn update<T: Send + 'static>(
        &self,
        user: String,
        now: SystemTime,
        change: impl FnMut(&mut JoinedRegistrant) -> Result<T, JoiningError> + Send + 'static,
    ) -> Result<Option<T>, JoiningError> {
        match self {
            Self::Directory(directory) => directory.update(user, now, change).await,
            Self::Cluster(cluster) => cluster.update(user, change).await,
        }
    }

    /// Looks for a token that this process does not know: another one may have created it a moment ago.
    pub(super) async fn look_up_token(&self, id: TokenId) -> Result<(), NotFound> {
        match self {
            Self::Directory(_) => Err(NotFound::Absent),
            Self::Cluster(cluster) => cluster.look_up_token(id).await,
        }
    }

    /// The same for a registrant.
    pub(super) async fn look_up_registrant(&self, user: &str) -> Result<(), NotFound> {
        match self {
            Self::Directory(_) => Err(NotFound::Absent),
            Self::Cluster(cluster) => cluster.look_up_registrant(user).await,
        }
    }
}
