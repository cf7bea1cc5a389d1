//! What a run without Kubernetes has left in the data directory.

use std::{fs, path::Path};

use tracing::{info, warn};

use super::{ClusterStore, REGISTRANT, objects};
use crate::{
    identity::joining::{IMPORT_FILE, RETIRED_FILE, directory},
    kubernetes::secrets::{NewSecret, SecretError},
};

impl ClusterStore {
    /// Makes Secrets of the registrants of an earlier run whose CA is in use, once. Not of its tokens: one that was revoked after a
    /// part of them was taken over would be there again.
    pub(super) async fn import(&self) {
        let path = self.dir.join(IMPORT_FILE);
        let stored = match directory::read(&path) {
            Ok(None) => return,
            Ok(Some(stored)) => stored,
            Err(err) => {
                warn!(%err, "the registrants of an earlier run are not taken over");
                return;
            }
        };
        let registrants = stored.registrants.iter().filter_map(|(user, registrant)| {
            Some((objects::registrant_name(user)?, objects::registrant_data(user, registrant)))
        });
        for (name, data) in registrants {
            // What is there already was taken over before.
            if let Err(err) = self.secrets.create(NewSecret { name: &name, ..REGISTRANT }, data).await {
                if matches!(err, SecretError::Refused(_)) {
                    warn!(secret = name, %err, "a registrant of an earlier run is not taken over");
                    continue;
                }
                // In the next round.
                return;
            }
        }
        info!(registrants = stored.registrants.len(), "the registrants of an earlier run are in Secrets");
        if let Err(err) = fs::rename(&path, self.dir.join(RETIRED_FILE)) {
            warn!(%err, "{IMPORT_FILE} cannot be renamed");
        }
    }
}

/// Keeps what is in the file of a run without Kubernetes: for [`ClusterStore::import`], or, of another CA, for a person.
pub(in crate::identity) fn set_aside(dir: &Path, same_ca: bool) -> std::io::Result<()> {
    let to = if same_ca { IMPORT_FILE } else { RETIRED_FILE };
    match fs::rename(dir.join(directory::STATE_FILE), dir.join(to)) {
        Err(err) if err.kind() != std::io::ErrorKind::NotFound => Err(err),
        _ => Ok(()),
    }
}
