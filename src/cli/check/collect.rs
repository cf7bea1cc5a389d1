//! Asks the servers, the cluster and DNS, all at once and each within seconds.

use std::{
    net::SocketAddr,
    time::{Duration, SystemTime},
};

use futures::future;
use hickory_proto::rr::{Name, RecordType};
use tokio::time::{sleep, timeout};

use super::{
    facts::{At, ComparedSeen, Fact, Facts, ReplicasSeen, RightsSeen, ThroughSeen},
    rights::{Need, RightsNeeded, rights_needed},
};
use crate::{
    admin::client::{AdminClient, KubernetesFlags, ProcessStatus},
    cli::resolve::{
        compare::{Difference, differences},
        query::{Reply, query},
        report::rcode,
    },
    coredns::{self, Wired},
    grpc::client::{Servers, WatchEvent, shown_certificate},
    kubernetes::api::{ConfigMapKey, Inspector},
};

/// How long the search for a name to ask for may take.
const NAME_TIMEOUT: Duration = Duration::from_secs(3);

/// Questions through CoreDNS, by which a falling TTL is seen, and the pause between them: TTLs are whole seconds.
const CACHE_QUESTIONS: usize = 3;
const CACHE_INTERVAL: Duration = Duration::from_millis(1_100);

/// Times that two different answers are asked for again: a change may be on its way.
const MAX_COMPARISONS: usize = 3;

/// Most rights that are asked for at once.
const MAX_REVIEWS: usize = 8;

/// Whom to ask. What there is not says why.
#[derive(Debug)]
pub(super) struct Sources {
    pub(super) servers: Fact<Servers>,
    pub(super) admin: Fact<AdminClient>,
    pub(super) dns: Fact<SocketAddr>,
    pub(super) via: Fact<SocketAddr>,
    pub(super) cluster: Fact<Inspector>,
    pub(super) configmap: ConfigMapKey,
    /// Whose rights; `None` for those of who asks.
    pub(super) user: Option<String>,
    /// `None`: the one that the server has.
    pub(super) zone: Option<String>,
    pub(super) machine_expires: Option<SystemTime>,
}

impl Sources {
    /// Asks everybody once.
    pub(super) async fn collect(&self) -> Facts {
        let admin_url = self.admin.known().map_or_else(String::new, |admin| admin.url.to_string());
        let (replicas, readiness, status, api, wired, server_certificate) = tokio::join!(
            self.replicas(),
            async {
                match &self.admin {
                    Fact::Known(admin) => Fact::of(admin.readiness().await),
                    Fact::Failed(why) | Fact::Skipped(why) => Fact::Skipped(why.clone()),
                }
            },
            self.status(),
            async {
                match &self.cluster {
                    Fact::Known(cluster) => {
                        let seen = cluster.seen().await;
                        Fact::of(seen.map(|value| At { value, here: SystemTime::now() }))
                    }
                    Fact::Failed(why) | Fact::Skipped(why) => Fact::Skipped(why.clone()),
                }
            },
            self.wired(),
            self.server_certificate(),
        );
        let flags = status.known().map(|at: &At<ProcessStatus>| at.value.kubernetes.clone());
        let zone = self.zone.clone().or_else(|| status.known().map(|at| at.value.zone.clone()));
        let zone = zone.unwrap_or_else(|| "cluster.local".into());
        let (rights, direct, control, compared) = tokio::join!(
            self.rights(&api, flags.as_ref()),
            self.direct(&zone),
            self.control(&zone),
            self.compared(&zone, &wired),
        );
        let tls = self.servers.known().map(Servers::tls);
        let user = match (&self.user, self.cluster.known()) {
            (Some(user), _) => user.clone(),
            (None, _) => "this account".into(),
        };
        let address = |fact: &Fact<SocketAddr>| fact.known().map_or_else(String::new, ToString::to_string);
        Facts {
            now: SystemTime::now(),
            replicas,
            admin_url: admin_url.trim_end_matches('/').to_owned(),
            readiness,
            status,
            api_url: self.cluster.known().map_or_else(String::new, |cluster| cluster.server().to_owned()),
            api,
            user,
            rights,
            configmap: self.configmap.to_string(),
            wired,
            dns: address(&self.dns),
            via: address(&self.via),
            zone,
            direct,
            control,
            compared,
            server_certificate,
            ca: tls
                .and_then(|tls| tls.ca_validity())
                .map_or_else(|| Fact::Skipped("no CA is configured: --cacert, or gangplank join".into()), Fact::Known),
            machine_expires: self.machine_expires.or_else(|| tls?.own_validity().map(|own| own.not_after)).map_or_else(
                || Fact::Skipped("this machine has not joined, and shows none by --cert".into()),
                Fact::Known,
            ),
        }
    }

