//! The composition root: [`bind`] acquires the resources that another process may hold, and
//! [`BoundServer::run`] starts and stops the parts. The only module that imports all others; `main` and the
//! tests share it.

mod own_ca;
mod own_tls;
mod parts;
mod security;

use std::{
    convert::Infallible,
    io,
    net::{IpAddr, SocketAddr, TcpListener as StdTcpListener},
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context as _, anyhow, ensure};
use futures::FutureExt as _;
use tokio::{net::TcpListener, runtime::Handle, sync::oneshot, time::timeout};
use tokio_util::sync::CancellationToken;
use tracing::{info, warn};

use self::{
    own_ca::{OwnCa, SharedCa},
    parts::Parts,
};
use crate::{
    admin::{self, Admin, KubernetesFlags, ProcessOptions},
    config::{Config, Tls},
    dns, grpc,
    kubernetes::{Kubernetes, api::Reviews},
    metrics::Metrics,
    model::{ServerAddress, test_clock_offset},
    net::{self, ConnectionCaps, DescriptorBudget},
    registry::{self, OutboxWord, RegistryHandle, Unrecovered},
    store::{self, DataDir, RecoveryProgress},
    upstream::Lookups,
    zone::{NameChange, Publisher, Zone, ZoneConfig},
};

/// How long all parts may take to end after the stop.
const STOP_TIMEOUT: Duration = Duration::from_secs(10);

/// The part that holds the data directory.
const REGISTRY: &str = "the registry";

/// Connections that may wait to be accepted, as for DNS over TCP; net.core.somaxconn may say less.
const BACKLOG: i32 = 1024;

/// Threads of the admin listener: a long list on one does not delay a probe on the other.
const ADMIN_THREADS: usize = 2;

/// How often a recovery logs its progress; a shorter recovery logs nothing.
const PROGRESS_INTERVAL: Duration = Duration::from_secs(1);

/// A server that holds its data directory and its addresses, and does not serve yet.
#[derive(Debug)]
pub struct BoundServer {
    config: Config,
    data_dir: DataDir,
    dns: dns::BoundSockets,
    grpc: Vec<StdTcpListener>,
    admin: Vec<StdTcpListener>,
}

/// Locks the data directory, then binds the addresses, so that a conflict with another process is found
/// before the server serves.
///
/// # Errors
/// Names the directory or address that another process holds or that cannot be bound.
pub fn bind(mut config: Config) -> anyhow::Result<BoundServer> {
    share_descriptors(&mut config)?;
    let offset = test_clock_offset();
    if offset != 0 {
        warn!("the clock of this process is shifted by {offset} ms, for a test");
    }
    // Before any address: of two processes on one directory the second must not answer anything, not even for a moment.
    let data_dir = DataDir::lock(&config.data_dir)?;
    let grpc: Vec<_> = config.grpc_listen.iter().map(|(address, _)| *address).collect();
    let grpc = listen("--grpc-listen", &grpc)?;
    let admin: Vec<_> = config.admin_listen.iter().map(|(address, _)| *address).collect();
    let admin = listen("--admin-listen", &admin)?;
    let dns = dns::bind(&config.dns).context("--dns-listen")?;
    Ok(BoundServer { config, data_dir, dns, grpc, admin })
}

fn listen(flag: &str, addresses: &[SocketAddr]) -> anyhow::Result<Vec<StdTcpListener>> {
    let one = |address: &SocketAddr| {
        let listener = StdTcpListener::bind(address)?;
        // The 128 of std overflow when thousands of clients reconnect at once, and each that is dropped waits for
        // a second before it tries again.
        socket2::SockRef::from(&listener).listen(BACKLOG)?;
        listener.set_nonblocking(true)?;
        Ok(listener)
    };
    addresses
        .iter()
        .map(|address| {
            one(address).map_err(|err: io::Error| match err.kind() {
                io::ErrorKind::AddrInUse => anyhow!("{flag} {address}: another process listens there already"),
                _ => anyhow!(err).context(format!("{flag} {address} cannot be bound")),
            })
        })
        .collect()
}

