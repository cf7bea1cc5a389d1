//! The answers as a table, JSON or YAML, and the exit code they mean.

use std::{
    collections::BTreeSet,
    net::{IpAddr, SocketAddr},
};

use hickory_proto::{
    op::ResponseCode,
    rr::{Name, RData, Record, RecordType},
};
use serde::Serialize;

use super::query::Reply;
use crate::cli::{
    error::{CommandError, ErrorKind},
    output::{Format, NONE, Table, percent, print, print_json, print_yaml},
};

/// A query and its answer.
#[derive(Debug)]
pub(super) struct AnsweredQuestion {
    pub(super) name: Name,
    pub(super) kind: RecordType,
    pub(super) reply: Reply,
}

/// All queries to one server, and their answers.
#[derive(Debug)]
pub(super) struct ResolveReport {
    pub(super) server: SocketAddr,
    pub(super) asked: Vec<AnsweredQuestion>,
}

/// The report as JSON and YAML. Fields are added, never renamed.
#[derive(Debug, Serialize)]
pub(super) struct ResolveView {
    server: SocketAddr,
    questions: Vec<QuestionView>,
}

#[derive(Debug, Serialize)]
struct QuestionView {
    name: String,
    r#type: String,
    rcode: String,
    authoritative: bool,
    transport: &'static str,
    nsid: Option<String>,
    milliseconds: f64,
    answers: Vec<AnswerView>,
}

#[derive(Debug, Serialize)]
struct AnswerView {
    name: String,
    r#type: String,
    ttl: u32,
    data: String,
    #[serde(flatten, skip_serializing_if = "Option::is_none")]
    srv: Option<SrvView>,
}

#[derive(Debug, Serialize)]
struct SrvView {
    priority: u16,
    weight: u16,
    port: u16,
    target: String,
    /// From the additional section.
    addresses: Vec<IpAddr>,
    /// The part of clients that use this record (RFC 2782); 0 if another has a lower priority.
    share: f64,
}

impl ResolveReport {
    pub(super) fn print(&self, format: Option<Format>) -> Result<(), CommandError> {
        let view = self.view();
        match format {
            None | Some(Format::Wide) => print(&view.tables(format)),
            Some(Format::Json) => print_json(&view),
            Some(Format::Yaml) => print_yaml(&view),
            Some(Format::Name) => print(&view.names()),
        }
    }

    pub(super) fn view(&self) -> ResolveView {
        ResolveView { server: self.server, questions: self.asked.iter().map(question_view).collect() }
    }

    /// An error if no query found a record: the first failure, else "not found".
    pub(super) fn result(&self) -> Result<(), CommandError> {
        let server = self.server;
        for AnsweredQuestion { name, kind, reply } in &self.asked {
            let what = format!("{server} answered {} to {name} {kind}", rcode(reply.rcode()));
            let failure = CommandError::new(ErrorKind::Failed, what);
            match reply.rcode() {
                // Whether anything was found is decided over all questions: a service may have one family only.
                ResponseCode::NoError | ResponseCode::NXDomain => {}
                ResponseCode::ServFail => {
                    return Err(failure.hint("it may still be loading:  curl http://127.0.0.1:9153/readyz"));
                }
                ResponseCode::Refused if *kind == RecordType::PTR => {
                    return Err(failure
                        .hint("no ready instance has this address, and no reverse zone holds it; to serve one:")
                        .hint("gangplank serve --reverse-zone CIDR"));
                }
                ResponseCode::Refused => {
                    return Err(failure.hint("the name is outside the server's zone; name the zone:  --zone ZONE"));
                }
                _ => return Err(failure),
            }
        }
        if self.asked.iter().any(|asked| !asked.reply.message.answers.is_empty()) {
            return Ok(());
        }
        let Some(AnsweredQuestion { name, .. }) = self.asked.first() else { return Ok(()) };
        let what = if self.asked.iter().all(|asked| asked.reply.rcode() == ResponseCode::NXDomain) {
            format!("{name} does not exist, says {server}")
        } else {
            let kinds = self.asked.iter().map(|asked| asked.kind.to_string()).collect::<BTreeSet<_>>();
            format!("{name} has no {} record, says {server}", kinds.into_iter().collect::<Vec<_>>().join(" or "))
        };
        Err(CommandError::new(ErrorKind::NotFound, what).hint("what is registered, and ready:  gangplank ls -A"))
    }
}

fn question_view(asked: &AnsweredQuestion) -> QuestionView {
    let AnsweredQuestion { name, kind, reply } = asked;
    QuestionView {
        name: name.to_string(),
        r#type: kind.to_string(),
        rcode: rcode(reply.rcode()),
        authoritative: reply.message.metadata.authoritative,
        transport: if reply.tcp { "tcp" } else { "udp" },
        nsid: reply.nsid(),
        milliseconds: (reply.took.as_secs_f64() * 1e6).round() / 1e3,
        answers: reply.message.answers.iter().map(|record| answer_view(record, reply)).collect(),
    }
}