    async fn replicas(&self) -> Fact<ReplicasSeen> {
        match &self.servers {
            Fact::Known(servers) => Fact::of(
                servers.replicas().await.map(|found| ReplicasSeen { replicas: found.replicas, failed: found.failed }),
            ),
            Fact::Failed(why) => Fact::Failed(why.clone()),
            Fact::Skipped(why) => Fact::Skipped(why.clone()),
        }
    }

    async fn status(&self) -> Fact<At<ProcessStatus>> {
        match &self.admin {
            Fact::Known(admin) => {
                let status = admin.status().await;
                Fact::of(status.map(|value| At { value, here: SystemTime::now() }))
            }
            Fact::Failed(why) | Fact::Skipped(why) => Fact::Skipped(why.clone()),
        }
    }

    async fn wired(&self) -> Fact<Vec<Wired>> {
        let cluster = match &self.cluster {
            Fact::Known(cluster) => cluster,
            Fact::Failed(why) | Fact::Skipped(why) => return Fact::Skipped(why.clone()),
        };
        match cluster.config_maps().read(&self.configmap).await {
            Ok(read) => Fact::of(coredns::wired(&read.text)),
            Err(err) => Fact::Failed(err.to_string()),
        }
    }

    async fn server_certificate(&self) -> Fact<(String, crate::grpc::client::Validity)> {
        let servers = match &self.servers {
            Fact::Known(servers) => servers,
            Fact::Failed(why) | Fact::Skipped(why) => return Fact::Skipped(why.clone()),
        };
        let shown = future::join_all(servers.urls().iter().map(async |url| (url, shown_certificate(url).await))).await;
        let mut failed = None;
        let mut soonest = None;
        for (url, shown) in shown {
            match shown {
                Ok(Some(validity)) => {
                    let sooner =
                        |(_, other): &(String, crate::grpc::client::Validity)| other.not_after > validity.not_after;
                    if soonest.as_ref().is_none_or(sooner) {
                        soonest = Some((url.clone(), validity));
                    }
                }
                Ok(None) => {}
                Err(why) => failed = Some(format!("{url}: {why}")),
            }
        }
        match (soonest, failed) {
            (Some(soonest), _) => Fact::Known(soonest),
            (None, Some(why)) => Fact::Failed(why),
            (None, None) => Fact::Skipped("no server has an https URL".into()),
        }
    }

    /// `flags` are `None` if the server told nothing, and `Some(None)` if it runs without Kubernetes.
    async fn rights(
        &self,
        api: &Fact<At<crate::kubernetes::api::ApiServerSeen>>,
        flags: Option<&Option<KubernetesFlags>>,
    ) -> Vec<RightsSeen> {
        let told = flags.and_then(Option::as_ref);
        let without_kubernetes = matches!(flags, Some(None));
        let seen = rights_needed(told).into_iter().map(async |RightsNeeded { id, need, rights }| {
            let missing = match (&self.cluster, api) {
                _ if without_kubernetes => Fact::Skipped("the server runs without --kubernetes".into()),
                (Fact::Failed(why) | Fact::Skipped(why), _) | (_, Fact::Failed(why)) => Fact::Skipped(why.clone()),
                _ if matches!(need, Need::Flag(Some(false) | None)) => Fact::Skipped(String::new()),
                (Fact::Known(cluster), _) => {
                    let mut missing = Vec::new();
                    let mut failed = None;
                    for some in rights.chunks(MAX_REVIEWS) {
                        let asked = some.iter().map(|right| cluster.may(self.user.as_deref(), *right));
                        for (right, allowed) in some.iter().zip(future::join_all(asked).await) {
                            match allowed {
                                Ok(true) => {}
                                Ok(false) => missing.push(format!("{} {}", right.verb, right.resource)),
                                Err(err) => failed = Some(err.to_string()),
                            }
                        }
                    }
                    failed.map_or(Fact::Known(missing), Fact::Skipped)
                }
            };
            RightsSeen { id, need, missing }
        });
        future::join_all(seen).await
    }

    async fn direct(&self, zone: &str) -> Fact<ThroughSeen> {
        through(&self.dns, zone, &[RecordType::SOA]).await
    }

    async fn control(&self, zone: &str) -> Fact<ThroughSeen> {
        // A cluster may have one family only.
        through(&self.via, &format!("kubernetes.default.svc.{zone}"), &[RecordType::A, RecordType::AAAA]).await
    }