/// Splits the limit on open files among the listeners. Logs a warning for each that gets less than its flag.
fn share_descriptors(config: &mut Config) -> anyhow::Result<()> {
    let limit = net::raise_open_files_limit();
    let dns = &mut config.dns;
    let sockets = config.grpc_listen.len() + config.admin_listen.len() + dns.listen.len() * (1 + dns.threads.get());
    let wanted =
        ConnectionCaps { grpc: config.grpc.connections, dns: dns.tcp.connections, admin: config.admin_connections };
    let DescriptorBudget { caps, limit } = DescriptorBudget::split(limit, sockets, wanted)?;
    for (flag, wanted, granted) in [
        ("--grpc-connections", wanted.grpc, caps.grpc),
        ("--tcp-connections", wanted.dns, caps.dns),
        ("--admin-connections", wanted.admin, caps.admin),
    ] {
        if granted < wanted {
            warn!("{flag} {wanted}: lowered to {granted}, because the limit on open files (RLIMIT_NOFILE) is {limit}");
        }
    }
    config.grpc.connections = caps.grpc;
    dns.tcp.connections = caps.dns;
    config.admin_connections = caps.admin;
    Ok(())
}

impl BoundServer {
    /// Every listener: its protocol (`grpc`, `dns` or `admin`), and its address with the real port.
    ///
    /// # Errors
    /// When the system does not return an address.
    pub fn listeners(&self) -> io::Result<Vec<(&'static str, SocketAddr)>> {
        let mut all = Vec::new();
        for listener in &self.grpc {
            all.push(("grpc", listener.local_addr()?));
        }
        all.extend(self.dns.addresses().into_iter().map(|address| ("dns", address)));
        for listener in &self.admin {
            all.push(("admin", listener.local_addr()?));
        }
        Ok(all)
    }

