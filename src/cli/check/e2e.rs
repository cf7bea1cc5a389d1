//! A canary goes the whole way: registered, asked for, seen in Kubernetes, removed.

use std::{
    net::{Ipv4Addr, SocketAddr},
    time::{Duration, Instant},
};

use hickory_proto::rr::{Name, RData, RecordType};
use tokio::{
    signal,
    time::{sleep, timeout},
};

use super::{
    collect::{Sources, fqdn},
    facts::{Fact, Facts},
    finding::{CheckId, Finding},
};
use crate::{
    cli::resolve::query::query,
    grpc::client::Servers,
    model::{InstanceSpec, PortSpec, Protocol},
};

/// How long one hop may take.
const HOP_TIMEOUT: Duration = Duration::from_secs(30);

/// How often a hop is looked at.
const POLL_INTERVAL: Duration = Duration::from_millis(20);

/// The canary's address: one for documentation (RFC 5737), where nobody is.
const ADDRESS: Ipv4Addr = Ipv4Addr::new(192, 0, 2, 1);

const REMOVED: &str = "the canary is removed, and not answered any more";

/// The canary.
struct Canary<'a> {
    servers: &'a Servers,
    namespace: &'a str,
    service: String,
    name: Name,
}

/// Sends a canary on its way, and removes it, also after a fault or a signal.
pub(super) async fn run(sources: &Sources, facts: &Facts, namespace: &str) -> Vec<Finding> {
    let expected = "the canary is registered";
    let servers = match &sources.servers {
        Fact::Known(servers) => servers,
        Fact::Failed(why) | Fact::Skipped(why) => {
            return vec![Finding::skipped(CheckId::E2eRegistered, expected, why.clone())];
        }
    };
    let service = format!("gangplank-check-{:08x}", fastrand::u32(..));
    let name = match fqdn(&format!("{service}.{namespace}.svc.{}", facts.zone)) {
        Ok(name) => name,
        Err(why) => return vec![Finding::skipped(CheckId::E2eRegistered, expected, why)],
    };
    let canary = Canary { servers, namespace, service, name };
    let mut findings = Vec::new();
    tokio::select! {
        () = canary.walk(sources, facts, &mut findings) => {}
        // The removal below comes in any case.
        _ = signal::ctrl_c() => {}
    }
    findings.push(canary.remove(sources.dns.known().copied()).await);
    findings
}

