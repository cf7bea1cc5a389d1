//! Who may connect and do what: certificates, tokens, rights, from what is configured.

use std::{net::SocketAddr, sync::Arc};

use anyhow::Context as _;
use tracing::{info, warn};

use super::own_ca::{OwnCa, OwnCaSource};
use crate::{
    config::{SecurityConfig, Tls},
    identity::{Authenticator, Authorization, Authorizer, RefusalLog, SERVER_USER, Usage, certificate_user},
    kubernetes::api::Reviews,
    metrics::Metrics,
    net::tls::ServerTls,
    security::{ListenerSecurity, Security},
};

/// Logs who can see what at the admin listeners beyond loopback.
pub(super) fn announce_admin(listeners: &[(SocketAddr, ListenerSecurity)], config: &SecurityConfig) {
    let nobody = config.tls == Tls::OwnCa && config.authorization == Authorization::Plaintext;
    for (listener, how) in listeners {
        match how {
            ListenerSecurity::Loopback => {}
            ListenerSecurity::Insecure => info!(
                %listener,
                "admin in plaintext, by --insecure: whoever reaches it may see all, unless --authorization is set"
            ),
            // Nobody has a certificate that counts, or a token.
            ListenerSecurity::Tls if nobody => warn!(
                %listener,
                "admin over TLS: only /livez and /readyz answer here, because the CA in the data directory signs for \
                 machines that join, and those see the pages for which --authorization-policy names them. Give that, or \
                 --tls-cert, --tls-key and --tls-client-ca, ask over loopback, or, where the network itself is trusted, add \
                 --insecure=admin"
            ),
            ListenerSecurity::Tls => info!(
                %listener,
                "admin over TLS: /livez and /readyz answer everybody, other pages who shows a client certificate or a \
                 token and may see the path"
            ),
        }
    }
}

/// Reads certificates and policy.
pub(super) fn create(
    config: SecurityConfig,
    own: Option<OwnCa>,
    reviews: Option<Arc<Reviews>>,
    metrics: &Arc<Metrics>,
) -> anyhow::Result<Arc<Security>> {
    let SecurityConfig { tls, authorization, authorization_stale, usage } = config;
    let reviews = reviews.map(|reviews| (reviews, authorization_stale));
    let log = Arc::new(RefusalLog::default());
    let load = Arc::clone(&metrics.connections);
    let (tls, registrants, replica) = match (tls, own) {
        (Tls::Files(files), own) => {
            let (tls, registrants) = match own {
                Some(OwnCa { source: OwnCaSource::Files(source), registrants }) => {
                    (ServerTls::load(source, load)?, Some(registrants))
                }
                _ => (ServerTls::load(files, load)?, None),
            };
            if reviews.is_some() && tls.as_client().is_none() {
                warn!(
                    "without --tls-client-ca this process cannot take over what other replicas have accepted, and they cannot \
                     take over from it: they know each other by their certificate"
                );
            }
            let user = tls.certificate().and_then(|certificate| certificate_user(&certificate).ok());
            (Some(tls), registrants, user)
        }
        (Tls::OwnCa, Some(OwnCa { source: OwnCaSource::Own(source), registrants })) => {
            (Some(ServerTls::load(source, load)?), Some(registrants), Some(SERVER_USER.into()))
        }
        (Tls::OwnCa, _) | (Tls::Off, _) => (None, None, None),
    };
    let authenticator = Authenticator::new(registrants.clone());
    let authenticator = match &reviews {
        Some((reviews, stale)) => {
            authenticator.with_tokens(Arc::clone(reviews), *stale, Arc::clone(&metrics.identity), Arc::clone(&log))
        }
        None => authenticator,
    };
    let authorizer = Authorizer::new(authorization, reviews, replica, Arc::clone(&metrics.identity), Arc::clone(&log));
    let authorizer = authorizer.context("--authorization-policy")?.with_registrants(registrants.clone());
    let usage = Usage::new(usage, Arc::clone(&metrics.identity));
    let authorizer = Arc::new(authorizer);
    let metrics = Arc::clone(&metrics.identity);
    Ok(Arc::new(Security { tls, authenticator, authorizer, registrants, usage, log, metrics }))
}