    /// Serves until `shutdown`, then drains: first the server becomes unready and refuses
    /// registrations, and DNS answers until the drain time is over. Calls `ready` with the generation
    /// when DNS serves the stored services.
    ///
    /// # Errors
    /// The first part that fails; its failure stops all others.
    pub async fn run(
        self,
        shutdown: impl Future<Output = ()>,
        ready: impl FnOnce(u64) + Send + 'static,
    ) -> anyhow::Result<()> {
        let Self { config, data_dir, dns, grpc, admin } = self;
        // Without `..`, so that an unused setting does not compile. `bind` uses those with `_`.
        let Config {
            zone,
            upstream,
            validator,
            store,
            registry,
            kubernetes,
            advertise,
            drain,
            grpc: grpc_limits,
            admin_connections,
            max_staleness,
            security,
            grpc_listen,
            admin_listen,
            admin_hosts,
            dns: _,
            data_dir: directory,
        } = config;
        let metrics = Arc::new(Metrics::new());
        let listeners = grpc.iter().map(StdTcpListener::local_addr).collect::<io::Result<Vec<_>>>()?;
        let addresses = advertise.addresses(&listeners);
        let admin_addresses = admin.iter().map(StdTcpListener::local_addr).collect::<io::Result<Vec<_>>>()?;
        let shared = match &kubernetes {
            Some(options) if security.tls.is_joined() => Some(SharedCa::connect(options, directory.clone()).await?),
            _ => None,
        };
        let own = if security.tls.is_joined() {
            let files = match &security.tls {
                Tls::Files(files) => Some(files.clone()),
                Tls::Off | Tls::OwnCa => None,
            };
            let names = (&admin_addresses[..], &admin_hosts[..]);
            Some(OwnCa::open(files, &directory, shared.as_ref(), &advertise, &listeners, names, &metrics)?)
        } else {
            None
        };
        let admin_security = admin_listen.into_iter().map(|(_, how)| how);
        let admin_security: Vec<_> = admin_addresses.into_iter().zip(admin_security).collect();
        security::announce_admin(&admin_security, &security);
        let reviews = match &kubernetes {
            Some(options) => {
                let reviews = Reviews::connect(options.kubeconfig.as_deref(), Arc::clone(&metrics.identity)).await?;
                Some(Arc::new(reviews))
            }
            None => None,
        };
        let kubernetes_flags = kubernetes.as_ref().map(|options| KubernetesFlags {
            lease_namespace: options.lease_namespace.clone(),
            create_namespaces: options.create_namespaces,
            endpoints_object: options.endpoints_object,
            own_ca: shared.is_some(),
        });
        let security = security::create(security, own, reviews, &metrics)?;
        let kubernetes = match kubernetes {
            Some(options) => {
                if addresses.is_empty() {
                    warn!(
                        "nothing says where registrants reach this process, so others cannot name it: give --advertise, or \
                         set POD_IP by the downward API"
                    );
                }
                let usable = |address: &ServerAddress| address.ip().is_some_and(|ip| !ip.is_loopback());
                ensure!(
                    options.grpc_service.is_none() || addresses.iter().any(usable),
                    "--grpc-service: needs an IP address of this process that others reach: give --advertise ADDR, or set \
                     POD_IP by the downward API"
                );
                let secrets = shared.as_ref().map(|shared| Arc::clone(&shared.secrets));
                Some(Kubernetes::connect(options, addresses, secrets).await?)
            }
            None => None,
        };
        let (zone, publisher) = Zone::new(with_name_servers(zone, &dns.reachable_addresses()?));
        let (registry, unrecovered) = registry::new(registry, Arc::clone(&metrics));
        let status = registry.status().clone();

        // In the order of the stop: registrations first, then the writer that answers them, then DNS.
        let [stop_grpc, stop_writer, stop_answers] = std::array::from_fn(|_| CancellationToken::new());
        let mut parts = Parts::default();

        let answers = dns.run(Arc::clone(&zone), Arc::clone(&metrics), stop_answers.clone());
        parts.spawn("the DNS listeners", answers);

        let (followed, stopped) = (Arc::clone(&security), stop_answers.clone());
        parts.spawn("the certificates and the policy", async move {
            let _ = stopped.run_until_cancelled(followed.follow_files()).await;
            Ok::<_, Infallible>(())
        });

        let pages = Admin {
            zone: Arc::clone(&zone),
            snapshots: Arc::clone(registry.snapshots()),
            status: status.clone(),
            metrics: Arc::clone(&metrics),
            security: Arc::clone(&security),
            hosts: admin_hosts,
            max_staleness,
            options: ProcessOptions { data_dir: directory.clone(), kubernetes: kubernetes_flags },
        };
        let admin = admin.into_iter().zip(admin_security.into_iter().map(|(_, how)| how)).collect();
        let admin = admin::run(admin, pages, admin_connections, stop_answers.clone());
        parts.spawn("the admin listeners", net::run_on_runtime("admin", ADMIN_THREADS, admin)?);

        if let Some(options) = upstream {
            let lookups = Lookups::new(options, Arc::clone(&metrics))?;
            let (registry, stop) = (registry.clone(), stop_answers.clone());
            parts.spawn("the lookups of names", async move {
                let _ = stop.run_until_cancelled(look_up_names(lookups, registry)).await;
                Ok::<_, Infallible>(())
            });
        }
        if let Some(shared) = shared {
            let stop = stop_answers.clone();
            let follow = async move { stop.run_until_cancelled(shared.ca.run()).await };
            parts.spawn("the CA", follow.map(|ended| ended.map_or(Ok(()), |ended| ended.map(|never| match never {}))));
        }
        if let Some(registrants) = security.registrants.clone() {
            let (stop, status) = (stop_answers.clone(), status.clone());
            let run = async move {
                stop.run_until_cancelled(registrants.run(|| status.replica().is_writer())).await;
                Ok::<_, Infallible>(())
            };
            parts.spawn("the registrants", run);
        }
        if let Some(kubernetes) = kubernetes {
            let directory = data_dir.identity()?;
            let mirror = kubernetes.run(directory, registry.clone(), Arc::clone(&metrics), stop_answers.clone());
            parts.spawn("the Kubernetes mirror", mirror);
            let hand_over =
                grpc::hand_over(registry.clone(), Arc::clone(&metrics), security.tls.clone(), stop_answers.clone());
            parts.spawn("the hand-over", hand_over.map(Ok::<_, Infallible>));
        }

        let services = grpc::ServerContext { registry: registry.clone(), validator, metrics, security };
        let grpc = from_std(grpc)?.into_iter().zip(grpc_listen.into_iter().map(|(_, security)| security)).collect();
        let calls = grpc::run(grpc, services, grpc_limits, stop_grpc.clone());
        let then_writer = stop_writer.clone();
        parts.spawn("the gRPC listeners", async move {
            let ended = calls.await;
            if registry.mirror_progress().is_mirrored() {
                // The writer goes on: for what Kubernetes confirms, and another process takes over, until the end of the drain.
                registry.end_submissions().await;
            } else {
                then_writer.cancel();
            }
            ended
        });

        let recovery = Recovery { unrecovered, data_dir, store, publisher, zone };
        let writer = spawn_writer(recovery, ready, stop_writer.clone())?;
        let unconfirmed = Arc::new(AtomicUsize::new(0));
        let left = Arc::clone(&unconfirmed);
        parts.spawn(REGISTRY, async move {
            // Relaxed: it is read after the parts have ended, and with them this task.
            left.store(writer.await.context("its thread panicked")??, Ordering::Relaxed);
            Ok::<_, anyhow::Error>(())
        });

        let mut failed = tokio::select! {
            () = shutdown => None,
            failed = parts.first_end() => Some(failed),
        };
        // Unready and refusing before anything is stopped: clients turn elsewhere while what they have sent is
        // answered.
        status.drain();
        stop_grpc.cancel();
        // After a failure there is no drain: half a server must not stay in the way of a whole one.
        if failed.is_none() {
            info!(?drain, "shutting down: registrations are refused, DNS answers until the drain time is over");
            failed = parts.drain(drain).await;
        }
        stop_writer.cancel();
        // DNS last: every answer until here is still right.
        stop_answers.cancel();
        // An end to the stop: a supervisor would send SIGKILL, and nobody would read why.
        if timeout(STOP_TIMEOUT, parts.end(&mut failed)).await.is_err() {
            let running = parts.running();
            warn!("not everything stopped in time: {}; what was acknowledged is safe", running.join(", "));
            // Any other part only holds connections.
            if running.contains(&REGISTRY) {
                failed.get_or_insert_with(|| anyhow!("{REGISTRY} did not stop in time: the journal was not closed"));
            }
        }
        match (failed, unconfirmed.load(Ordering::Relaxed)) {
            (Some(failed), _) => Err(failed),
            (None, 0) => Ok(()),
            (None, left) => Err(anyhow!(
                "accepted changes that Kubernetes lacks: {left}, each is in the log; they are in the data directory, and count when \
                 a process starts on it"
            )),
        }
    }
}

