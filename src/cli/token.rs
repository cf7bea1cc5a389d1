//! `gangplank token`: join tokens.

use std::time::{Duration, SystemTime};

use serde::Serialize;

use super::{
    args::{ScopeArgs, ServerArgs, check_namespace},
    error::{CommandError, ErrorKind},
    joined::{scope_cell, wide_scope_cells},
    output::{Format, OutputArgs, Table, print, print_json, print_yaml, remaining},
};
use crate::grpc::client::{ScopeSpec, TokenId, TokenView};

pub(super) const EXAMPLES: &str = "\
`token create` prints the command to type on the machine that joins. What the
machine may do there is what the token says, and nothing else. The token is
told this once; the server keeps a hash of it. The server needs a CA of its
own: --grpc-listen beyond loopback, and no --tls-cert.

Examples:
  gangplank token create -n shop --service web
  gangplank token create -n shop --ttl 24h --uses 50 --address 10.1.0.0/16
  gangplank token create -A --verb get --verb list --verb watch
  gangplank token ls -A
  gangplank token revoke 0a1b2c3d4e5f6071

Exit codes: 0 done, 1 failed or refused, 2 wrong usage";

#[derive(Debug, clap::Args)]
pub struct Args {
    #[command(subcommand)]
    command: TokenCommand,
}

#[derive(Debug, clap::Subcommand)]
enum TokenCommand {
    /// Create a token, and print the command that joins with it
    Create(CreateArgs),
    /// List the tokens, without their secrets
    Ls(LsArgs),
    /// Revoke a token; who joined with it stays
    Revoke(RevokeArgs),
}

#[derive(Debug, clap::Args)]
struct CreateArgs {
    #[command(flatten)]
    scope: ScopeArgs,
    /// The service [default: every service of the namespace]
    #[arg(long, value_name = "NAME")]
    service: Option<String>,
    /// What may be done: create (register), delete (deregister), get, list, watch, override;
    /// repeatable [default: create, delete, get, watch; without --service list, too]
    #[arg(long = "verb", value_name = "VERB", value_delimiter = ',')]
    verbs: Vec<String>,
    /// The addresses that may be registered: a network, or `own`, where the connection
    /// comes from; repeatable [default: any]
    #[arg(long = "address", value_name = "CIDR|own", value_delimiter = ',')]
    addresses: Vec<String>,
    /// How long it is good, 1s to 30days
    #[arg(long, value_name = "TIME", default_value = "1h", value_parser = whole_seconds)]
    ttl: Duration,
    /// How many machines may join with it, 1 to 10000
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..=10_000))]
    uses: u32,
    #[command(flatten)]
    server: ServerArgs,
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
    /// Its id, as `token ls` shows it
    #[arg(value_parser = |text: &str| text.parse::<TokenId>())]
    id: TokenId,
    #[command(flatten)]
    server: ServerArgs,
}

fn whole_seconds(text: &str) -> Result<Duration, String> {
    let parsed = humantime::parse_duration(text).map_err(|err| err.to_string())?;
    // The message has whole seconds: less than one would be a token that is never good.
    if parsed.as_secs() == 0 { Err("must be at least 1s".into()) } else { Ok(parsed) }
}

pub(super) async fn run(args: Args) -> Result<(), CommandError> {
    match args.command {
        TokenCommand::Create(args) => create(args).await,
        TokenCommand::Ls(args) => ls(args).await,
        TokenCommand::Revoke(args) => revoke(args).await,
    }
}

async fn create(args: CreateArgs) -> Result<(), CommandError> {
    let CreateArgs { scope, service, verbs, addresses, ttl, uses, server } = args;
    if scope.all_namespaces && service.is_some() {
        return Err(CommandError::new(ErrorKind::Usage, "--service: needs a namespace, and -A means all of them"));
    }
    let connection = server.readers().await?;
    let namespace = scope.of(None, connection.namespace()).unwrap_or_default().to_owned();
    let spec = ScopeSpec { namespace, service: service.unwrap_or_default(), verbs, addresses };
    let (token, _) = connection.servers.read(async |client| client.create_token(spec.clone(), ttl, uses).await).await?;
    print(&format!("gangplank join {token}\n"))
}

#[derive(Debug, Serialize)]
struct TokensView {
    tokens: Vec<TokenView>,
}

async fn ls(args: LsArgs) -> Result<(), CommandError> {
    let LsArgs { scope, output, server } = args;
    let connection = server.readers().await?;
    let namespace = scope.of(None, connection.namespace());
    namespace.map_or(Ok(()), check_namespace)?;
    let tokens = connection.servers.read(async |client| client.tokens(namespace).await).await?;
    match output.output {
        Some(Format::Json) => print_json(&TokensView { tokens }),
        Some(Format::Yaml) => print_yaml(&TokensView { tokens }),
        Some(Format::Name) => print(&tokens.iter().map(|token| format!("{}\n", token.id)).collect::<String>()),
        format @ (None | Some(Format::Wide)) => print(&table(&tokens, format, SystemTime::now())),
    }
}

fn table(tokens: &[TokenView], format: Option<Format>, now: SystemTime) -> String {
    let wide = format == Some(Format::Wide);
    let mut titles = vec!["ID", "SCOPE", "USED", "EXPIRES"];
    titles.extend_from_slice(if wide { &["VERBS", "ADDRESSES", "CREATED-BY"] } else { &[] });
    let mut table = Table::new(&titles, &["SCOPE"], format);
    for TokenView { id, scope, created_by, created: _, expires, uses, used } in tokens {
        let mut row = vec![id.clone(), scope_cell(scope), format!("{used}/{uses}"), remaining(*expires, now)];
        if wide {
            row.extend(wide_scope_cells(scope));
            row.push(created_by.clone());
        }
        table.row(row);
    }
    if tokens.is_empty() { String::new() } else { table.render() }
}

async fn revoke(RevokeArgs { id, server }: RevokeArgs) -> Result<(), CommandError> {
    server.readers().await?.servers.read(async |client| client.revoke_token(id).await).await?;
    print(&format!("revoked the token {id}; machines that joined with it stay: gangplank registrants ls\n"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn table_shows_what_is_left() {
        let now = SystemTime::UNIX_EPOCH + Duration::from_secs(1_800_000_000);
        let token = |namespace: &str, service: &str, expires| TokenView {
            id: "0101010101010101".into(),
            scope: ScopeSpec { namespace: namespace.into(), service: service.into(), ..ScopeSpec::default() },
            created_by: "gangplank:loopback".into(),
            created: now,
            expires,
            uses: 2,
            used: 1,
        };
        let tokens = [token("shop", "web", now + Duration::from_secs(90)), token("", "", now)];
        let text = table(&tokens, None, now);
        let rows: Vec<Vec<&str>> = text.lines().map(|line| line.split_whitespace().collect()).collect();
        assert_eq!(rows[1], ["0101010101010101", "shop/web", "1/2", "90s"]);
        assert_eq!(rows[2], ["0101010101010101", "*/*", "1/2", "expired"]);
        assert!(table(&tokens, Some(Format::Wide), now).contains("gangplank:loopback"));
    }
}
