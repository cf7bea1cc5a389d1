//! The CA of gangplank's own: in the data directory, or, with Kubernetes, in a Secret that all processes share.

use std::{
    net::SocketAddr,
    path::{Path, PathBuf},
    sync::Arc,
};

use super::own_tls::{self, OwnTls};
use crate::{
    config::Advertise,
    identity::{CertificateAuthority, ClusterCa, CurrentCa, joining::RegistrantStore},
    kubernetes::{self, secrets::Secrets},
    metrics::Metrics,
    model::{ServerAddress, wall_clock},
};

/// The own CA, and what follows from it.
#[derive(Debug)]
pub(super) struct OwnCa {
    /// The certificate of the listeners.
    pub(super) tls: OwnTls,
    /// Who joined.
    pub(super) registrants: Arc<RegistrantStore>,
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
        let (ca, registrants) = match shared {
            Some(SharedCa { secrets, ca }) => {
                let (ca, metrics) = (Arc::clone(ca.current()), Arc::clone(&metrics.joining));
                let shared =
                    RegistrantStore::shared(Arc::clone(secrets), directory, Arc::clone(&ca), addresses, metrics);
                (ca, shared)
            }
            None => {
                let ca = CurrentCa::in_directory(CertificateAuthority::open(directory, wall_clock())?);
                let metrics = Arc::clone(&metrics.joining);
                let registrants = RegistrantStore::open(directory, Arc::clone(&ca), addresses, metrics)?;
                (ca, registrants)
            }
        };
        Ok(Self { tls: OwnTls::new(ca, names), registrants })
    }
}
