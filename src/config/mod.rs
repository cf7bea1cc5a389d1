//! Configuration of `gangplank serve`: flags, environment variables, defaults, and their checks.

mod advertise;
mod quotas;
mod security;
mod upstream;

use std::{
    env,
    net::{IpAddr, SocketAddr},
    num::{NonZeroU32, NonZeroUsize},
    path::PathBuf,
    thread,
    time::Duration,
};

use anyhow::{Context as _, ensure};
use clap::{Args, builder::FalseyValueParser};

use crate::{
    dns::{DnsConfig, MAX_NSID, TcpLimits},
    grpc, kubernetes,
    model::{DnsName, Namespace, ServiceName, Validator},
    registry,
    security::ListenerSecurity,
    store,
    upstream::UpstreamOptions,
    zone::ZoneConfig,
};

pub use self::{
    advertise::Advertise,
    security::{SecurityConfig, Tls},
};
use self::{
    quotas::QuotaArgs,
    security::{Listeners, SecurityArgs},
    upstream::UpstreamArgs,
};

/// Largest `--ttl` in seconds. Clients cache a removed instance for that long.
const MAX_TTL: u32 = 3600;

/// Longest duration of any flag, so that a deadline never overflows the clock.
const MAX_DURATION: Duration = Duration::from_secs(24 * 60 * 60);

/// Smallest `--max-staleness`: a quiet watch is asked for every 3 s.
const MIN_STALENESS: Duration = Duration::from_secs(5);

/// Smallest `--segment-bytes`. With smaller segments the journal would mostly close segments.
const MIN_SEGMENT: u64 = 4096;