fn answer_view(record: &Record, reply: &Reply) -> AnswerView {
    AnswerView {
        name: record.name.to_string(),
        r#type: record.record_type().to_string(),
        ttl: record.ttl,
        data: record.data.to_string(),
        srv: srv_view(record, reply),
    }
}

fn srv_view(record: &Record, reply: &Reply) -> Option<SrvView> {
    let RData::SRV(srv) = &record.data else { return None };
    // hickory compares names without case (RFC 4343).
    let glue = reply.message.additionals.iter().filter(|glue| glue.name == srv.target);
    let addresses = glue.filter_map(|glue| glue.data.ip_addr()).collect();
    // RFC 2782: clients use the records of the lowest priority, in proportion to their weights.
    let all = reply.message.answers.iter();
    let all = all.filter_map(|record| if let RData::SRV(srv) = &record.data { Some(srv) } else { None });
    let first: Vec<_> = match all.clone().map(|srv| srv.priority).min() {
        Some(lowest) => all.filter(|srv| srv.priority == lowest).collect(),
        None => Vec::new(),
    };
    let sum: u64 = first.iter().map(|srv| u64::from(srv.weight)).sum();
    let share = match sum {
        _ if first.iter().all(|other| other.priority != srv.priority) => 0.0,
        0 => 1.0 / first.len() as f64,
        sum => f64::from(srv.weight) / sum as f64,
    };
    Some(SrvView {
        priority: srv.priority,
        weight: srv.weight,
        port: srv.port,
        target: srv.target.to_string(),
        addresses,
        share,
    })
}

impl ResolveView {
    /// Two tables: the records, and which server answered which query.
    pub(super) fn tables(&self, format: Option<Format>) -> String {
        let wide = format == Some(Format::Wide);
        let titles: &[&str] = if wide {
            &["TYPE", "TTL", "PRIORITY", "WEIGHT", "SHARE", "PORT", "ANSWER", "NAME", "TARGET"]
        } else {
            &["TYPE", "TTL", "SHARE", "PORT", "ANSWER"]
        };
        let mut answers = Table::new(titles, &["ANSWER"], format);
        for answer in self.questions.iter().flat_map(|question| &question.answers) {
            answers.row(answer.row(wide));
        }
        let mut questions =
            Table::new(&["QUESTION", "TYPE", "RCODE", "BY", "FROM", "MS"], &["QUESTION", "FROM"], format);
        for question in &self.questions {
            questions.row(vec![
                question.name.clone(),
                question.r#type.clone(),
                question.rcode.clone(),
                question.transport.to_owned(),
                question.nsid.clone().unwrap_or_else(|| self.server.to_string()),
                format!("{:.2}", question.milliseconds),
            ]);
        }
        let any = self.questions.iter().any(|question| !question.answers.is_empty());
        let answers = if any { answers.render() + "\n" } else { String::new() };
        answers + &questions.render()
    }

    /// The addresses and targets in the answers, each once, in the order of the answers.
    fn names(&self) -> String {
        let mut seen = BTreeSet::new();
        let answers = self.questions.iter().flat_map(|question| &question.answers);
        let shown = answers.map(|answer| match &answer.srv {
            Some(srv) => format!("{}:{}\n", srv.target, srv.port),
            None => format!("{}\n", answer.data),
        });
        shown.filter(|line| seen.insert(line.clone())).collect()
    }
}

impl AnswerView {
    fn row(&self, wide: bool) -> Vec<String> {
        let none = || NONE.to_owned();
        let srv = self.srv.as_ref();
        let answer = match srv {
            Some(srv) if srv.addresses.is_empty() => srv.target.clone(),
            Some(srv) => srv.addresses.iter().map(ToString::to_string).collect::<Vec<_>>().join(","),
            None => self.data.clone(),
        };
        let share = srv.map_or_else(none, |srv| percent(srv.share));
        let port = srv.map_or_else(none, |srv| srv.port.to_string());
        let mut row = vec![self.r#type.clone(), self.ttl.to_string()];
        if wide {
            row.push(srv.map_or_else(none, |srv| srv.priority.to_string()));
            row.push(srv.map_or_else(none, |srv| srv.weight.to_string()));
        }
        row.extend([share, port, answer]);
        if wide {
            row.push(self.name.clone());
            row.push(srv.map_or_else(none, |srv| srv.target.clone()));
        }
        row
    }
}

/// As `dig` writes it: `NOERROR`, `NXDOMAIN`, ….
fn rcode(code: ResponseCode) -> String {
    match code {
        ResponseCode::NoError => "NOERROR".into(),
        ResponseCode::FormErr => "FORMERR".into(),
        ResponseCode::ServFail => "SERVFAIL".into(),
        ResponseCode::NXDomain => "NXDOMAIN".into(),
        ResponseCode::NotImp => "NOTIMP".into(),
        ResponseCode::Refused => "REFUSED".into(),
        ResponseCode::BADVERS => "BADVERS".into(),
        other => format!("RCODE{}", u16::from(other)),
    }
}
