//! The answers as a table, JSON or YAML, and the exit code they mean.

use std::{
    collections::BTreeSet,
    net::{IpAddr, SocketAddr},
    time::SystemTime,
};

use hickory_proto::{
    op::ResponseCode,
    rr::{Name, RData, Record, RecordType},
};
use serde::Serialize;

use super::{
    compare::{Difference, Found, compare, matched},
    query::{NETWORK_ERROR, QueryError, Reply},
};
use crate::{
    cli::{
        error::{CommandError, ErrorKind},
        names::names_table,
        output::{Format, NONE, Table, percent, print, print_json, print_yaml},
    },
    model::{DnsName, NameStatus, view::NameViews},
};

/// A query and its answer.
#[derive(Debug)]
pub(super) struct AnsweredQuestion {
    pub(super) name: Name,
    pub(super) kind: RecordType,
    pub(super) reply: Reply,
    /// What the server at `--via` answered.
    pub(super) via: Option<Result<Reply, QueryError>>,
}

/// All queries to one server, or to two, and their answers.
#[derive(Debug)]
pub(super) struct ResolveReport {
    pub(super) server: SocketAddr,
    pub(super) via: Option<SocketAddr>,
    pub(super) asked: Vec<AnsweredQuestion>,
    /// What the names lead to that are instances of the service, as the registry knows it.
    pub(super) names: Vec<(DnsName, NameStatus)>,
}

/// The report as JSON and YAML. Fields are added, never renamed.
#[derive(Debug, Serialize)]
pub(super) struct ResolveView<'a> {
    server: SocketAddr,
    #[serde(skip_serializing_if = "Option::is_none")]
    via: Option<SocketAddr>,
    questions: Vec<QuestionView>,
    #[serde(skip_serializing_if = "NameViews::is_empty")]
    names: NameViews<'a>,
}

#[derive(Debug, Serialize)]
struct QuestionView {
    name: String,
    r#type: String,
    #[serde(flatten)]
    reply: ReplyView,
    #[serde(skip_serializing_if = "Option::is_none")]
    via: Option<ViaView>,
}

/// What the server at `--via` answered, and in what that differs.
#[derive(Debug, Serialize)]
struct ViaView {
    #[serde(flatten)]
    reply: Option<ReplyView>,
    /// Why there is no answer.
    #[serde(skip_serializing_if = "Option::is_none")]
    error: Option<String>,
    differences: Vec<Difference>,
}

#[derive(Debug, Serialize)]
pub(super) struct ReplyView {
    pub(super) rcode: String,
    authoritative: bool,
    transport: &'static str,
    pub(super) nsid: Option<String>,
    milliseconds: f64,
    pub(super) answers: Vec<AnswerView>,
}