impl Canary<'_> {
    fn spec(&self) -> InstanceSpec {
        InstanceSpec {
            address: ADDRESS.to_string(),
            ports: vec![PortSpec { number: 9, protocol: Protocol::Tcp, name: "canary".into() }],
            ..InstanceSpec::default()
        }
    }

    async fn walk(&self, sources: &Sources, facts: &Facts, findings: &mut Vec<Finding>) {
        let begun = Instant::now();
        let (id, expected) = (CheckId::E2eRegistered, "the canary is registered");
        let fix = format!("gangplank register {} {ADDRESS} --port canary=9 -n {}", self.service, self.namespace);
        match self.servers.register(self.namespace, &self.service, &self.spec()).await {
            Ok(answer) if answer.status < 300 => findings.push(Finding::passed(id, expected, milliseconds(begun))),
            Ok(answer) => {
                let observed = format!("refused with {}", answer.status);
                findings.push(Finding::failed(id, expected, observed, answer.details, fix));
                return;
            }
            Err(err) => {
                findings.push(Finding::failed(id, expected, "no answer", err.to_string(), fix));
                return;
            }
        }
        let expected = "gangplank answers with the canary";
        findings.push(self.answered(CheckId::E2eDirect, expected, &sources.dns, begun).await);
        findings.push(self.in_slice(sources, facts, begun).await);
        let (id, expected) = (CheckId::E2eCoredns, "CoreDNS answers with the canary");
        findings.push(if facts.wired.known().is_some_and(Vec::is_empty) {
            Finding::skipped(id, expected, "CoreDNS is not wired")
        } else {
            self.answered(id, expected, &sources.via, begun).await
        });
    }

    async fn answered(
        &self,
        id: CheckId,
        expected: &'static str,
        server: &Fact<SocketAddr>,
        begun: Instant,
    ) -> Finding {
        let server = match server {
            Fact::Known(server) => *server,
            Fact::Failed(why) | Fact::Skipped(why) => return Finding::skipped(id, expected, why.clone()),
        };
        let is_there = async {
            while !self.is_answered(server).await {
                sleep(POLL_INTERVAL).await;
            }
        };
        match timeout(HOP_TIMEOUT, is_there).await {
            Ok(()) => Finding::passed(id, expected, milliseconds(begun)),
            Err(_) => {
                let cause = "the name is not forwarded to gangplank, or a cache holds that there is none";
                let fix = format!("gangplank check --via {server}");
                Finding::failed(id, expected, format!("{server}: not within {} s", HOP_TIMEOUT.as_secs()), cause, fix)
            }
        }
    }

    async fn is_answered(&self, server: SocketAddr) -> bool {
        let Ok(reply) = query(server, &self.name, RecordType::A, false).await else { return false };
        reply.message.answers.iter().any(|record| matches!(&record.data, RData::A(address) if address.0 == ADDRESS))
    }

    async fn in_slice(&self, sources: &Sources, facts: &Facts, begun: Instant) -> Finding {
        let (id, expected) = (CheckId::E2eEndpointslice, "an EndpointSlice has the canary");
        let cluster = match &sources.cluster {
            Fact::Known(cluster) => cluster,
            Fact::Failed(why) | Fact::Skipped(why) => return Finding::skipped(id, expected, why.clone()),
        };
        if facts.status.known().is_some_and(|at| at.value.kubernetes.is_none()) {
            return Finding::skipped(id, expected, "the server runs without --kubernetes");
        }
        let mut last = String::new();
        let is_there = async {
            loop {
                match cluster.slice_addresses(self.namespace, &self.service).await {
                    Ok(addresses) if addresses.contains(&ADDRESS.to_string()) => return,
                    Ok(_) => {}
                    Err(err) => last = err.to_string(),
                }
                sleep(POLL_INTERVAL).await;
            }
        };
        match timeout(HOP_TIMEOUT, is_there).await {
            Ok(()) => Finding::passed(id, expected, milliseconds(begun)),
            Err(_) => {
                let cause = if last.is_empty() { "the mirror has not written it".into() } else { last };
                let fix = format!("kubectl get endpointslices -n {}", self.namespace);
                Finding::failed(id, expected, format!("not within {} s", HOP_TIMEOUT.as_secs()), cause, fix)
            }
        }
    }

    /// Removes it, whether or not it was registered: the answer to that may have been lost.
    async fn remove(&self, dns: Option<SocketAddr>) -> Finding {
        let begun = Instant::now();
        let fix = format!("gangplank deregister {} {ADDRESS} -n {}", self.service, self.namespace);
        let fault = |cause: String| Finding::failed(CheckId::E2eRemoved, REMOVED, "it may be left", cause, fix.clone());
        let spec = InstanceSpec { ports: Vec::new(), ..self.spec() };
        let removed = timeout(HOP_TIMEOUT, self.servers.unregister(self.namespace, &self.service, &spec)).await;
        match removed {
            Ok(Ok(answer)) if answer.status < 300 || answer.status == 404 => {}
            Ok(Ok(answer)) => return fault(format!("{}: {}", answer.status, answer.details)),
            Ok(Err(err)) => return fault(err.to_string()),
            Err(_) => return fault("no answer".into()),
        }
        if let Some(dns) = dns {
            let is_gone = async {
                while self.is_answered(dns).await {
                    sleep(POLL_INTERVAL).await;
                }
            };
            if timeout(HOP_TIMEOUT, is_gone).await.is_err() {
                return fault(format!("{dns} still answers with it"));
            }
        }
        Finding::passed(CheckId::E2eRemoved, REMOVED, milliseconds(begun))
    }
}

fn milliseconds(since: Instant) -> String {
    format!("{:.0} ms", since.elapsed().as_secs_f64() * 1000.0)
}
