//! The CA of gangplank's own: in the data directory, or, with Kubernetes, in a Secret that all processes share. It signs for
//! machines that join, and for the servers, unless `--tls-cert` has a certificate of another CA.

use std::{
    net::SocketAddr,
    path::{Path, PathBuf},
    sync::Arc,
};

use super::own_tls::{self, FilesWithOwnCa, OwnTls};
use crate::{
    config::Advertise,
    identity::{
        CertificateAuthority, ClusterCa, CurrentCa,
        joining::{RegistrantStore, RegistrantsConfig},
    },
    kubernetes::{self, secrets::Secrets},
    metrics::Metrics,
    model::{ServerAddress, wall_clock},
    net::tls::TlsFiles,
};

/// The own CA, and what follows from it.
#[derive(Debug)]
pub(super) struct OwnCa {
    /// Where the listeners have their certificate from.
    pub(super) source: OwnCaSource,
    /// Who joined.
    pub(super) registrants: Arc<RegistrantStore>,
}

/// Where the listeners of a server that machines join have their certificate from.
#[derive(Debug)]
pub(super) enum OwnCaSource {
    /// The own CA.
    Own(OwnTls),
    /// Files.
    Files(FilesWithOwnCa),
}

/// The Secrets of all processes, and what keeps the CA in use the one in its Secret.
#[derive(Debug, Clone)]
pub(super) struct SharedCa {
    pub(super) secrets: Arc<Secrets>,
    pub(super) ca: Arc<ClusterCa>,
}

impl SharedCa {
    pub(super) async fn connect(options: &kubernetes::KubernetesOptions, directory: PathBuf) -> anyhow::Result<Self> {
        let secrets = Secrets::connect(options.kubeconfig.as_deref(), options.lease_namespace.as_deref()).await?;
        Ok(Self { ca: ClusterCa::new(Arc::clone(&secrets), directory), secrets })
    }
}

impl OwnCa {
    /// The CA, with the names for which it signs, and who joined. Without one that is shared, in `directory`. The names
    /// are those of the gRPC `listeners`, which are advertised, and of the admin listeners and their `--admin-host`.
    pub(super) fn open(
        files: Option<TlsFiles>,
        directory: &Path,
        shared: Option<&SharedCa>,
        advertise: &Advertise,
        listeners: &[SocketAddr],
        (admin, admin_hosts): (&[SocketAddr], &[String]),
        metrics: &Metrics,
    ) -> anyhow::Result<Self> {
        // Those that other machines reach come first: their port is the default one of what is advertised.
        let mut listeners = listeners.to_vec();
        listeners.sort_by_key(|listener| listener.ip().is_loopback());
        let mut addresses = advertise.addresses(&listeners);
        if addresses.is_empty() {
            addresses = own_tls::reachable(&listeners)?;
        }
        // In the certificate, but not advertised: a name for the admin listener leads no registrant anywhere.
        let hosts = admin_hosts.iter().filter_map(|host| ServerAddress::parse(host, 0).ok());
        let named: Vec<_> = addresses.iter().cloned().chain(hosts).collect();
        let names = own_tls::names(&named, &[&listeners, admin].concat())?;
        let ca = match shared {
            Some(SharedCa { ca, .. }) => Arc::clone(ca.current()),
            None => CurrentCa::in_directory(CertificateAuthority::open(directory, wall_clock())?),
        };
        let config = RegistrantsConfig { ca: Arc::clone(&ca), signs_servers: files.is_none(), addresses };
        let metrics = Arc::clone(&metrics.joining);
        let registrants = match shared {
            Some(SharedCa { secrets, .. }) => RegistrantStore::shared(Arc::clone(secrets), directory, config, metrics),
            None => RegistrantStore::open(directory, config, metrics)?,
        };
        let source = match files {
            Some(files) => OwnCaSource::Files(FilesWithOwnCa::new(files, ca)),
            None => OwnCaSource::Own(OwnTls::new(ca, names)),
        };
        Ok(Self { source, registrants })
    }
}
