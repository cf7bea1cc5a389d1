//! What `gangplank join` has left on this machine, for every other command.

use std::{
    env,
    io::{self, Write as _},
    path::{Path, PathBuf},
    time::SystemTime,
};

use super::error::{CommandError, ErrorKind};
use crate::grpc::client::{JoinError, JoinedMachine, ScopeSpec};

/// The machine's configuration, which root joins with.
const MACHINE_DIR: &str = "/etc/gangplank";

/// `--config-dir`.
#[derive(Debug, clap::Args)]
pub(super) struct ConfigDirArgs {
    /// Where `gangplank join` keeps the certificate and the server's address [default: /etc/gangplank for root, else
    /// $XDG_CONFIG_HOME/gangplank or ~/.config/gangplank]
    #[arg(long, env = "GANGPLANK_CONFIG_DIR", value_name = "DIR")]
    config_dir: Option<PathBuf>,
}

impl ConfigDirArgs {
    /// The directory; `None` when nothing says where it is.
    pub(super) fn dir(&self) -> Option<PathBuf> {
        if let Some(dir) = &self.config_dir {
            return Some(dir.clone());
        }
        if is_root() {
            return Some(MACHINE_DIR.into());
        }
        user_config().map(|dir| dir.join("gangplank"))
    }

    /// Whether it is another one than the default.
    pub(super) const fn is_given(&self) -> bool {
        self.config_dir.is_some()
    }

    /// What this machine has, if it joined.
    pub(super) fn load(&self) -> Result<Option<JoinedMachine>, CommandError> {
        let Some(dir) = self.dir() else { return Ok(None) };
        match JoinedMachine::load(&dir) {
            // A user whom the machine's configuration is not for.
            Err(JoinError::File { err, .. }) if err.kind() == io::ErrorKind::PermissionDenied && !self.is_given() => {
                Ok(None)
            }
            loaded => Ok(loaded?),
        }
    }

    /// The same, with its certificate renewed if two thirds of its life are over. A renewal that fails is an error only once
    /// the certificate has expired.
    pub(super) async fn load_renewed(&self) -> Result<Option<JoinedMachine>, CommandError> {
        let Some(mut machine) = self.load()? else { return Ok(None) };
        let now = SystemTime::now();
        if machine.is_due(now)
            && let Err(err) = machine.renew().await
        {
            if machine.expires() <= now {
                let err = CommandError::from(err);
                return Err(err.hint("the certificate has expired, and could not be renewed"));
            }
            let until = humantime::format_rfc3339_seconds(machine.expires());
            // Not `eprintln!`, which panics if stderr cannot be written.
            let _ =
                writeln!(io::stderr(), "warning: the certificate is good until {until}, and was not renewed: {err}");
        }
        Ok(Some(machine))
    }
}

pub(super) fn is_root() -> bool {
    rustix::process::geteuid().is_root()
}

/// The user's configuration directory (XDG Base Directory Specification).
pub(super) fn user_config() -> Option<PathBuf> {
    let from = |name: &str| env::var_os(name).map(PathBuf::from).filter(|path| path.is_absolute());
    from("XDG_CONFIG_HOME").or_else(|| from("HOME").map(|home| home.join(".config")))
}

/// The namespace and service of a scope, for tables.
pub(super) fn scope_cell(scope: &ScopeSpec) -> String {
    let ScopeSpec { namespace, service, verbs: _, addresses: _ } = scope;
    scope_text(some(namespace), some(service))
}

/// What is empty stands for all.
fn some(text: &str) -> Option<&str> {
    (!text.is_empty()).then_some(text)
}

/// Its verbs and addresses, for wide tables.
pub(super) fn wide_scope_cells(scope: &ScopeSpec) -> [String; 2] {
    let addresses = if scope.addresses.is_empty() { "*".to_owned() } else { scope.addresses.join(",") };
    [scope.verbs.join(","), addresses]
}

/// `NAMESPACE/SERVICE`, with `*` for all.
pub(super) fn scope_text(namespace: Option<&str>, service: Option<&str>) -> String {
    format!("{}/{}", namespace.unwrap_or("*"), service.unwrap_or("*"))
}

/// The directory, or a usage error.
pub(super) fn required(args: &ConfigDirArgs) -> Result<PathBuf, CommandError> {
    let missing = "--config-dir: must be given, because neither XDG_CONFIG_HOME nor HOME is set";
    args.dir().ok_or_else(|| CommandError::new(ErrorKind::Usage, missing))
}

/// A path as a person types it.
pub(super) fn shown(path: &Path) -> String {
    path.display().to_string()
}
