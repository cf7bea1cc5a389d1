//! `gangplank watch`: the instances that are registered, then every change, one line each.

use std::{
    fmt::Write as _,
    io::{self, IsTerminal as _},
    str::FromStr,
    time::SystemTime,
};

use serde::Serialize;

use super::{
    args::{ScopeArgs, ServerArgs, ServiceArg, check_namespace, key},
    error::{CommandError, ErrorKind},
    output::{Format, OutputArgs, age, colour_allowed, print, print_yaml},
};
use crate::{
    grpc::client::{ChangeKind, Servers, WatchEvent},
    model::{
        Instance, Registrant, ServiceKey, Timeline, hex,
        view::{InstanceView, ServiceView, TimelineView},
    },
};

pub(super) const EXAMPLES: &str = "\
First comes every registered instance (CHANGE is present), then every change.
-o json prints one object a line, by its \"type\": \"snapshot\" and \"synced\",
then \"added\", \"updated\" or \"removed\" with a cursor and the times at which
the change was received, durable, visible and acknowledged. --from CURSOR goes
on after that change.

Examples:
  gangplank watch
  gangplank watch prod/web
  gangplank watch -A -o json
  gangplank watch -A -o json --from 0a1b2c3d4e5f

Exit codes: 0 interrupted with Ctrl-C, 1 the server is unreachable, stops, or
ends the watch (the reason is on standard error), 2 wrong usage";

#[derive(Debug, clap::Args)]
pub struct Args {
    /// Only this service: NAME, or NAMESPACE/NAME
    #[arg(conflicts_with = "all_namespaces")]
    service: Option<ServiceArg>,
    #[command(flatten)]
    scope: ScopeArgs,
    /// Go on after the change that carried this cursor, without a snapshot
    #[arg(long, value_name = "CURSOR")]
    from: Option<CursorArg>,
    #[command(flatten)]
    output: OutputArgs,
    #[command(flatten)]
    server: ServerArgs,
}

/// A position in the change feed, in hexadecimal. Only the server knows what is in it.
#[derive(Debug, Clone, PartialEq, Eq)]
struct CursorArg(Vec<u8>);

impl FromStr for CursorArg {
    type Err = &'static str;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let bytes = hex::decode(text).filter(|bytes| !bytes.is_empty());
        bytes.map(Self).ok_or("a cursor is an even number of hexadecimal digits, as -o json prints it")
    }
}

pub(super) async fn run(args: Args) -> Result<(), CommandError> {
    let Args { service, scope, from, output, server } = args;
    let connection = server.readers().await?;
    let namespace = scope.of(service.as_ref(), connection.namespace());
    match &service {
        Some(service) => drop(key(namespace.unwrap_or_default(), &service.name)?),
        None => namespace.map_or(Ok(()), check_namespace)?,
    }
    let name = service.as_ref().map(|service| service.name.as_str());
    let watching =
        follow(connection.servers.clone(), namespace, name, from.map(|CursorArg(bytes)| bytes), output.output);
    tokio::select! {
        ended = watching => ended,
        // How a watch ends: no failure.
        interrupted = tokio::signal::ctrl_c() => Ok(interrupted?),
    }
}

async fn follow(
    servers: Servers,
    namespace: Option<&str>,
    service: Option<&str>,
    from: Option<Vec<u8>>,
    format: Option<Format>,
) -> Result<(), CommandError> {
    let mut watch = servers.read(async |client| client.watch(namespace, service, from.clone()).await).await?;
    let mut printer = EventPrinter { format, colour: colour_allowed(io::stdout().is_terminal()), titled: false };
    // Where a new watch can resume if this one breaks.
    let mut last_cursor = None;
    loop {
        let event = match watch.next().await {
            Ok(Some(event)) => event,
            Ok(None) => return Err(ended("the server ended the watch", last_cursor.as_deref())),
            Err(err) => return Err(ended(&err.to_string(), last_cursor.as_deref())),
        };
        // The server does not know the cursor any more, or has dropped changes, so the hint is to begin without one.
        if let WatchEvent::Restart { reason, message } = event {
            let what = format!("the server ended the watch ({reason}): {message}");
            return Err(
                CommandError::new(ErrorKind::Failed, what).hint("start again, without --from:  gangplank watch")
            );
        }
        if let WatchEvent::Synced { cursor, .. } | WatchEvent::Change { cursor, .. } = &event {
            last_cursor = Some(cursor.clone());
        }
        printer.print(&event)?;
    }
}

fn ended(message: &str, last_cursor: Option<&[u8]>) -> CommandError {
    let failure = CommandError::new(ErrorKind::Failed, message);
    match last_cursor {
        Some(cursor) => failure.hint(format!("go on where it ended:  gangplank watch --from {}", hex::encode(cursor))),
        None => failure.hint("start again:  gangplank watch"),
    }
}