/// The flags of `gangplank serve`. Every flag is an environment variable too, lists with commas.
#[derive(Debug, Args)]
pub struct ServeArgs {
    /// Where registrants connect; repeatable. Beyond loopback by TLS: with --tls-cert, or else with a CA of gangplank's
    /// own, in the data directory or, with --kubernetes, in a Secret; --insecure takes plaintext
    #[arg(
        long,
        env = "GANGPLANK_GRPC_LISTEN",
        value_name = "ADDR:PORT",
        value_delimiter = ',',
        default_value = "127.0.0.1:9080"
    )]
    grpc_listen: Vec<SocketAddr>,

    /// Where DNS is answered, over UDP and TCP; repeatable. 0.0.0.0 and [::] mean every address of this machine
    #[arg(
        long,
        env = "GANGPLANK_DNS_LISTEN",
        value_name = "ADDR:PORT",
        value_delimiter = ',',
        default_value = "127.0.0.1:1053"
    )]
    dns_listen: Vec<SocketAddr>,

    /// Where metrics, readiness and the JSON are served over HTTP; repeatable. Beyond loopback by TLS like --grpc-listen,
    /// to who shows a client certificate or a token and may see the path; /livez and /readyz to everybody
    #[arg(
        long,
        env = "GANGPLANK_ADMIN_LISTEN",
        value_name = "ADDR:PORT",
        value_delimiter = ',',
        default_value = "127.0.0.1:9153"
    )]
    admin_listen: Vec<SocketAddr>,

    /// A name by which --admin-listen may be asked, beside IP addresses and localhost; repeatable. Others get 421, for a
    /// stranger's web page could point a name at this listener (DNS rebinding). A CA of gangplank's own certifies it
    #[arg(long, env = "GANGPLANK_ADMIN_HOST", value_name = "NAME", value_delimiter = ',')]
    admin_host: Vec<String>,

    /// Where registrations are kept [default: $XDG_STATE_HOME/gangplank, or ~/.local/state/gangplank]
    #[arg(long, env = "GANGPLANK_DATA_DIR", value_name = "DIR")]
    data_dir: Option<PathBuf>,

    /// Start although what is stored is damaged, and lose what cannot be read
    #[arg(long, env = "GANGPLANK_ACCEPT_LOSS", value_parser = FalseyValueParser::new())]
    accept_loss: bool,

    /// Bytes after which a journal segment is closed and merged into the snapshot [default: 67108864]
    #[arg(long, env = "GANGPLANK_SEGMENT_BYTES", value_name = "N")]
    segment_bytes: Option<u64>,

    // The former name of --segment-bytes.
    #[arg(long, env = "GANGPLANK_SEGMENT_OCTETS", hide = true, conflicts_with = "segment_bytes")]
    segment_octets: Option<u64>,

    /// The cluster's zone
    #[arg(long, env = "GANGPLANK_ZONE", value_name = "NAME", default_value = "cluster.local")]
    zone: String,

    /// Seconds that answers may be cached, 0..=3600
    #[arg(long, env = "GANGPLANK_TTL", value_name = "SECONDS", default_value_t = 5)]
    ttl: u32,

    /// Threads that answer UDP, on each address [default: one per core]
    #[arg(long, env = "GANGPLANK_DNS_THREADS", value_name = "N")]
    dns_threads: Option<NonZeroUsize>,

    /// A network whose reverse zone is served: its unknown addresses are NXDOMAIN instead of REFUSED; repeatable
    #[arg(long, env = "GANGPLANK_REVERSE_ZONE", value_name = "CIDR", value_delimiter = ',')]
    reverse_zone: Vec<String>,

    /// The addresses of ns.dns.ZONE; repeatable [default: the DNS addresses that are not loopback]
    #[arg(long, env = "GANGPLANK_NS_ADDRESS", value_name = "ADDR", value_delimiter = ',')]
    ns_address: Vec<IpAddr>,

    /// Serve instances that are not ready too
    #[arg(long, env = "GANGPLANK_PUBLISH_NOT_READY", value_parser = FalseyValueParser::new())]
    publish_not_ready: bool,

    #[command(flatten)]
    upstream: UpstreamArgs,

    /// The name server identifier, NSID (RFC 5001) [default: the host name]
    #[arg(long, env = "GANGPLANK_NSID", value_name = "TEXT")]
    nsid: Option<String>,

    #[command(flatten)]
    security: SecurityArgs,

    /// Mirror what is registered into Kubernetes, and restore it from there
    #[arg(long, env = "GANGPLANK_KUBERNETES", value_parser = FalseyValueParser::new())]
    kubernetes: bool,

    /// How to reach the API server; means --kubernetes [default: the pod's own ServiceAccount]
    #[arg(long, env = "GANGPLANK_KUBECONFIG", value_name = "FILE")]
    kubeconfig: Option<PathBuf>,

    /// Namespace of the Lease gangplank-writer, and of the Secrets of a CA of gangplank's own, which every process of one
    /// cluster has to share [default: that of the ServiceAccount, or of the kubeconfig's context]
    #[arg(long, env = "GANGPLANK_LEASE_NAMESPACE", value_name = "NAME")]
    lease_namespace: Option<String>,

    /// Where registrants reach this process: ADDRESS or NAME, with :PORT if it is not the one of --grpc-listen; repeatable.
    /// Written into the Lease, for registrants that reach another process; and, with a CA of its own, into the
    /// certificate and into join tokens [default: POD_IPS or POD_IP, or the addresses of --grpc-listen]
    #[arg(long, env = "GANGPLANK_ADVERTISE", value_name = "ADDR|NAME[:PORT]", value_delimiter = ',')]
    advertise: Vec<String>,

    /// After this long without word from the API server, a process on standby fails /readyz, and goes on
    /// answering; 5s or more [default: never]
    #[arg(long, env = "GANGPLANK_MAX_STALENESS", value_name = "TIME", value_parser = humantime::parse_duration)]
    max_staleness: Option<Duration>,

    /// A Service without a selector, in the namespace of the Lease, that leads registrants to the process that writes:
    /// that process keeps its EndpointSlices
    #[arg(long, env = "GANGPLANK_GRPC_SERVICE", value_name = "NAME")]
    grpc_service: Option<String>,

    /// Create a namespace that does not exist, instead of refusing its registrations with 404
    #[arg(long, env = "GANGPLANK_CREATE_NAMESPACES", value_parser = FalseyValueParser::new())]
    create_namespaces: bool,

    /// Endpoints in one EndpointSlice, 1..=1000
    #[arg(long, env = "GANGPLANK_SLICE_ENDPOINTS", value_name = "N", default_value_t = kubernetes::DEFAULT_MAX_ENDPOINTS)]
    slice_endpoints: usize,

    /// Write the older Endpoints object beside the EndpointSlices
    #[arg(long, env = "GANGPLANK_ENDPOINTS_OBJECT", value_parser = FalseyValueParser::new())]
    endpoints_object: bool,

    /// Requests to the API server, a second, at most; twice as many at once
    #[arg(long, env = "GANGPLANK_KUBERNETES_QPS", value_name = "N", default_value = "400")]
    kubernetes_qps: NonZeroU32,

    /// How long a Service that gangplank created stays when its last instance has gone
    #[arg(long, env = "GANGPLANK_SERVICE_LINGER", value_name = "TIME", default_value = "30s", value_parser = humantime::parse_duration)]
    service_linger: Duration,

    /// Instances that may be registered; beyond that the answer is 507
    #[arg(long, env = "GANGPLANK_MAX_INSTANCES", value_name = "N", default_value_t = 2_000_000)]
    max_instances: usize,

    #[command(flatten)]
    quotas: QuotaArgs,

    /// gRPC connections in all; when there is no room, the idlest without a call is closed
    #[arg(long, env = "GANGPLANK_GRPC_CONNECTIONS", value_name = "N", default_value_t = 12_000)]
    grpc_connections: usize,

    /// A gRPC connection without a call is closed after this long
    #[arg(long, env = "GANGPLANK_GRPC_IDLE", value_name = "TIME", default_value = "5m", value_parser = humantime::parse_duration)]
    grpc_idle: Duration,

    /// A gRPC connection takes no new calls after about this long: the client opens another, open streams go on
    #[arg(long, env = "GANGPLANK_GRPC_MAX_AGE", value_name = "TIME", default_value = "1h", value_parser = humantime::parse_duration)]
    grpc_max_age: Duration,

    /// Admin connections in all; when there is no room, the idlest is closed
    #[arg(long, env = "GANGPLANK_ADMIN_CONNECTIONS", value_name = "N", default_value_t = 256)]
    admin_connections: usize,

    /// DNS connections over TCP in all; when there is no room, the idlest of the address that has most is closed
    #[arg(long, env = "GANGPLANK_TCP_CONNECTIONS", value_name = "N", default_value_t = 4096)]
    tcp_connections: usize,

    /// DNS connections over TCP of one address, or of one IPv6 /64 [default: no limit; CoreDNS is one address]
    #[arg(long, env = "GANGPLANK_TCP_PER_PEER", value_name = "N")]
    tcp_per_peer: Option<usize>,

    /// A DNS connection without a question is closed after this long
    #[arg(long, env = "GANGPLANK_TCP_IDLE", value_name = "TIME", default_value = "10s", value_parser = humantime::parse_duration)]
    tcp_idle: Duration,

    /// A DNS message over TCP must arrive whole, and its answer be taken, within this long
    #[arg(long, env = "GANGPLANK_TCP_MESSAGE", value_name = "TIME", default_value = "5s", value_parser = humantime::parse_duration)]
    tcp_message: Duration,

    /// Questions that may wait on one DNS connection
    #[arg(long, env = "GANGPLANK_TCP_PIPELINED", value_name = "N", default_value_t = 64)]
    tcp_pipelined: usize,

    /// How long DNS goes on answering after SIGTERM, while clients turn elsewhere
    #[arg(long, env = "GANGPLANK_DRAIN", value_name = "TIME", default_value = "10s", value_parser = humantime::parse_duration)]
    drain: Duration,
}

