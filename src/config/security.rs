//! Flags about who may connect, and do what.

use std::{net::SocketAddr, path::PathBuf, str::FromStr, time::Duration};

use anyhow::{bail, ensure};
use clap::Args;

use super::MAX_DURATION;
use crate::{
    identity::{Authorization, UsageLimits},
    net::tls::TlsFiles,
    security::ListenerSecurity,
};

/// Smallest `--authorization-stale`: any decision counts for that long.
const MIN_AUTHORIZATION_STALE: Duration = Duration::from_secs(10);

#[derive(Debug, Args)]
pub(super) struct SecurityArgs {
    /// The certificate of the gRPC and admin listeners in PEM, with the intermediate ones after it. Read again when it
    /// changes
    #[arg(long, env = "GANGPLANK_TLS_CERT", value_name = "FILE")]
    tls_cert: Option<PathBuf>,

    /// The key of --tls-cert, in PEM
    #[arg(long, env = "GANGPLANK_TLS_KEY", value_name = "FILE")]
    tls_key: Option<PathBuf>,

    /// The CAs of client certificates, in PEM. A client is the common name of its certificate, in the groups that its
    /// organizations are; or its SPIFFE ID
    #[arg(long, env = "GANGPLANK_TLS_CLIENT_CA", value_name = "FILE")]
    tls_client_ca: Option<PathBuf>,

    /// The CAs of --tls-cert, in PEM: with them machines join by gangplank token create, trust these from then on, and get
    /// certificates of a CA of gangplank's own. One has signed --tls-cert; put the next one beside it before it is replaced
    #[arg(long, env = "GANGPLANK_TLS_SERVER_CA", value_name = "FILE")]
    tls_server_ca: Option<PathBuf>,

    /// What clients may do, and which pages they may see, in TOML; nothing without a rule. Read again when it changes
    #[arg(long, env = "GANGPLANK_AUTHORIZATION_POLICY", value_name = "FILE")]
    authorization_policy: Option<PathBuf>,

    /// What says what clients may do, plaintext ones too: over loopback they are the user gangplank:loopback, else
    /// system:anonymous [default: the policy if there is one, else Kubernetes, and plaintext clients may do all]
    #[arg(long, env = "GANGPLANK_AUTHORIZATION", value_name = "SOURCE")]
    authorization: Option<AuthorizationSource>,

    /// While the API server cannot be asked: how long what it has said of a right counts, and how long a stream goes on
    /// without a review of its token; 10s or more
    #[arg(
        long,
        env = "GANGPLANK_AUTHORIZATION_STALE",
        value_name = "TIME",
        default_value = "5m",
        value_parser = humantime::parse_duration
    )]
    authorization_stale: Duration,

    /// Take plaintext beyond loopback, on every gRPC and admin listener or on the named ones ("grpc" and "admin" are all
    /// of a kind): whoever reaches them may do and see all, unless --authorization is set
    #[arg(
        long,
        env = "GANGPLANK_INSECURE",
        value_name = "grpc|admin|ADDR:PORT,...",
        num_args = 0..=1,
        require_equals = true,
        default_missing_value = "true",
        default_value = "false",
        hide_default_value = true
    )]
    insecure: Insecure,
}

/// `--authorization`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
enum AuthorizationSource {
    /// The file of --authorization-policy
    Policy,
    /// Kubernetes RBAC, on the resource instances of the group gangplank.dev, and on the paths of pages
    Kubernetes,
}

/// `--insecure`: which listeners take plaintext beyond loopback.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Insecure {
    None,
    All,
    Only(Vec<Named>),
}

/// What `--insecure` names.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Named {
    Kind(Kind),
    One(SocketAddr),
}

/// The listeners that can have TLS.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    Grpc,
    Admin,
}

