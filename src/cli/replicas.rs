//! `gangplank replicas`: the processes that answer the same, and which of them writes.

use std::time::SystemTime;

use serde::Serialize;

use super::{
    args::ServerArgs,
    error::{CommandError, ErrorKind},
    output::{Format, NONE, OutputArgs, Table, age, print, print_json, print_yaml},
};
use crate::{
    grpc::client::{Attempt, FoundReplicas},
    model::{Replica, ServerAddress},
};

pub(super) const EXAMPLES: &str = "\
Each process answers for itself, so name all of them: --server, repeated, or a
name with an address for each, such as that of a headless Service. The one that
writes is found through the others.

ROLE is writer, standby, taking-over, or alone (without Kubernetes). STALE is
how old the answers of a process on standby may be. OUTBOX counts what
Kubernetes lacks: services at the writer, registrations and removals elsewhere.
AGE is the time in this role.

Examples:
  gangplank replicas
  gangplank replicas --server http://10.0.0.1:9080,http://10.0.0.2:9080
  gangplank replicas --server http://gangplank-all.gangplank.svc:9080 -o wide
  gangplank replicas -o json

Exit codes: 0 every server answered, 1 one did not, 2 wrong usage";

#[derive(Debug, clap::Args)]
pub struct Args {
    #[command(flatten)]
    output: OutputArgs,
    #[command(flatten)]
    server: ServerArgs,
}

/// One replica as JSON.
#[derive(Debug, Serialize)]
struct ReplicaView<'a> {
    /// The URL at which it was asked.
    server: &'a str,
    #[serde(flatten)]
    replica: &'a Replica,
}

#[derive(Debug, Serialize)]
struct ReplicasView<'a> {
    replicas: Vec<ReplicaView<'a>>,
}

pub(super) async fn run(args: Args) -> Result<(), CommandError> {
    let Args { output, server } = args;
    let FoundReplicas { replicas, failed } = server.readers().await?.servers.replicas().await?;
    let view = || ReplicasView {
        replicas: replicas.iter().map(|(server, replica)| ReplicaView { server, replica }).collect(),
    };
    match output.output {
        Some(Format::Json) => print_json(&view())?,
        Some(Format::Yaml) => print_yaml(&view())?,
        Some(Format::Name) => {
            let names = replicas.iter().map(|(_, replica)| format!("{}\n", replica.name));
            print(&names.collect::<String>())?;
        }
        None | Some(Format::Wide) if replicas.is_empty() => {}
        format @ (None | Some(Format::Wide)) => print(&table(&replicas, format, SystemTime::now()))?,
    }
    if failed.is_empty() {
        return Ok(());
    }
    let what = match replicas.len() {
        0 => "no server answered".to_owned(),
        _ => format!("{} of {} servers did not answer", failed.len(), failed.len() + replicas.len()),
    };
    let failure = CommandError::new(ErrorKind::Failed, what);
    Err(failed.iter().map(|Attempt { url, reason }| format!("{url}: {reason}")).fold(failure, CommandError::hint))
}

fn table(replicas: &[(String, Replica)], format: Option<Format>, now: SystemTime) -> String {
    let wide = format == Some(Format::Wide);
    let mut titles = vec!["NAME", "ROLE", "TERM", "GENERATION", "STALE", "OUTBOX", "VERSION"];
    titles.extend_from_slice(if wide { &["LEASE", "ADDRESSES", "SERVER", "AGE"] } else { &["AGE"] });
    let mut table = Table::new(&titles, &["NAME"], format);
    let seconds = |value: Option<f64>| value.map_or_else(|| NONE.to_owned(), |value| format!("{value:.1}s"));
    for (server, replica) in replicas {
        let name = if wide { replica.name.as_str() } else { host(&replica.name) };
        let mut row = vec![
            if name.is_empty() { NONE.to_owned() } else { name.to_owned() },
            replica.role.as_str().to_owned(),
            replica.term.to_string(),
            replica.generation.to_string(),
            seconds(replica.age_seconds),
            (replica.services_behind + replica.outbox_words).to_string(),
            replica.version.clone(),
        ];
        if wide {
            let addresses = ServerAddress::list(&replica.addresses, ",");
            row.push(seconds(replica.lease_age_seconds));
            row.push(if addresses.is_empty() { NONE.into() } else { addresses });
            row.push(server.clone());
        }
        row.push(age(replica.since, now));
        table.row(row);
    }
    table.render()
}

/// The host name in `HOST_DIRECTORY`.
fn host(name: &str) -> &str {
    name.rsplit_once('_').map_or(name, |(host, _)| host)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::{ReplicaRole, UnixMillis};

    fn replica(name: &str, role: ReplicaRole, age_seconds: Option<f64>) -> (String, Replica) {
        let replica = Replica {
            name: name.into(),
            version: "0.1.0".into(),
            role,
            since: UnixMillis(1_700_000_000_000),
            term: 1_795_259_007,
            generation: 1_795_259_123,
            age_seconds,
            lease_age_seconds: Some(1.24),
            services_behind: 0,
            outbox_words: 0,
            addresses: ServerAddress::parse_list("10.0.0.1:9080"),
            writer: "gangplank-0_7".into(),
            writer_addresses: Vec::new(),
        };
        ("http://10.0.0.1:9080".into(), replica)
    }

    #[test]
    fn table_has_a_row_for_each_within_80_columns() {
        let directory = "0123456789abcdef0123456789abcdef";
        let replicas = [
            replica(&format!("gangplank-6d4b75cb6d-hx2vq_{directory}"), ReplicaRole::Writer, None),
            replica(&format!("gp-1_{directory}"), ReplicaRole::Standby, Some(0.84)),
        ];
        let now = UnixMillis(1_700_000_300_000).to_system_time();
        let narrow = table(&replicas, None, now);
        assert!(narrow.lines().all(|line| line.chars().count() <= 80), "{narrow}");
        let rows: Vec<Vec<&str>> = narrow.lines().map(|line| line.split_whitespace().collect()).collect();
        assert_eq!(rows[0], ["NAME", "ROLE", "TERM", "GENERATION", "STALE", "OUTBOX", "VERSION", "AGE"]);
        assert_eq!(rows[1][1..], ["writer", "1795259007", "1795259123", "<none>", "0", "0.1.0", "5m"]);
        assert_eq!(rows[2], ["gp-1", "standby", "1795259007", "1795259123", "0.8s", "0", "0.1.0", "5m"]);
        let wide = table(&replicas, Some(Format::Wide), now);
        assert!(wide.contains(directory) && wide.contains("10.0.0.1:9080") && wide.contains("1.2s"), "{wide}");
    }
}
