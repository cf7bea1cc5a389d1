//! Tokens and registrants of one process, in the file `registrants.json` of its data directory.

use std::{
    io,
    path::{Path, PathBuf},
    sync::{Arc, Mutex, PoisonError},
    time::SystemTime,
};

use super::{
    JoiningError, JoiningTable, Scope, TokenId, format,
    state::{JoiningState, Token},
    store::JoinAttempt,
};
use crate::identity::{CaError, private_file};

/// The file in the data directory.
pub(in crate::identity) const STATE_FILE: &str = "registrants.json";

/// Most bytes of that file. Each of the tokens and registrants takes some 500.
const MAX_STATE_BYTES: u64 = 64 * 1024 * 1024;

/// The file. A change is in it before it is answered, and before it counts.
#[derive(Debug)]
pub(super) struct DirectoryStore {
    path: PathBuf,
    table: Arc<JoiningTable>,
    /// Held by the one who changes it.
    changing: Mutex<()>,
}

impl DirectoryStore {
    /// Reads what is stored in `dir` into `table`. The caller has the lock of the directory.
    pub(super) fn open(dir: &Path, table: Arc<JoiningTable>) -> Result<Arc<Self>, CaError> {
        let path = dir.join(STATE_FILE);
        table.replace(read(&path)?.unwrap_or_default());
        Ok(Arc::new(Self { path, table, changing: Mutex::default() }))
    }

    pub(super) async fn add_token(
        self: &Arc<Self>,
        id: TokenId,
        token: Token,
        now: SystemTime,
    ) -> Result<(), JoiningError> {
        self.change(now, move |state| {
            state.room_for_token(&token.scope)?;
            state.put_token(id, token);
            Ok(())
        })
        .await
    }

    pub(super) async fn remove_token(self: &Arc<Self>, id: TokenId, now: SystemTime) -> Result<bool, JoiningError> {
        self.change(now, move |state| Ok(state.remove_token(id))).await
    }

    pub(super) async fn join(self: &Arc<Self>, attempt: JoinAttempt) -> Result<Scope, JoiningError> {
        self.change(attempt.now, move |state| {
            // Again, by the one who changes: two machines may use the last use of a token at once.
            let token = state.check_token(attempt.token, &attempt.secret, attempt.now)?.used_once();
            let registrant = attempt.registrant(&token, state.registrants.get(&attempt.user))?;
            let scope = token.scope.clone();
            state.room_for_registrant(&attempt.user, &scope)?;
            state.put_token(attempt.token, token);
            state.put_registrant(attempt.user, registrant);
            Ok(scope)
        })
        .await
    }

    /// Changes a registrant. `None` if there is no such one.
    pub(super) async fn update<T: Send + 'static>(
        self: &Arc<Self>,
        user: String,
        now: SystemTime,
        mut change: impl FnMut(&mut super::JoinedRegistrant) -> Result<T, JoiningError> + Send + 'static,
    ) -> Result<Option<T>, JoiningError> {
        self.change(now, move |state| {
            let Some(mut registrant) = state.registrants.get(&user).cloned() else { return Ok(None) };
            let result = change(&mut registrant)?;
            state.put_registrant(user, registrant);
            Ok(Some(result))
        })
        .await
    }

    /// Applies `change` to what is stored, stores the result, and publishes it; or nothing of this.
    async fn change<T: Send + 'static>(
        self: &Arc<Self>,
        now: SystemTime,
        change: impl FnOnce(&mut JoiningState) -> Result<T, JoiningError> + Send + 'static,
    ) -> Result<T, JoiningError> {
        let this = Arc::clone(self);
        let changed = tokio::task::spawn_blocking(move || {
            let _changing = this.changing.lock().unwrap_or_else(PoisonError::into_inner);
            let mut state = this.table.read().clone();
            state.purge(now);
            let result = change(&mut state)?;
            // Durable, then visible, then acknowledged.
            let bytes = format::encode(&state);
            // It could not be read again.
            if bytes.len() as u64 > MAX_STATE_BYTES {
                return Err(this.failed(io::ErrorKind::FileTooLarge.into()));
            }
            private_file::write(&this.path, &bytes).map_err(|err| this.failed(err))?;
            this.table.replace(state);
            Ok(result)
        });
        changed.await.unwrap_or_else(|err| Err(self.failed(io::Error::other(err))))
    }

    fn failed(&self, err: io::Error) -> JoiningError {
        JoiningError::Store { path: self.path.clone(), err }
    }
}

/// What a file holds; `None` if there is none.
pub(super) fn read(path: &Path) -> Result<Option<JoiningState>, CaError> {
    let bytes = private_file::read(path, MAX_STATE_BYTES).map_err(|err| CaError::Io { path: path.to_owned(), err })?;
    let invalid = |reason| CaError::Invalid { path: path.to_owned(), reason };
    bytes.map(|bytes| format::decode(&bytes).map_err(invalid)).transpose()
}