/// The checked flags, in the types of the modules that use them.
#[derive(Debug, Clone)]
pub struct Config {
    /// Where registrants connect, and how.
    pub grpc_listen: Vec<(SocketAddr, ListenerSecurity)>,
    /// Who may connect, and do what.
    pub security: SecurityConfig,
    /// Where operators connect, and how.
    pub admin_listen: Vec<(SocketAddr, ListenerSecurity)>,
    /// Names by which operators may ask, beside IP addresses and `localhost`.
    pub admin_hosts: Vec<String>,
    /// Limits on gRPC connections.
    pub grpc: grpc::ConnectionLimits,
    /// Most admin connections.
    pub admin_connections: usize,
    /// Beyond this age of what it answers, a process on standby is not ready; 5 s at least. `None`: at any age it is.
    pub max_staleness: Option<Duration>,
    /// The DNS listeners.
    pub dns: DnsConfig,
    /// The zone; without addresses of its name server if no flag gives them.
    pub zone: ZoneConfig,
    /// How DNS names that are instances are looked up; `None`: no instance is a name.
    pub upstream: Option<UpstreamOptions>,
    /// Parses and checks registrations.
    pub validator: Validator,
    /// Where registrations are kept.
    pub data_dir: PathBuf,
    /// Options of the store.
    pub store: store::StoreOptions,
    /// Options of the registry.
    pub registry: registry::RegistryOptions,
    /// Options of the mirror; `None` without Kubernetes.
    pub kubernetes: Option<kubernetes::KubernetesOptions>,
    /// Where registrants reach this process.
    pub advertise: Advertise,
    /// How long DNS answers after SIGTERM.
    pub drain: Duration,
}