/// One line of `-o json`, one document of `-o yaml`.
#[derive(Serialize)]
#[serde(tag = "type", rename_all = "lowercase")]
enum EventRecord<'a> {
    Snapshot { service: ServiceView<'a> },
    Synced { generation: u64, cursor: String },
    Added(ChangeRecord<'a>),
    Updated(ChangeRecord<'a>),
    Removed(ChangeRecord<'a>),
}

#[derive(Serialize)]
struct ChangeRecord<'a> {
    namespace: &'a str,
    name: &'a str,
    /// Without a share: a change does not carry the service's other instances.
    instance: InstanceView<'a>,
    generation: u64,
    cursor: String,
    timeline: TimelineView,
}

impl<'a> EventRecord<'a> {
    fn of(event: &'a WatchEvent) -> Option<Self> {
        Some(match event {
            WatchEvent::Snapshot(key, service) => Self::Snapshot { service: ServiceView { key, service } },
            WatchEvent::Synced { generation, cursor } => {
                Self::Synced { generation: *generation, cursor: hex::encode(cursor) }
            }
            WatchEvent::Change { kind, service, instance, generation, timeline, cursor } => {
                let changed = ChangeRecord {
                    namespace: service.namespace(),
                    name: service.name(),
                    instance: InstanceView { instance, share: None },
                    generation: *generation,
                    cursor: hex::encode(cursor),
                    timeline: TimelineView(*timeline),
                };
                match kind {
                    ChangeKind::Added => Self::Added(changed),
                    ChangeKind::Updated => Self::Updated(changed),
                    ChangeKind::Removed => Self::Removed(changed),
                }
            }
            // Ends the watch, and is printed to standard error.
            WatchEvent::Restart { .. } => return None,
        })
    }
}

/// Prints events as they arrive.
struct EventPrinter {
    format: Option<Format>,
    colour: bool,
    titled: bool,
}

impl EventPrinter {
    fn print(&mut self, event: &WatchEvent) -> Result<(), CommandError> {
        let Some(line) = EventRecord::of(event) else { return Ok(()) };
        match self.format {
            // Printed at once and flushed: a watch that is piped into another program must not wait for a buffer to
            // fill.
            None | Some(Format::Wide) => print(&self.rows(event, SystemTime::now())),
            Some(Format::Json) => {
                let text = serde_json::to_string(&line).map_err(io::Error::from)?;
                print(&(text + "\n"))
            }
            Some(Format::Yaml) => {
                print("---\n")?;
                print_yaml(&line)
            }
            Some(Format::Name) => print(&names(event)),
        }
    }

    /// The rows of a table without an end. Later rows are not known, so the widths are fixed.
    fn rows(&mut self, event: &WatchEvent, now: SystemTime) -> String {
        let mut text = String::new();
        if !self.titled {
            let more = if self.wide() { "   GENERATION   VISIBLE   REGISTRANT      " } else { "" };
            text = format!("NAMESPACE    NAME               CHANGE    INSTANCE               READY{more}   AGE\n");
            self.titled = true;
        }
        match event {
            WatchEvent::Snapshot(key, service) => {
                for instance in service.instances.iter() {
                    text += &self.row(key, "present", instance, service.generation, None, now);
                }
            }
            WatchEvent::Change { kind, service, instance, generation, timeline, .. } => {
                let word = match kind {
                    ChangeKind::Added => "added",
                    ChangeKind::Updated => "updated",
                    ChangeKind::Removed => "removed",
                };
                text += &self.row(service, word, instance, *generation, Some(timeline), now);
            }
            WatchEvent::Synced { .. } | WatchEvent::Restart { .. } => {}
        }
        text
    }

    fn row(
        &self,
        key: &ServiceKey,
        change: &str,
        instance: &Instance,
        generation: u64,
        timeline: Option<&Timeline>,
        now: SystemTime,
    ) -> String {
        let colour = match change {
            _ if !self.colour => "",
            "added" => "\x1b[32m",
            "updated" => "\x1b[33m",
            "removed" => "\x1b[31m",
            _ => "",
        };
        let off = if colour.is_empty() { "" } else { "\x1b[0m" };
        let (namespace, name, id) = (key.namespace(), key.name(), instance.id().to_string());
        let mut row =
            format!("{namespace:<10}   {name:<16}   {colour}{change:<7}{off}   {id:<20}   {:<5}", instance.ready());
        if self.wide() {
            // From receiving the change to answering DNS with it.
            let visible = timeline.map_or_else(
                || "<none>".to_owned(),
                |timeline| format!("{}ms", timeline.visible.0.saturating_sub(timeline.received.0)),
            );
            let registrant = instance.registrant().map_or("<none>", Registrant::as_str);
            write!(row, "   {generation:<10}   {visible:<7}   {registrant:<16}").expect("a String takes everything");
        }
        row + "   " + &age(instance.registered(), now) + "\n"
    }

    fn wide(&self) -> bool {
        self.format == Some(Format::Wide)
    }
}

fn names(event: &WatchEvent) -> String {
    match event {
        WatchEvent::Snapshot(key, service) => {
            service.instances.iter().map(|instance| format!("{key} {}\n", instance.id())).collect()
        }
        WatchEvent::Change { service, instance, .. } => format!("{service} {}\n", instance.id()),
        WatchEvent::Synced { .. } | WatchEvent::Restart { .. } => String::new(),
    }
}

#[cfg(test)]
mod tests {
    use std::{sync::Arc, time::Duration};

    use serde_json::{Value, json};

    use super::*;
    use crate::{
        cli::args::PERMISSIVE_VALIDATOR,
        model::{InstanceSpec, Service, UnixMillis},
    };

    fn instance() -> Arc<Instance> {
        let spec = InstanceSpec {
            address: "10.0.0.1".into(),
            ports: vec![crate::cli::args::port("http=8080").expect("a port")],
            ..InstanceSpec::default()
        };
        let key = key("prod", "web").expect("valid");
        Arc::new(PERMISSIVE_VALIDATOR.instance(&key, &spec, UnixMillis(1_000_000)).expect("valid"))
    }

    fn change() -> WatchEvent {
        WatchEvent::Change {
            kind: ChangeKind::Added,
            service: key("prod", "web").expect("valid"),
            instance: instance(),
            generation: 1712,
            timeline: Timeline {
                received: UnixMillis(1_000_000),
                durable: UnixMillis(1_000_001),
                visible: UnixMillis(1_000_002),
                acknowledged: UnixMillis(1_000_003),
            },
            cursor: vec![0x0a, 0xff],
        }
    }

    fn snapshot() -> WatchEvent {
        let service = Service { instances: std::iter::once(instance()).collect(), generation: 1700 };
        WatchEvent::Snapshot(key("prod", "web").expect("valid"), service)
    }

    fn json_of(event: &WatchEvent) -> Value {
        serde_json::to_value(EventRecord::of(event).expect("a line")).expect("JSON")
    }

    #[test]
    fn printed_cursor_parses() {
        assert_eq!(hex::encode(&[0x00, 0x0a, 0xff]).parse(), Ok(CursorArg(vec![0x00, 0x0a, 0xff])));
        for bad in ["", "a", "xy", "0a1", "äé", "+1"] {
            assert!(bad.parse::<CursorArg>().is_err(), "{bad:?}");
        }
    }

    #[test]
    fn json_has_a_type_a_cursor_and_the_timeline() {
        let line = json_of(&change());
        assert_eq!(line["type"], "added");
        assert_eq!((&line["namespace"], &line["name"]), (&json!("prod"), &json!("web")));
        assert_eq!(line["instance"]["address"], "10.0.0.1");
        assert_eq!(line["instance"]["share"], Value::Null, "the other instances are not known");
        assert_eq!((&line["generation"], &line["cursor"]), (&json!(1712), &json!("0aff")));
        assert_eq!(line["timeline"]["visible"], "1970-01-01T00:16:40.002Z");
        let line = json_of(&snapshot());
        assert_eq!((&line["type"], &line["service"]["instances"][0]["share"]), (&json!("snapshot"), &json!(1.0)));
        let synced = WatchEvent::Synced { generation: 5, cursor: vec![1] };
        assert_eq!(json_of(&synced), json!({"type": "synced", "generation": 5, "cursor": "01"}));
    }

    #[test]
    fn rows_are_aligned_with_their_titles_within_80_columns() {
        let mut printer = EventPrinter { format: None, colour: false, titled: false };
        let now = SystemTime::UNIX_EPOCH + Duration::from_secs(1300);
        let text = printer.rows(&snapshot(), now) + &printer.rows(&change(), now);
        let rows: Vec<&str> = text.lines().collect();
        assert_eq!(rows.len(), 3, "{text}");
        let ends = |title: &str, cell: &str, row: usize| {
            assert_eq!(rows[0].find(title).expect(title), rows[row].find(cell).expect(cell), "{text}");
        };
        for (title, cell) in [("NAME ", "web"), ("INSTANCE", "10.0.0.1:8080"), ("READY", "true"), ("AGE", "5m")] {
            ends(title, cell, 1);
            ends(title, cell, 2);
        }
        ends("CHANGE", "present", 1);
        ends("CHANGE", "added", 2);
        assert!(rows.iter().all(|row| row.chars().count() <= 80), "{text}");
    }

    #[test]
    fn wide_rows_show_the_registrant() {
        let mut printer = EventPrinter { format: Some(Format::Wide), colour: false, titled: false };
        let mut event = change();
        if let WatchEvent::Change { instance, .. } = &mut event {
            let registrant = Registrant::new("vm-7".into()).expect("a name");
            *instance = Arc::new(Instance::clone(instance).with_registrant(Some(registrant)));
        }
        let text = printer.rows(&event, SystemTime::now());
        let rows: Vec<&str> = text.lines().collect();
        assert_eq!(rows[0].find("REGISTRANT"), rows[1].find("vm-7"), "{text}");
        assert_eq!(json_of(&event)["instance"]["registrant"], "vm-7");
        assert_eq!(json_of(&change())["instance"]["registrant"], Value::Null);
    }

    #[test]
    fn broken_watch_hints_at_its_last_cursor() {
        assert!(ended("gone", Some(&[0x0a])).to_string().contains("--from 0a"));
        assert_eq!(ended("gone", None).kind, ErrorKind::Failed);
    }
}