/// Looks up the names that are instances, and has what they lead to served. Ends with the registry.
async fn look_up_names(mut lookups: Lookups, registry: RegistryHandle) {
    loop {
        tokio::select! {
            changes = registry.names().changes() => {
                for NameChange { name, used } in changes {
                    if used {
                        lookups.want(name);
                    } else {
                        lookups.forget(&name);
                    }
                }
            }
            statuses = lookups.next() => {
                if registry.resolved(statuses).await.is_err() {
                    return;
                }
            }
        }
    }
}

/// The parameters of the registry's thread.
#[derive(Debug)]
struct Recovery {
    unrecovered: Unrecovered,
    data_dir: DataDir,
    store: store::StoreOptions,
    publisher: Publisher,
    zone: Arc<Zone>,
}

/// Recovers the store, then runs the writer, on a thread of its own, because both block. The receiver gets
/// how many accepted changes Kubernetes lacks at the end.
fn spawn_writer(
    recovery: Recovery,
    ready: impl FnOnce(u64) + Send + 'static,
    stop: CancellationToken,
) -> anyhow::Result<oneshot::Receiver<anyhow::Result<usize>>> {
    let (ended, end) = oneshot::channel();
    let runtime = Handle::current();
    let work = move || -> anyhow::Result<usize> {
        let Recovery { unrecovered, data_dir, store, publisher, zone } = recovery;
        let mut reporter = ProgressReporter { last: Instant::now() };
        let mut progress = |progress| {
            if let Some(line) = reporter.report(Instant::now(), progress) {
                info!("{line}");
            }
        };
        // DNS answers SERVFAIL until this is over, and the zone is set ready below.
        let mut writer = unrecovered.recover(data_dir, &store, publisher, &mut progress)?;
        let unconfirmed = if writer.await_restore(&runtime, &stop) {
            zone.set_ready();
            ready(writer.generation());
            writer.run(&runtime, &stop)
        } else {
            writer.unconfirmed()
        };
        for OutboxWord { service, id, instance, stamp } in &unconfirmed {
            let change = if instance.is_some() { "registration" } else { "removal" };
            warn!(%service, instance = %id, %stamp, change, "accepted, and not in Kubernetes: it stays in the data directory");
        }
        Ok(unconfirmed.len())
    };
    thread::Builder::new()
        .name("registry".into())
        .spawn(move || {
            // The receiver is gone if the server has stopped during the recovery.
            let _ = ended.send(work());
        })
        .context("the registry's thread cannot be started")?;
    Ok(end)
}