impl ServeArgs {
    /// Checks the flags.
    ///
    /// # Errors
    /// The first invalid flag, with the reason.
    pub fn check(self) -> anyhow::Result<Config> {
        // Without `..`, so that an unused flag does not compile.
        let Self {
            grpc_listen,
            dns_listen,
            admin_listen,
            admin_host,
            data_dir,
            accept_loss,
            segment_bytes,
            segment_octets,
            zone,
            ttl,
            dns_threads,
            reverse_zone,
            ns_address,
            publish_not_ready,
            upstream,
            nsid,
            security,
            kubernetes,
            kubeconfig,
            lease_namespace,
            advertise,
            max_staleness,
            grpc_service,
            create_namespaces,
            slice_endpoints,
            endpoints_object,
            kubernetes_qps,
            service_linger,
            max_instances,
            quotas,
            grpc_connections,
            grpc_idle,
            grpc_max_age,
            admin_connections,
            tcp_connections,
            tcp_per_peer,
            tcp_idle,
            tcp_message,
            tcp_pipelined,
            drain,
        } = self;

        // Whoever names a kubeconfig means Kubernetes; forgetting the other flag would leave the server silently
        // without it.
        let kubernetes = kubernetes || kubeconfig.is_some();
        let listeners = Listeners { grpc: grpc_listen, admin: admin_listen };
        let (Listeners { grpc: grpc_listen, admin: admin_listen }, security) =
            security.check(listeners, kubernetes, quotas.usage())?;
        let most = kubernetes::MAX_ENDPOINTS;
        ensure!((1..=most).contains(&slice_endpoints), "--slice-endpoints {slice_endpoints}: must be 1..={most}");
        ensure!(
            service_linger <= MAX_DURATION,
            "--service-linger: must be at most {}",
            humantime::format_duration(MAX_DURATION)
        );
        if let Some(namespace) = &lease_namespace {
            Namespace::parse(namespace).with_context(|| format!("--lease-namespace {namespace:?}"))?;
        }
        for (flag, given) in [
            ("--create-namespaces", create_namespaces),
            ("--endpoints-object", endpoints_object),
            ("--lease-namespace", lease_namespace.is_some()),
            ("--grpc-service", grpc_service.is_some()),
        ] {
            ensure!(kubernetes || !given, "{flag}: means nothing without --kubernetes");
        }
        ensure!(
            kubernetes || security.tls.is_joined() || advertise.is_empty(),
            "--advertise: means nothing without --kubernetes, and without a listener beyond loopback and a CA of gangplank's own"
        );
        if let Some(service) = &grpc_service {
            ServiceName::parse(service).with_context(|| format!("--grpc-service {service:?}"))?;
        }
        let advertise = Advertise::new(advertise, kubernetes)?;
        // In lower case, as names in questions are compared (RFC 4343).
        let origin = DnsName::parse(&zone.to_ascii_lowercase()).with_context(|| format!("--zone {zone:?}"))?;
        ensure!(ttl <= MAX_TTL, "--ttl {ttl}: must be 0..={MAX_TTL} seconds");
        let nsid = nsid.map_or_else(|| gethostname::gethostname().into_encoded_bytes(), String::into_bytes);
        ensure!(nsid.len() <= MAX_NSID, "--nsid: must have at most {MAX_NSID} octets, has {}", nsid.len());
        for (flag, value) in [
            ("--grpc-connections", grpc_connections),
            ("--admin-connections", admin_connections),
            ("--tcp-connections", tcp_connections),
            ("--tcp-per-peer", tcp_per_peer.unwrap_or(1)),
            ("--tcp-pipelined", tcp_pipelined),
        ] {
            ensure!(value > 0, "{flag}: must be at least 1");
        }
        for (flag, value) in [
            ("--grpc-idle", grpc_idle),
            ("--grpc-max-age", grpc_max_age),
            ("--tcp-idle", tcp_idle),
            ("--tcp-message", tcp_message),
        ] {
            ensure!(!value.is_zero(), "{flag}: must be longer than 0s");
            ensure!(value <= MAX_DURATION, "{flag}: must be at most {}", humantime::format_duration(MAX_DURATION));
        }
        ensure!(
            max_staleness.is_none_or(|limit| limit >= MIN_STALENESS),
            "--max-staleness: must be at least {}, or what is only quiet counts as old",
            humantime::format_duration(MIN_STALENESS)
        );
        let segment_bytes =
            segment_bytes.or(segment_octets).unwrap_or_else(|| store::StoreOptions::default().segment_bytes);
        ensure!(segment_bytes >= MIN_SEGMENT, "--segment-bytes {segment_bytes}: must be at least {MIN_SEGMENT}");
        let reverse_zones = reverse_zone.iter().map(|cidr| parse_cidr(cidr)).collect::<Result<_, _>>()?;
        // Knows cgroup quotas and the affinity mask: in a container it is not the number of the machine's cores.
        let threads = dns_threads.or_else(|| thread::available_parallelism().ok()).unwrap_or(NonZeroUsize::MIN);

        let flatten_names = upstream.flatten_names;
        let upstream = upstream.check(&origin, ttl)?;
        let validator = Validator { zone_wire_len: origin.wire_len(), names_allowed: upstream.is_some() };
        let policy = registry::NamespacePolicy { create_namespaces };

        Ok(Config {
            grpc_listen,
            security,
            admin_listen,
            admin_hosts: admin_host,
            grpc: grpc::ConnectionLimits { connections: grpc_connections, idle: grpc_idle, max_age: grpc_max_age },
            admin_connections,
            max_staleness,
            dns: DnsConfig {
                listen: dns_listen,
                threads,
                nsid,
                tcp: TcpLimits {
                    connections: tcp_connections,
                    per_peer: tcp_per_peer,
                    idle: tcp_idle,
                    message: tcp_message,
                    pipelined: tcp_pipelined,
                },
            },
            upstream,
            validator,
            zone: ZoneConfig { origin, ttl, reverse_zones, ns_addresses: ns_address, publish_not_ready, flatten_names },
            data_dir: data_dir.map_or_else(default_data_dir, Ok)?,
            store: store::StoreOptions { accept_loss, segment_bytes, outbox: kubernetes },
            registry: registry::RegistryOptions {
                max_instances,
                quotas: quotas.instances(),
                deny_addresses: quotas.deny_addresses(),
                kubernetes: kubernetes.then_some(policy),
            },
            kubernetes: kubernetes.then_some(kubernetes::KubernetesOptions {
                kubeconfig,
                lease_namespace,
                grpc_service,
                create_namespaces,
                max_endpoints: slice_endpoints,
                endpoints_object,
                requests_per_second: kubernetes_qps,
                linger: service_linger,
                publish_not_ready,
                flatten_names,
                validator,
            }),
            advertise,
            drain,
        })
    }
}

