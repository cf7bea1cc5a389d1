//! What DNS names lead to that are instances, as `ls` and `resolve` show it.

use std::time::SystemTime;

use super::output::{Format, NONE, Table, age};
use crate::{
    grpc::client::{ClientError, Servers},
    model::{DnsName, NameStatus, Resolution, Service, ServiceKey},
};

/// What the names among the instances of `service` lead to; nothing from a server that is too old to know.
pub(super) async fn names_of(
    servers: &Servers,
    key: &ServiceKey,
    service: &Service,
) -> Result<Vec<(DnsName, NameStatus)>, ClientError> {
    if service.instances.iter().all(|one| one.address().name().is_none()) {
        return Ok(Vec::new());
    }
    servers.read(async |client| client.names(key).await).await
}

/// A row for each name.
pub(super) fn names_table(names: &[(DnsName, NameStatus)], format: Option<Format>, now: SystemTime) -> String {
    let mut table = Table::new(&["DNS-NAME", "ADDRESSES", "TTL", "ANSWERED", "ERROR"], &["ERROR", "ADDRESSES"], format);
    for (name, NameStatus { resolution, answered, error }) in names {
        let (addresses, ttl) = match &**resolution {
            Resolution::Unavailable => ("unresolved".to_owned(), None),
            Resolution::NxDomain => ("NXDOMAIN".to_owned(), None),
            Resolution::Addresses(found) if found.is_empty() => (NONE.to_owned(), None),
            Resolution::Addresses(found) => {
                let addresses: Vec<String> = found.iter().map(|ip| ip.to_string()).collect();
                (addresses.join(","), Some(found.ttl))
            }
        };
        table.row(vec![
            name.to_string(),
            addresses,
            ttl.map_or_else(|| NONE.to_owned(), |ttl| format!("{ttl}s")),
            answered.map_or_else(|| "never".to_owned(), |answered| age(answered, now)),
            error.as_deref().unwrap_or(NONE).to_owned(),
        ]);
    }
    table.render()
}
