//! What `gangplank check` needs to know of the process beside its metrics.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use super::Admin;
use crate::{
    metrics::{BlockedService, LabelEnum as _},
    model::UnixMillis,
    registry::Phase,
};

/// What the process was started with, as far as it is shown.
#[derive(Debug, Clone, Default)]
pub struct ProcessOptions {
    /// Where it stores.
    pub data_dir: PathBuf,
    /// `None` without Kubernetes.
    pub kubernetes: Option<KubernetesFlags>,
}

/// Flags that need rights in Kubernetes.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct KubernetesFlags {
    /// Where the Lease is; `None`: in the namespace of the account.
    pub lease_namespace: Option<String>,
    /// `--create-namespaces`.
    pub create_namespaces: bool,
    /// `--endpoints-object`.
    pub endpoints_object: bool,
    /// A CA of gangplank's own, in Secrets.
    pub own_ca: bool,
}

/// The page. Fields are added, never renamed.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct ProcessStatus {
    /// The version of gangplank.
    pub version: String,
    /// The zone that it answers, without the last dot.
    pub zone: String,
    /// Whether it writes, follows, takes over, or is alone.
    pub role: String,
    /// Its clock, in milliseconds since 1970.
    pub now_millis: u64,
    /// Whether its clock agrees with the API server's, as far as is known; true without Kubernetes.
    pub clock_agrees: bool,
    /// Where it stores.
    pub data_dir: PathBuf,
    /// The disk of that; `None` if the system does not say.
    pub disk: Option<DiskSpace>,
    /// Why nothing can be stored any more, until a restart.
    pub storage_failed: Option<String>,
    /// `None` without Kubernetes.
    pub kubernetes: Option<KubernetesFlags>,
    /// Services whose latest state is not in Kubernetes.
    pub services_behind: u64,
    /// Age of the oldest change that Kubernetes does not have, in seconds.
    pub lag_seconds: f64,
    /// Services that cannot be mirrored until somebody changes something, with the reason; those alone that there are.
    pub services_blocked: Vec<(String, u64)>,
}

/// Bytes of a file system.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct DiskSpace {
    /// That this process may still write.
    pub available_bytes: u64,
    /// In all.
    pub total_bytes: u64,
}

impl ProcessStatus {
    pub(super) fn of(admin: &Admin) -> Self {
        let Admin { zone, status, metrics, options: ProcessOptions { data_dir, kubernetes }, .. } = admin;
        let storage_failed = match status.phase() {
            Phase::StorageFailed(err) => Some(err.to_string()),
            _ => None,
        };
        let disk = rustix::fs::statvfs(data_dir).ok().map(|disk| DiskSpace {
            available_bytes: disk.f_bavail.saturating_mul(disk.f_frsize),
            total_bytes: disk.f_blocks.saturating_mul(disk.f_frsize),
        });
        let blocked = BlockedService::ALL.iter().map(|reason| (reason, metrics.mirror.blocked_services(*reason)));
        let blocked = blocked.filter(|(_, count)| *count > 0);
        Self {
            version: env!("CARGO_PKG_VERSION").into(),
            zone: zone.origin().to_string().trim_end_matches('.').to_owned(),
            role: status.replica().role().as_str().into(),
            now_millis: UnixMillis::now().0,
            clock_agrees: !status.is_clock_wrong(),
            data_dir: data_dir.clone(),
            disk,
            storage_failed,
            kubernetes: kubernetes.clone(),
            services_behind: metrics.mirror.behind.get(),
            lag_seconds: metrics.mirror.lag_seconds.get(),
            services_blocked: blocked.map(|(reason, count)| (reason.as_str().to_owned(), count)).collect(),
        }
    }
}