/// Parses `10.1.0.0/16` or `2001:db8::/32`.
fn parse_cidr(text: &str) -> anyhow::Result<(IpAddr, u8)> {
    let parse = || {
        let (address, length) = text.split_once('/').context("an address, a slash and a length are needed")?;
        let address: IpAddr = address.parse().context("the address is invalid")?;
        let length: u8 = length.parse().context("the length is not a number")?;
        let (bits, width) = match address {
            IpAddr::V4(v4) => (u128::from(v4.to_bits()), 32),
            IpAddr::V6(v6) => (v6.to_bits(), 128),
        };
        ensure!(length <= width, "the length must be 0..={width}");
        let host_bits = u32::from(width - length);
        // A shift by all 128 bits, for a prefix of length 0, has no result: then every bit is the host's.
        let host_part = bits & 1u128.checked_shl(host_bits).map_or(u128::MAX, |bit| bit - 1);
        ensure!(host_part == 0, "bits are set beyond the first {length}");
        Ok((address, length))
    };
    parse().with_context(|| format!("--reverse-zone {text:?} is not a network such as 10.1.0.0/16"))
}

/// The per-user state directory (XDG Base Directory Specification).
fn default_data_dir() -> anyhow::Result<PathBuf> {
    // The specification ignores relative paths.
    let from = |name: &str| env::var_os(name).map(PathBuf::from).filter(|path| path.is_absolute());
    from("XDG_STATE_HOME")
        .or_else(|| from("HOME").map(|home| home.join(".local/state")))
        .map(|state| state.join("gangplank"))
        .context("--data-dir: must be given, because neither XDG_STATE_HOME nor HOME is set")
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;

    #[derive(Debug, Parser)]
    struct TestArgs {
        #[command(flatten)]
        serve: ServeArgs,
    }

    fn check(flags: &[&str]) -> Result<Config, String> {
        let args = ["gangplank", "--data-dir", "/nowhere"].iter().chain(flags);
        TestArgs::try_parse_from(args).expect("clap accepts the flags").serve.check().map_err(|err| format!("{err:#}"))
    }

    #[test]
    fn grpc_beyond_loopback_has_a_ca_of_its_own_or_is_insecure() {
        let tls = |flags: &[&str]| check(flags).expect("valid").security.tls;
        assert_eq!(tls(&["--grpc-listen", "0.0.0.0:9080"]), Tls::OwnCa);
        assert_eq!(tls(&["--grpc-listen", "127.0.0.1:9080,10.0.0.1:9080", "--advertise", "a.example.com"]), Tls::OwnCa);
        assert_eq!(tls(&["--grpc-listen", "0.0.0.0:9080", "--insecure"]), Tls::Off);
        assert_eq!(tls(&["--grpc-listen", "[::1]:9080"]), Tls::Off);
        assert_eq!(tls(&["--grpc-listen", "0.0.0.0:9080", "--kubernetes"]), Tls::OwnCa);
    }

    #[test]
    fn admin_beyond_loopback_has_tls_or_is_insecure() {
        use ListenerSecurity::{Insecure, Loopback, Tls as ByTls};
        let admin = |flags: &[&str]| -> Vec<ListenerSecurity> {
            check(flags).expect("valid").admin_listen.into_iter().map(|(_, how)| how).collect()
        };
        let both = ["--admin-listen", "127.0.0.1:9153,0.0.0.0:9153"];
        assert_eq!(admin(&both), [Loopback, ByTls]);
        assert_eq!(check(&both).expect("valid").security.tls, Tls::OwnCa);
        assert_eq!(check(&[both[0], both[1], "--kubernetes"]).expect("valid").security.tls, Tls::OwnCa);
        for insecure in ["--insecure", "--insecure=admin", "--insecure=grpc,0.0.0.0:9153"] {
            assert_eq!(admin(&[both[0], both[1], insecure]), [Loopback, Insecure], "{insecure}");
        }
        assert_eq!(admin(&[both[0], both[1], "--insecure=grpc"]), [Loopback, ByTls]);
        let grpc = check(&["--grpc-listen", "0.0.0.0:9080", "--insecure=admin"]).expect("valid").grpc_listen;
        assert_eq!(grpc[0].1, ByTls);
        let files = ["--tls-cert", "c", "--tls-key", "k", "--tls-client-ca", "a"];
        assert_eq!(admin(&[&both[..], &files].concat()), [Loopback, ByTls], "pages need no rules");
        assert!(check(&files).expect_err("refused").contains("nothing says what clients may do"));
        for (flags, expected) in [
            (&["--insecure=0.0.0.0:1"][..], "--insecure 0.0.0.0:1: is none of --grpc-listen and --admin-listen"),
            (&["--insecure=1.2.3.4:1,admin"], "--insecure 1.2.3.4:1: is none of"),
        ] {
            assert!(check(flags).expect_err("refused").starts_with(expected), "{flags:?}");
        }
    }

    #[test]
    fn errors_name_the_invalid_flag() {
        for (flags, expected) in [
            (["--ttl", "3601"], "--ttl 3601"),
            (["--zone", "a..b"], "--zone \"a..b\""),
            (["--reverse-zone", "10.0.0.0"], "--reverse-zone \"10.0.0.0\""),
            (["--reverse-zone", "10.0.0.1/8"], "bits are set beyond the first 8"),
            (["--reverse-zone", "10.0.0.0/33"], "0..=32"),
            (["--tcp-pipelined", "0"], "--tcp-pipelined"),
            (["--tcp-connections", "0"], "--tcp-connections"),
            (["--grpc-connections", "0"], "--grpc-connections"),
            (["--admin-connections", "0"], "--admin-connections"),
            (["--grpc-idle", "0s"], "--grpc-idle"),
            (["--grpc-max-age", "25h"], "--grpc-max-age: must be at most 1day"),
            (["--tcp-idle", "0s"], "--tcp-idle"),
            (["--tcp-idle", "500000000000y"], "--tcp-idle: must be at most 1day"),
            (["--tcp-message", "25h"], "--tcp-message: must be at most 1day"),
        ] {
            let err = check(&flags).expect_err("refused");
            assert!(err.contains(expected), "{err:?} should contain {expected:?}");
        }
    }

    #[test]
    fn advertised_addresses_must_be_of_one_machine() {
        for (address, expected) in [
            ("0.0.0.0", "--advertise \"0.0.0.0\": not the address of one machine"),
            ("10.0.0.1:0", "--advertise \"10.0.0.1:0\": the port must be 1..=65535"),
            ("http://a:9080", "--advertise \"http://a:9080\": neither an IP address nor a DNS name"),
        ] {
            let err = check(&["--kubernetes", "--advertise", address]).expect_err("refused");
            assert!(err.starts_with(expected), "{err}");
        }
        let err = check(&["--advertise", "10.0.0.1"]).expect_err("refused");
        assert!(err.starts_with("--advertise: means nothing without --kubernetes"), "{err}");
    }

    #[test]
    fn former_name_of_segment_bytes_is_accepted() {
        for flag in ["--segment-bytes", "--segment-octets"] {
            assert_eq!(check(&[flag, "8192"]).expect("valid").store.segment_bytes, 8192);
        }
    }

    #[test]
    fn networks_of_every_prefix_length_are_parsed() {
        for (text, length) in
            [("0.0.0.0/0", 0), ("10.0.0.0/8", 8), ("10.1.2.3/32", 32), ("::/0", 0), ("2001:db8::/33", 33)]
        {
            assert_eq!(parse_cidr(text).expect(text).1, length);
        }
    }
}