impl FromStr for Insecure {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text.to_ascii_lowercase().as_str() {
            // The words that clap takes for a switch, so that GANGPLANK_INSECURE can be set as other flags are.
            "" | "0" | "n" | "no" | "f" | "false" | "off" => Ok(Self::None),
            "1" | "y" | "yes" | "t" | "true" | "on" => Ok(Self::All),
            listeners => {
                let parse = |one: &str| match one {
                    "grpc" => Ok(Named::Kind(Kind::Grpc)),
                    "admin" => Ok(Named::Kind(Kind::Admin)),
                    _ => one.parse().map(Named::One).map_err(|_| {
                        format!("{one:?} is neither the ADDR:PORT of a listener, nor \"grpc\", nor \"admin\"")
                    }),
                };
                listeners.split(',').map(parse).collect::<Result<_, _>>().map(Self::Only)
            }
        }
    }
}

impl Insecure {
    fn names(&self, kind: Kind, listener: SocketAddr) -> bool {
        match self {
            Self::None => false,
            Self::All => true,
            Self::Only(named) => named.contains(&Named::Kind(kind)) || named.contains(&Named::One(listener)),
        }
    }
}

/// Listeners that can have TLS, each with how it takes connections once that is decided.
#[derive(Debug)]
pub(super) struct Listeners<T> {
    pub(super) grpc: Vec<T>,
    pub(super) admin: Vec<T>,
}

/// Where the gRPC and admin listeners have certificate, key and client CA from.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Tls {
    /// No TLS: every listener is loopback or takes plaintext.
    Off,
    /// From files.
    Files(TlsFiles),
    /// From a CA of gangplank's own, in the data directory or in a Secret.
    OwnCa,
}

impl Tls {
    /// Whether machines join, by certificates of a CA of gangplank's own.
    #[must_use]
    pub const fn is_joined(&self) -> bool {
        match self {
            Self::Off => false,
            Self::Files(files) => files.server_ca.is_some(),
            Self::OwnCa => true,
        }
    }
}

/// Who may connect, and do what.
#[derive(Debug, Clone)]
pub struct SecurityConfig {
    /// Where the gRPC and admin listeners have certificate, key and client CA from.
    pub tls: Tls,
    /// Where rights come from.
    pub authorization: Authorization,
    /// How long what Kubernetes has said counts while it cannot be asked; 10 s at least.
    pub authorization_stale: Duration,
    /// What one identity may use at a time.
    pub usage: UsageLimits,
}

impl SecurityArgs {
    /// Also says how each of `listeners` takes connections. With `kubernetes` there are tokens and RBAC.
    pub(super) fn check(
        self,
        listeners: Listeners<SocketAddr>,
        kubernetes: bool,
        usage: UsageLimits,
    ) -> anyhow::Result<(Listeners<(SocketAddr, ListenerSecurity)>, SecurityConfig)> {
        let Self {
            tls_cert,
            tls_key,
            tls_client_ca,
            tls_server_ca,
            authorization_policy,
            authorization,
            authorization_stale,
            insecure,
        } = self;
        let tls = tls_files(tls_cert, tls_key, tls_client_ca, tls_server_ca, kubernetes)?;
        let listeners = secured(listeners, &insecure)?;
        let need_tls = |of: &[(SocketAddr, ListenerSecurity)]| of.iter().any(|(_, how)| *how == ListenerSecurity::Tls);
        let (grpc_tls, admin_tls) = (need_tls(&listeners.grpc), need_tls(&listeners.admin));
        let tls = match tls {
            Some(files) => Tls::Files(files),
            None if grpc_tls || admin_tls => Tls::OwnCa,
            None => Tls::Off,
        };
        let authorization = source_of_rights(authorization, authorization_policy, kubernetes)?;
        // Pages may be seen by whoever has a certificate.
        let pages_only = admin_tls && !grpc_tls;
        // Machines that joined may do what their tokens say.
        let joined_only = |files: &TlsFiles| files.client_ca.is_none() && files.server_ca.is_some();
        ensure!(
            !matches!(&tls, Tls::Files(files) if !joined_only(files))
                || authorization != Authorization::Plaintext
                || pages_only,
            "--tls-cert: nothing says what clients may do: give --authorization-policy FILE, or --kubernetes"
        );
        ensure!(
            (MIN_AUTHORIZATION_STALE..=MAX_DURATION).contains(&authorization_stale),
            "--authorization-stale: must be at least {}, which is how long any decision counts, and at most {}",
            humantime::format_duration(MIN_AUTHORIZATION_STALE),
            humantime::format_duration(MAX_DURATION)
        );
        Ok((listeners, SecurityConfig { tls, authorization, authorization_stale, usage }))
    }
}

