//! What a process says of itself as one of the replicas, in both directions.

use super::discovery::{millis, timestamp};
use crate::{
    grpc::proto::gangplank::v1::{GetReplicaResponse, get_replica_response::Role},
    model::{Replica, ReplicaRole, ServerAddress},
};

pub(in crate::grpc) fn replica_to_proto(replica: &Replica) -> GetReplicaResponse {
    let texts = |addresses: &[ServerAddress]| addresses.iter().map(ToString::to_string).collect();
    let role = match replica.role {
        ReplicaRole::Alone => Role::Alone,
        ReplicaRole::Standby => Role::Standby,
        ReplicaRole::TakingOver => Role::TakingOver,
        ReplicaRole::Writer => Role::Writer,
    };
    GetReplicaResponse {
        name: replica.name.clone(),
        version: replica.version.clone(),
        role: role.into(),
        since: Some(timestamp(replica.since)),
        term: replica.term,
        generation: replica.generation,
        age_seconds: replica.age_seconds,
        lease_age_seconds: replica.lease_age_seconds,
        services_behind: replica.services_behind,
        outbox_words: replica.outbox_words,
        addresses: texts(&replica.addresses),
        writer: replica.writer.clone(),
        writer_addresses: texts(&replica.writer_addresses),
    }
}

/// A role that this version does not know is that of a process on standby: it does not write.
pub(in crate::grpc) fn replica_from_proto(response: GetReplicaResponse) -> Replica {
    let role = match response.role() {
        Role::Alone => ReplicaRole::Alone,
        Role::Standby | Role::Unspecified => ReplicaRole::Standby,
        Role::TakingOver => ReplicaRole::TakingOver,
        Role::Writer => ReplicaRole::Writer,
    };
    Replica {
        role,
        since: millis(response.since),
        addresses: ServerAddress::parse_list(&response.addresses.join(",")),
        writer_addresses: ServerAddress::parse_list(&response.writer_addresses.join(",")),
        name: response.name,
        version: response.version,
        term: response.term,
        generation: response.generation,
        age_seconds: response.age_seconds,
        lease_age_seconds: response.lease_age_seconds,
        services_behind: response.services_behind,
        outbox_words: response.outbox_words,
        writer: response.writer,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::UnixMillis;

    #[test]
    fn replica_is_read_back_unchanged() {
        for role in [ReplicaRole::Alone, ReplicaRole::Standby, ReplicaRole::TakingOver, ReplicaRole::Writer] {
            let replica = Replica {
                name: "vm-1_7".into(),
                version: "1.2.3".into(),
                role,
                since: UnixMillis(1_700_000_000_123),
                term: 7,
                generation: 9,
                age_seconds: Some(0.5),
                lease_age_seconds: None,
                services_behind: 3,
                outbox_words: 4,
                addresses: ServerAddress::parse_list("10.0.0.1:9080,[2001:db8::1]:9080"),
                writer: "vm-2_8".into(),
                writer_addresses: ServerAddress::parse_list("gangplank.example.com:9080"),
            };
            assert_eq!(replica_from_proto(replica_to_proto(&replica)), replica);
        }
    }
}
