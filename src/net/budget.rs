//! Splits the limit on open files among the listeners.

use std::io;

use rustix::process::{Resource, getrlimit, setrlimit};
use tracing::warn;

/// Descriptors that are reserved for the store's segments and snapshots, DNS over UDP, connections to the
/// API server, and the runtimes. At most a quarter of a small limit.
const RESERVED_DESCRIPTORS: usize = 512;

/// The limit that is assumed for RLIM_INFINITY: Linux' default for one process (fs.nr_open).
const UNLIMITED: usize = 1 << 20;

/// Connections that may be open, by kind of listener.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ConnectionCaps {
    /// gRPC: registrants and readers.
    pub grpc: usize,
    /// DNS over TCP.
    pub dns: usize,
    /// The operator's HTTP.
    pub admin: usize,
}

/// The process' limit on open files (RLIMIT_NOFILE), split among the listeners.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct DescriptorBudget {
    /// The connections that each kind of listener gets: at most those that were wanted.
    pub caps: ConnectionCaps,
    /// The limit that was split.
    pub limit: usize,
}

impl DescriptorBudget {
    /// Splits `limit` descriptors, of which `in_use` are taken already.
    ///
    /// If they do not suffice, admin gets up to an eighth first, because its share is small and probes
    /// depend on it. gRPC and DNS get half of the rest each, or more if the other wants less.
    ///
    /// # Errors
    /// When not even one connection of each kind fits.
    pub fn split(limit: usize, in_use: usize, wanted: ConnectionCaps) -> io::Result<Self> {
        // A small limit, as in a test or a strict container, must leave more than the reserve.
        let available = limit.saturating_sub(in_use + RESERVED_DESCRIPTORS.min(limit / 4));
        let admin = wanted.admin.min((available / 8).max(1));
        let rest = available.saturating_sub(admin);
        // Half, or what DNS leaves over, whichever is more: nothing lies idle while the other could use it.
        let grpc = wanted.grpc.min((rest / 2).max(rest.saturating_sub(wanted.dns)));
        let dns = wanted.dns.min(rest - grpc);
        if grpc == 0 || dns == 0 {
            let message = format!("the limit on open files (RLIMIT_NOFILE) is {limit}, which is too low: raise it");
            return Err(io::Error::other(message));
        }
        Ok(Self { caps: ConnectionCaps { grpc, dns, admin }, limit })
    }
}

/// Raises the soft limit on open files to the hard limit, because the usual soft limit is 1024. Returns
/// the limit in effect: the old one if the kernel refuses.
pub fn raise_open_files_limit() -> usize {
    let mut limit = getrlimit(Resource::Nofile);
    limit.current = limit.maximum;
    if let Err(err) = setrlimit(Resource::Nofile, limit) {
        warn!(error = &err as &dyn std::error::Error, "the limit on open files cannot be raised");
    }
    let limit = getrlimit(Resource::Nofile).current;
    limit.map_or(UNLIMITED, |limit| usize::try_from(limit).unwrap_or(UNLIMITED).min(UNLIMITED))
}

#[cfg(test)]
mod tests {
    use super::*;

    const WANTED: ConnectionCaps = ConnectionCaps { grpc: 12_000, dns: 4096, admin: 256 };

    #[test]
    fn shares_never_exceed_the_limit_and_keep_a_reserve() {
        for limit in [64, 100, 256, 1024, 4096, 10_000, 20_000, 1 << 20] {
            let DescriptorBudget { caps, .. } =
                DescriptorBudget::split(limit, 20, WANTED).expect("enough for one each");
            let used = caps.grpc + caps.dns + caps.admin + 20;
            assert!(used + RESERVED_DESCRIPTORS.min(limit / 4) <= limit, "{limit}: {caps:?}");
            assert!(caps.admin >= 1 && caps.dns >= 1 && caps.grpc >= 1, "{limit}: {caps:?}");
        }
        assert!(DescriptorBudget::split(20, 20, WANTED).is_err());
    }

    #[test]
    fn small_limit_is_shared_and_large_limit_grants_all() {
        let caps = |limit| DescriptorBudget::split(limit, 0, WANTED).expect("enough for one each").caps;
        assert_eq!(caps(20_000), WANTED);
        // 1024 - 256 in reserve = 768; an eighth for admin, half of the rest each.
        assert_eq!(caps(1024), ConnectionCaps { grpc: 336, dns: 336, admin: 96 });
        // DNS gets all that it wants, and gRPC gets the rest.
        assert_eq!(caps(10_000), ConnectionCaps { grpc: 10_000 - 512 - 256 - 4096, dns: 4096, admin: 256 });
    }
}