/// Where rights come from, by the flags.
fn source_of_rights(
    source: Option<AuthorizationSource>,
    policy: Option<PathBuf>,
    kubernetes: bool,
) -> anyhow::Result<Authorization> {
    match (source, policy) {
        (Some(AuthorizationSource::Kubernetes), Some(_)) => {
            bail!("--authorization kubernetes: leave out --authorization-policy: rights come from one of them")
        }
        (Some(AuthorizationSource::Policy), None) => bail!("--authorization policy: needs --authorization-policy FILE"),
        (Some(AuthorizationSource::Kubernetes), None) => {
            ensure!(kubernetes, "--authorization kubernetes: needs --kubernetes or --kubeconfig FILE");
            Ok(Authorization::Kubernetes { plaintext: true })
        }
        (source, Some(file)) => Ok(Authorization::Policy { file, plaintext: source.is_some() }),
        (None, None) if kubernetes => Ok(Authorization::Kubernetes { plaintext: false }),
        (None, None) => Ok(Authorization::Plaintext),
    }
}

/// The files of TLS, of which the certificate and the key need each other.
fn tls_files(
    cert: Option<PathBuf>,
    key: Option<PathBuf>,
    client_ca: Option<PathBuf>,
    server_ca: Option<PathBuf>,
    tokens: bool,
) -> anyhow::Result<Option<TlsFiles>> {
    match (cert, key) {
        (Some(cert), Some(key)) => {
            ensure!(
                client_ca.is_some() || server_ca.is_some() || tokens,
                "--tls-cert: needs --tls-client-ca FILE, or --kubernetes for tokens, or --tls-server-ca FILE for machines that \
                 join, or no client has an identity"
            );
            Ok(Some(TlsFiles { cert, key, client_ca, server_ca }))
        }
        (None, None) => {
            ensure!(client_ca.is_none(), "--tls-client-ca: means nothing without --tls-cert and --tls-key");
            ensure!(
                server_ca.is_none(),
                "--tls-server-ca: means nothing without --tls-cert and --tls-key: a server without them has a CA of its own \
                 where it listens beyond loopback, and machines join that"
            );
            Ok(None)
        }
        (Some(_), None) => bail!("--tls-cert: needs --tls-key FILE"),
        (None, Some(_)) => bail!("--tls-key: needs --tls-cert FILE"),
    }
}

/// How each listener takes connections.
fn secured(
    Listeners { grpc, admin }: Listeners<SocketAddr>,
    insecure: &Insecure,
) -> anyhow::Result<Listeners<(SocketAddr, ListenerSecurity)>> {
    if let Insecure::Only(named) = insecure {
        for one in named {
            if let Named::One(address) = one {
                ensure!(
                    grpc.contains(address) || admin.contains(address),
                    "--insecure {address}: is none of --grpc-listen and --admin-listen"
                );
            }
        }
    }
    let security = |kind: Kind, listener: SocketAddr| match listener {
        _ if listener.ip().is_loopback() => (listener, ListenerSecurity::Loopback),
        _ if insecure.names(kind, listener) => (listener, ListenerSecurity::Insecure),
        _ => (listener, ListenerSecurity::Tls),
    };
    let all = |kind, of: Vec<SocketAddr>| of.into_iter().map(|one| security(kind, one)).collect();
    Ok(Listeners { grpc: all(Kind::Grpc, grpc), admin: all(Kind::Admin, admin) })
}