/// Reports the progress of a long recovery once per interval.
#[derive(Debug)]
struct ProgressReporter {
    last: Instant,
}

impl ProgressReporter {
    fn report(&mut self, now: Instant, RecoveryProgress { read, total }: RecoveryProgress) -> Option<String> {
        if now.duration_since(self.last) < PROGRESS_INTERVAL {
            return None;
        }
        self.last = now;
        // An empty store has nothing to read.
        let percent = (read * 100).checked_div(total).unwrap_or(100);
        Some(format!("recovering: {percent} % ({} of {} MiB)", read >> 20, total >> 20))
    }
}

fn from_std(listeners: Vec<StdTcpListener>) -> io::Result<Vec<TcpListener>> {
    listeners.into_iter().map(TcpListener::from_std).collect()
}

/// The zone with addresses of its name server: the configured ones, else `reachable`.
fn with_name_servers(zone: ZoneConfig, reachable: &[IpAddr]) -> ZoneConfig {
    if !zone.ns_addresses.is_empty() {
        return zone;
    }
    ZoneConfig { ns_addresses: reachable.to_vec(), ..zone }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn long_recovery_reports_its_progress() {
        let begun = Instant::now();
        let mut reporter = ProgressReporter { last: begun };
        let mut after = |millis, read| {
            let progress = RecoveryProgress { read, total: 300 << 20 };
            reporter.report(begun + Duration::from_millis(millis), progress)
        };
        assert_eq!(after(999, 10 << 20), None);
        assert_eq!(after(1000, 120 << 20).as_deref(), Some("recovering: 40 % (120 of 300 MiB)"));
        assert_eq!(after(1999, 200 << 20), None);
        assert_eq!(after(2000, 300 << 20).as_deref(), Some("recovering: 100 % (300 of 300 MiB)"));
    }

    #[test]
    fn name_server_addresses_default_to_the_reachable_bound_ones() {
        let zone = |ns: &[&str]| ZoneConfig {
            origin: crate::model::DnsName::parse("cluster.local").expect("a name"),
            ttl: 5,
            reverse_zones: Vec::new(),
            ns_addresses: ns.iter().map(|ip| ip.parse().expect("an address")).collect(),
            publish_not_ready: false,
            flatten_names: false,
        };
        let reachable: Vec<IpAddr> = zone(&["10.0.0.2", "10.0.0.3"]).ns_addresses;
        assert_eq!(with_name_servers(zone(&[]), &reachable).ns_addresses, reachable);
        assert_eq!(with_name_servers(zone(&["10.9.9.9"]), &reachable).ns_addresses, zone(&["10.9.9.9"]).ns_addresses);
    }
}