    async fn compared(&self, zone: &str, wired: &Fact<Vec<Wired>>) -> Fact<ComparedSeen> {
        let (dns, via) = match (&self.dns, &self.via) {
            (Fact::Known(dns), Fact::Known(via)) => (*dns, *via),
            (Fact::Failed(why) | Fact::Skipped(why), _) | (_, Fact::Failed(why) | Fact::Skipped(why)) => {
                return Fact::Skipped(why.clone());
            }
        };
        // Below a stub domain, if there is one: elsewhere CoreDNS answers by itself what Kubernetes has.
        let stub = wired.known().and_then(|wired| wired.iter().find_map(|one| stub_namespace(one, zone)));
        let name = match self.registered_name(zone, stub.as_deref()).await {
            Ok(name) => name,
            Err(why) => return Fact::Skipped(why),
        };
        let mut pair = both(dns, via, &name).await;
        for _ in 1..MAX_COMPARISONS {
            let equal =
                pair.as_ref().is_ok_and(|(direct, via)| !differences(direct, via).iter().any(|one| one.is_wrong()));
            if equal {
                break;
            }
            sleep(CACHE_INTERVAL).await;
            pair = both(dns, via, &name).await;
        }
        let (direct, first) = match pair {
            Ok(pair) => pair,
            Err(why) => return Fact::Failed(why),
        };
        let wrong = differences(&direct, &first).into_iter().filter(|difference| difference.is_wrong());
        let wrong = wrong.map(|difference| match difference {
            Difference::Rcode => "response code",
            Difference::Records => "records",
            Difference::Ttl => "TTL",
            Difference::Nsid => "NSID",
        });
        let mut ttls: Vec<u32> = ttl(&first).into_iter().collect();
        for _ in 1..CACHE_QUESTIONS {
            sleep(CACHE_INTERVAL).await;
            if let Ok(again) = query(via, &name, RecordType::A, false).await {
                ttls.extend(ttl(&again));
            }
        }
        Fact::Known(ComparedSeen {
            name: name.to_string(),
            differences: wrong.collect(),
            nsid_lost: stub.is_some() && direct.nsid().is_some() && first.nsid().is_none(),
            ttls,
        })
    }

    /// A name that is registered; in this namespace, if one is given.
    async fn registered_name(&self, zone: &str, namespace: Option<&str>) -> Result<Name, String> {
        let servers = match &self.servers {
            Fact::Known(servers) => servers,
            Fact::Failed(why) | Fact::Skipped(why) => return Err(why.clone()),
        };
        let found = timeout(
            NAME_TIMEOUT,
            servers.read(async |client| {
                let mut events = client.watch(namespace, None, None).await?;
                while let Some(event) = events.next().await? {
                    match event {
                        WatchEvent::Snapshot(key, service) => {
                            // DNS answers with those that are ready.
                            if service.instances.iter().any(|instance| instance.ready()) {
                                return Ok(Some(key));
                            }
                        }
                        _ => break,
                    }
                }
                Ok(None)
            }),
        );
        let key = match found.await {
            Ok(Ok(Some(key))) => key,
            Ok(Ok(None)) => return Err("nothing is registered to ask for".into()),
            Ok(Err(err)) => return Err(err.to_string()),
            Err(_) => return Err("the server has not told a name to ask for".into()),
        };
        fqdn(&format!("{}.{}.svc.{zone}", key.name(), key.namespace()))
    }
}

/// The namespace of a stub domain of this zone.
fn stub_namespace(wired: &Wired, zone: &str) -> Option<String> {
    match wired {
        Wired::StubDomain(name) => {
            let namespace = name.trim_end_matches('.').strip_suffix(&format!(".svc.{zone}"))?;
            Some(namespace.to_owned())
        }
        Wired::FallThrough(_) => None,
    }
}

pub(super) fn fqdn(text: &str) -> Result<Name, String> {
    let mut name = Name::from_ascii(text).map_err(|err| format!("{text:?} is not a DNS name: {err}"))?;
    name.set_fqdn(true);
    Ok(name)
}

async fn both(dns: SocketAddr, via: SocketAddr, name: &Name) -> Result<(Reply, Reply), String> {
    let (direct, through) =
        tokio::join!(query(dns, name, RecordType::A, false), query(via, name, RecordType::A, false));
    match (direct, through) {
        (Ok(direct), Ok(through)) => Ok((direct, through)),
        (Err(err), _) => Err(format!("{dns}: {err}")),
        (_, Err(err)) => Err(format!("{via}: {err}")),
    }
}

/// The lowest TTL of the records.
fn ttl(reply: &Reply) -> Option<u32> {
    reply.message.answers.iter().map(|record| record.ttl).min()
}

/// The answer of `server` to the first of these types that has records.
async fn through(server: &Fact<SocketAddr>, name: &str, kinds: &[RecordType]) -> Fact<ThroughSeen> {
    let server = match server {
        Fact::Known(server) => *server,
        Fact::Failed(why) => return Fact::Failed(why.clone()),
        Fact::Skipped(why) => return Fact::Skipped(why.clone()),
    };
    let asked = match fqdn(name) {
        Ok(asked) => asked,
        Err(why) => return Fact::Failed(why),
    };
    let mut answer = Err(String::new());
    for kind in kinds {
        answer = query(server, &asked, *kind, false)
            .await
            .map(|reply| (rcode(reply.rcode()), reply.message.answers.len()))
            .map_err(|err| err.to_string());
        if matches!(answer, Ok((_, 1..)) | Err(_)) {
            break;
        }
    }
    Fact::Known(ThroughSeen { name: name.to_owned(), answer })
}
