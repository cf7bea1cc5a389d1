//! `gangplank registrants`: the machines that joined.

use std::time::SystemTime;

use serde::Serialize;

use super::{
    args::{ScopeArgs, ServerArgs, check_namespace},
    error::CommandError,
    joined::{scope_cell, wide_scope_cells},
    output::{Format, NONE, OutputArgs, Table, age, print, print_json, print_yaml, remaining},
};
use crate::{grpc::client::RegistrantView, model::UnixMillis};

pub(super) const EXAMPLES: &str = "\
A registrant that is revoked has no identity from then on: its streams end
within 15 s, and its certificate cannot be renewed. What it registered stays
until it is removed. CERTIFICATE is how long the last one is good.

Examples:
  gangplank registrants ls -n shop
  gangplank registrants ls -A -o wide
  gangplank registrants revoke gangplank:registrant:0a1b2c3d4e5f

Exit codes: 0 done, 1 failed or refused, 2 wrong usage";

#[derive(Debug, clap::Args)]
pub struct Args {
    #[command(subcommand)]
    command: RegistrantsCommand,
}

#[derive(Debug, clap::Subcommand)]
enum RegistrantsCommand {
    /// List the machines that joined
    Ls(LsArgs),
    /// Revoke one: its streams end, and its certificate is worth nothing
    Revoke(RevokeArgs),
}

#[derive(Debug, clap::Args)]
struct LsArgs {
    #[command(flatten)]
    scope: ScopeArgs,
    #[command(flatten)]
    output: OutputArgs,
    #[command(flatten)]
    server: ServerArgs,
}

#[derive(Debug, clap::Args)]
struct RevokeArgs {
    /// Its name, as `registrants ls` shows it
    name: String,
    #[command(flatten)]
    server: ServerArgs,
}

pub(super) async fn run(args: Args) -> Result<(), CommandError> {
    match args.command {
        RegistrantsCommand::Ls(args) => ls(args).await,
        RegistrantsCommand::Revoke(RevokeArgs { name, server }) => {
            let servers = server.readers().await?.servers;
            let usable = servers.read(async |client| client.revoke_registrant(&name).await).await?;
            let usable = usable.map(|id| {
                format!("its token can be used again, under another name; unless others need it:  gangplank token revoke {id}\n")
            });
            print(&format!("revoked {name}\n{}", usable.unwrap_or_default()))
        }
    }
}

#[derive(Debug, Serialize)]
struct RegistrantsView {
    registrants: Vec<RegistrantView>,
}

async fn ls(args: LsArgs) -> Result<(), CommandError> {
    let LsArgs { scope, output, server } = args;
    let connection = server.readers().await?;
    let namespace = scope.of(None, connection.namespace());
    namespace.map_or(Ok(()), check_namespace)?;
    let registrants = connection.servers.read(async |client| client.registrants(namespace).await).await?;
    match output.output {
        Some(Format::Json) => print_json(&RegistrantsView { registrants }),
        Some(Format::Yaml) => print_yaml(&RegistrantsView { registrants }),
        Some(Format::Name) => print(&registrants.iter().map(|one| format!("{}\n", one.name)).collect::<String>()),
        format @ (None | Some(Format::Wide)) => print(&table(&registrants, format, SystemTime::now())),
    }
}

fn table(registrants: &[RegistrantView], format: Option<Format>, now: SystemTime) -> String {
    let wide = format == Some(Format::Wide);
    let mut titles = vec!["NAME", "HOST", "SCOPE", "CERTIFICATE"];
    titles.extend_from_slice(if wide { &["VERBS", "ADDRESSES", "TOKEN", "AGE"] } else { &["AGE"] });
    let mut table = Table::new(&titles, &["HOST", "SCOPE"], format);
    for RegistrantView { name, scope, host, token, joined, expires, revoked } in registrants {
        let mut row = vec![
            name.clone(),
            if host.is_empty() { NONE.to_owned() } else { host.clone() },
            scope_cell(scope),
            if revoked.is_some() { "revoked".to_owned() } else { remaining(*expires, now) },
        ];
        if wide {
            row.extend(wide_scope_cells(scope));
            row.push(token.clone());
        }
        let joined = joined.duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default().as_millis();
        row.push(age(UnixMillis(u64::try_from(joined).unwrap_or(u64::MAX)), now));
        table.row(row);
    }
    if registrants.is_empty() { String::new() } else { table.render() }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;
    use crate::grpc::client::ScopeSpec;

    #[test]
    fn table_fits_into_80_columns() {
        let now = SystemTime::UNIX_EPOCH + Duration::from_secs(1_800_000_000);
        let one = |revoked| RegistrantView {
            name: "gangplank:registrant:0a1b2c3d4e5f".into(),
            scope: ScopeSpec { namespace: "shop".into(), service: "web".into(), ..ScopeSpec::default() },
            host: "a-machine-with-a-long-name.example.com".into(),
            token: "0101010101010101".into(),
            joined: now - Duration::from_secs(90),
            expires: now + Duration::from_secs(7200),
            revoked,
        };
        let all = [one(None), one(Some(now))];
        let text = table(&all, None, now);
        assert!(text.lines().all(|line| line.chars().count() <= 80), "{text}");
        assert!(text.contains("120m") && text.contains("revoked") && text.contains("90s"), "{text}");
        assert!(table(&all, Some(Format::Wide), now).contains("0101010101010101"));
    }
}
