//! Where registrations are taken instead, in a form that programs read: the metadata `gangplank-writer`, a list of
//! `ADDRESS:PORT` with commas. People read the same in `status_details`.

use tonic::{
    Status,
    metadata::{Ascii, MetadataMap, MetadataValue},
};

use crate::{model::ServerAddress, registry::LeaseHolder};

/// The key. Clients know it, so it never changes.
const KEY: &str = "gangplank-writer";

/// Adds the addresses of `holder`, if it has any.
pub(super) fn add(metadata: &mut MetadataMap, holder: &LeaseHolder) {
    let list: Result<MetadataValue<Ascii>, _> = ServerAddress::list(&holder.addresses, ",").parse();
    // Addresses and DNS names are ASCII.
    if let Ok(list) = list
        && !list.is_empty()
    {
        metadata.insert(KEY, list);
    }
}

/// The addresses that `metadata` names.
pub(super) fn read(metadata: &MetadataMap) -> Vec<ServerAddress> {
    let list = metadata.get(KEY).and_then(|list| list.to_str().ok());
    list.map(ServerAddress::parse_list).unwrap_or_default()
}

/// `status` with the addresses of `holder`.
pub(super) fn with(mut status: Status, holder: &LeaseHolder) -> Status {
    add(status.metadata_mut(), holder);
    status
}
