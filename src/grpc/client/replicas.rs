//! What every replica says of itself.
//!
//! Each process answers for itself only, so all of them are asked: the servers that were given, every address of those
//! that are given by name (such as that of a headless Service), and the one that writes, which the others name.

use std::{collections::HashSet, net::IpAddr, time::Duration};

use futures::future;
use http::Uri;
use tokio::{net::lookup_host, time::timeout};
use tonic::Response;

use super::{
    Attempt, Client, ClientError, ClientTls, Servers, call, refused,
    servers::{innermost, urls_of},
};
use crate::{
    grpc::{convert::replica_from_proto, proto::gangplank::v1::GetReplicaRequest},
    model::Replica,
};

/// How long a replica may take to answer. It needs neither its disk nor the API server for that.
const REPLICA_TIMEOUT: Duration = Duration::from_secs(5);

/// The port of an http URL without one.
const HTTP_PORT: u16 = 80;

/// The replicas that were found.
#[derive(Debug)]
pub struct FoundReplicas {
    /// Each once, in order of their names, with the URL at which it was asked.
    pub replicas: Vec<(String, Replica)>,
    /// The servers that did not answer.
    pub failed: Vec<Attempt>,
}

/// One server: the URLs that lead to it, or to several.
#[derive(Debug)]
struct ServerUrls {
    urls: Vec<String>,
    /// The URLs are the ways to one process: one that answers is enough.
    is_one: bool,
}

impl Client {
    /// What the process says of itself.
    ///
    /// # Errors
    /// When the call itself fails.
    pub async fn replica(&mut self) -> Result<Replica, ClientError> {
        let answered = self.discovery.get_replica(call(GetReplicaRequest {})).await;
        answered.map(Response::into_inner).map(replica_from_proto).map_err(|status| refused(&self.url, status))
    }
}

impl Servers {
    /// Asks every replica that can be found.
    ///
    /// # Errors
    /// When a URL is invalid, or a name has no address.
    pub async fn replicas(&self) -> Result<FoundReplicas, ClientError> {
        let mut targets = Vec::new();
        for url in self.urls() {
            targets.push(resolve(url).await?);
        }
        let mut found = FoundReplicas { replicas: Vec::new(), failed: Vec::new() };
        found.ask(targets, self.tls()).await;
        let names: HashSet<&str> = found.replicas.iter().map(|(_, replica)| replica.name.as_str()).collect();
        let unasked = found
            .replicas
            .iter()
            .map(|(_, replica)| replica)
            .find(|replica| !replica.writer_addresses.is_empty() && !names.contains(replica.writer.as_str()));
        if let Some(Replica { writer_addresses, .. }) = unasked {
            let asked = self.urls().first().map_or("http:", String::as_str);
            let urls = writer_addresses.iter().flat_map(|address| urls_of(address, asked, self.tls())).collect();
            found.ask(vec![ServerUrls { urls, is_one: true }], self.tls()).await;
        }
        found.replicas.sort_by(|(_, one), (_, other)| one.name.cmp(&other.name));
        Ok(found)
    }
}

impl FoundReplicas {
    async fn ask(&mut self, targets: Vec<ServerUrls>, tls: &ClientTls) {
        let asked = targets.into_iter().map(async |ServerUrls { urls, is_one }| {
            let answers = urls.into_iter().map(async |url| {
                let answer =
                    timeout(REPLICA_TIMEOUT, async { Client::connect(&url, tls).await?.replica().await }).await;
                let answer = answer.unwrap_or_else(|late| Err(ClientError::late(&url, late)));
                (url, answer)
            });
            (future::join_all(answers).await, is_one)
        });
        for (answers, is_one) in future::join_all(asked).await {
            let answered = answers.iter().any(|(_, answer)| answer.is_ok());
            for (url, answer) in answers {
                match answer {
                    Ok(replica) if !self.has(&url, &replica) => self.replicas.push((url, replica)),
                    Ok(_) => {}
                    // The same process by another of its addresses.
                    Err(_) if is_one && answered => {}
                    Err(err) => self.failed.push(Attempt { url, reason: innermost(&err) }),
                }
            }
        }
    }

    fn has(&self, url: &str, replica: &Replica) -> bool {
        self.replicas.iter().any(
            |(known_url, known)| {
                if replica.name.is_empty() { known_url == url } else { known.name == replica.name }
            },
        )
    }
}

/// Every address of a server that is given by name.
async fn resolve(url: &str) -> Result<ServerUrls, ClientError> {
    let no_url = || ClientError::Url { url: url.to_owned() };
    let uri: Uri = url.parse().map_err(|_| no_url())?;
    let host = uri.host().ok_or_else(no_url)?;
    if host.trim_matches(['[', ']']).parse::<IpAddr>().is_ok() || uri.scheme_str() != Some("http") {
        // With https the name is kept: the certificate is for it, not for its addresses. Other schemes are refused when
        // dialled.
        return Ok(ServerUrls { urls: vec![url.to_owned()], is_one: false });
    }
    let port = uri.port_u16().unwrap_or(HTTP_PORT);
    let addresses = lookup_host((host, port)).await;
    let addresses = addresses.map_err(|err| ClientError::Unreachable { url: url.to_owned(), source: err.into() })?;
    let mut seen = HashSet::new();
    let addresses: Vec<_> = addresses.filter(|address| seen.insert(*address)).collect();
    // `localhost` is one process, which listens for IPv4 or IPv6.
    let is_one = addresses.iter().all(|address| address.ip().is_loopback());
    Ok(ServerUrls { urls: addresses.into_iter().map(|address| format!("http://{address}")).collect(), is_one })
}