#[derive(Debug, Serialize)]
pub(super) struct AnswerView {
    pub(super) name: String,
    pub(super) r#type: String,
    pub(super) ttl: u32,
    pub(super) data: String,
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
            None | Some(Format::Wide) => {
                print(&view.tables(format))?;
                if self.names.is_empty() {
                    return Ok(());
                }
                print(&format!("\n{}", names_table(&self.names, format, SystemTime::now())))
            }
            Some(Format::Json) => print_json(&view),
            Some(Format::Yaml) => print_yaml(&view),
            Some(Format::Name) => print(&view.names()),
        }
    }

    pub(super) fn view(&self) -> ResolveView<'_> {
        let questions = self.asked.iter().map(question_view).collect();
        ResolveView { server: self.server, via: self.via, questions, names: NameViews(&self.names) }
    }

    /// An error if no query found a record, or if the two servers gave other records: the first failure, else
    /// "not found".
    pub(super) fn result(&self) -> Result<(), CommandError> {
        let server = self.server;
        for AnsweredQuestion { name, kind, reply, .. } in &self.asked {
            let what = format!("{server} answered {} to {name} {kind}", rcode(reply.rcode()));
            let failure = CommandError::new(ErrorKind::Failed, what);
            match reply.rcode() {
                // Whether anything was found is decided over all questions: a service may have one family only.
                ResponseCode::NoError | ResponseCode::NXDomain => {}
                ResponseCode::ServFail if reply.extended_error() == Some(NETWORK_ERROR) => {
                    return Err(failure
                        .hint("an instance is a DNS name, and the server could not look it up; why:")
                        .hint("gangplank ls SERVICE -n NAMESPACE"));
                }
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
        if let Some(failure) = self.via.and_then(|via| self.difference(via)) {
            return Err(failure);
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

    /// The first question that `via` did not answer, or answered with other records or another response code.
    fn difference(&self, via: SocketAddr) -> Option<CommandError> {
        for question in self.view().questions {
            let QuestionView { name, r#type, via: Some(answer), .. } = question else { continue };
            if let Some(err) = answer.error {
                let what = format!("no answer from {via} to {name} {}: {err}", r#type);
                return Some(
                    CommandError::new(ErrorKind::Failed, what)
                        .hint("CoreDNS answers SERVFAIL, or late, while it cannot reach what it forwards to"),
                );
            }
            let server = self.server;
            let what = match answer.differences.iter().find(|difference| difference.is_wrong())? {
                Difference::Rcode => "another response code",
                _ => "other records",
            };
            let what = format!("{via} gives {what} than {server} for {name} {}", r#type);
            return Some(
                CommandError::new(ErrorKind::Failed, what)
                    .hint("whether CoreDNS asks gangplank for this name:  gangplank coredns --help"),
            );
        }
        None
    }
}

fn question_view(asked: &AnsweredQuestion) -> QuestionView {
    let AnsweredQuestion { name, kind, reply, via } = asked;
    let direct = reply_view(reply);
    let via = via.as_ref().map(|via| match via {
        Ok(reply) => {
            let reply = reply_view(reply);
            ViaView { differences: compare(&direct, &reply), reply: Some(reply), error: None }
        }
        Err(err) => ViaView { differences: Vec::new(), reply: None, error: Some(err.to_string()) },
    });
    QuestionView { name: name.to_string(), r#type: kind.to_string(), reply: direct, via }
}

pub(super) fn reply_view(reply: &Reply) -> ReplyView {
    ReplyView {
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

impl ResolveView<'_> {
    /// Two tables: the records, and which server answered which query.
    pub(super) fn tables(&self, format: Option<Format>) -> String {
        let wide = format == Some(Format::Wide);
        let mut titles = vec!["TYPE", "TTL"];
        if self.via.is_some() {
            titles.extend(["VIA", "DIFFERS"]);
        }
        if wide {
            titles.extend(["PRIORITY", "WEIGHT"]);
        }
        titles.extend(["SHARE", "PORT", "ANSWER"]);
        if wide {
            titles.extend(["NAME", "TARGET"]);
        }
        let mut answers = Table::new(&titles, &["ANSWER"], format);
        let found: Vec<Found<'_>> = self.questions.iter().flat_map(QuestionView::found).collect();
        let mut aliases = BTreeSet::new();
        for found in &found {
            let row = self.answer_row(found, wide);
            // The answers for A and for AAAA begin with the same alias.
            if found.answer().r#type != "CNAME" || aliases.insert(row.clone()) {
                answers.row(row);
            }
        }
        let mut titles = vec!["QUESTION", "TYPE", "RCODE", "BY", "FROM", "MS"];
        if self.via.is_some() {
            titles.push("DIFFERS");
        }
        let mut questions = Table::new(&titles, &["QUESTION", "FROM"], format);
        for question in &self.questions {
            questions.row(self.question_row(question, &question.reply, self.server, &[]));
            let Some((via, answer)) = self.via.zip(question.via.as_ref()) else { continue };
            match &answer.reply {
                Some(reply) => questions.row(self.question_row(question, reply, via, &answer.differences)),
                None => {
                    let none = || NONE.to_owned();
                    let (name, kind) = (question.name.clone(), question.r#type.clone());
                    questions.row(vec![name, kind, none(), none(), via.to_string(), none(), "no answer".into()]);
                }
            }
        }
        let answers = if found.is_empty() { String::new() } else { answers.render() + "\n" };
        answers + &questions.render()
    }

    fn question_row(
        &self,
        question: &QuestionView,
        reply: &ReplyView,
        server: SocketAddr,
        differences: &[Difference],
    ) -> Vec<String> {
        let mut row = vec![
            question.name.clone(),
            question.r#type.clone(),
            reply.rcode.clone(),
            reply.transport.to_owned(),
            reply.nsid.clone().unwrap_or_else(|| server.to_string()),
            format!("{:.2}", reply.milliseconds),
        ];
        if self.via.is_some() {
            let shown = differences.iter().filter_map(|difference| difference.of_question());
            let shown = shown.collect::<Vec<_>>().join(",");
            row.push(if shown.is_empty() { NONE.to_owned() } else { shown });
        }
        row
    }

    fn answer_row(&self, found: &Found<'_>, wide: bool) -> Vec<String> {
        let none = || NONE.to_owned();
        let ttl = |answer: Option<&AnswerView>| answer.map_or_else(none, |answer| answer.ttl.to_string());
        let answer = found.answer();
        let srv = answer.srv.as_ref();
        let address = match srv {
            Some(srv) if srv.addresses.is_empty() => srv.target.clone(),
            Some(srv) => srv.addresses.iter().map(ToString::to_string).collect::<Vec<_>>().join(","),
            None => answer.data.clone(),
        };
        let mut row = vec![answer.r#type.clone()];
        if self.via.is_some() {
            row.extend([ttl(found.direct()), ttl(found.via()), found.differs().map_or_else(none, str::to_owned)]);
        } else {
            row.push(answer.ttl.to_string());
        }
        if wide {
            row.push(srv.map_or_else(none, |srv| srv.priority.to_string()));
            row.push(srv.map_or_else(none, |srv| srv.weight.to_string()));
        }
        row.extend([
            srv.map_or_else(none, |srv| percent(srv.share)),
            srv.map_or_else(none, |srv| srv.port.to_string()),
            address,
        ]);
        if wide {
            row.push(answer.name.clone());
            row.push(srv.map_or_else(none, |srv| srv.target.clone()));
        }
        row
    }

    /// The addresses and targets in the answers, each once, in the order of the answers.
    fn names(&self) -> String {
        let mut seen = BTreeSet::new();
        let answers = self.questions.iter().flat_map(QuestionView::found);
        let answers = answers.map(|found| found.answer());
        let shown = answers.map(|answer| match &answer.srv {
            Some(srv) => format!("{}:{}\n", srv.target, srv.port),
            None => format!("{}\n", answer.data),
        });
        shown.filter(|line| seen.insert(line.clone())).collect()
    }
}

impl QuestionView {
    /// Each record once, with who has it.
    fn found(&self) -> Vec<Found<'_>> {
        let via = self.via.as_ref().and_then(|via| via.reply.as_ref());
        match via {
            Some(via) => matched(&self.reply.answers, &via.answers),
            None => self.reply.answers.iter().map(Found::Direct).collect(),
        }
    }
}

/// As `dig` writes it: `NOERROR`, `NXDOMAIN`, ….
pub(in crate::cli) fn rcode(code: ResponseCode) -> String {
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
