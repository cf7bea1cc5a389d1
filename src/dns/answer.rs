//! The responder: packet in, packet out.
//!
//! The function takes no lock, allocates nothing and does not panic on any packet. A packet gets one
//! answer or none; a response never gets one, because two servers that answer each other's
//! answers would never stop.

use super::{
    question::{CD, DO, Edns, HEADER, NSID, OPCODE, OPT, QR, Question, RD},
    render::{ResponseRenderer, SectionCounts},
    wire::{WireWriter, WriteResult},
};
use crate::{
    model::{Rcode, RecordType, Resolution},
    zone::{Apex, Hit, Lookup, ZoneReader},
};

/// Largest answer over UDP without EDNS, in octets (RFC 1035 §2.3.4).
const MIN_UDP: u16 = 512;

/// Largest answer over UDP, in octets, 512..=4096. 1232 fits every path that carries IPv6 without
/// fragments (DNS flag day 2020); a longer answer gets TC, and the client asks again over TCP.
pub const MAX_UDP: u16 = 1232;

/// Largest answer over TCP, in octets (RFC 1035 §4.2.2).
pub const MAX_TCP: usize = 65_535;

/// Class IN, and any class, which is taken as IN.
const CLASSES: [u16; 2] = [1, 255];

/// AA: the answer is authoritative.
const AA: u8 = 0x04;
/// TC: not everything that had to be there fits.
const TC: u8 = 0x02;

/// Octets of an OPT record without options.
const OPT_FIXED: usize = 11;

/// Option "extended DNS error" (RFC 8914).
const EXTENDED_ERROR: u16 = 15;
/// "Not Ready" (RFC 8914 §4.15).
const NOT_READY: u16 = 14;
/// "Network Error" (RFC 8914 §4.24): no upstream server answers for a name that is an instance.
const NETWORK_ERROR: u16 = 23;
/// Octets of that option.
const EXTENDED_ERROR_LEN: usize = 6;

/// The transport of a packet.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Transport {
    /// An answer has at most the octets that the client accepts, and at most 1232.
    Udp,
    /// An answer has at most 65 535 octets.
    Tcp,
}

/// The inputs of an answer beside zone and packet.
#[derive(Debug, Clone, Copy)]
pub struct Context<'c> {
    /// The transport of the packet.
    pub transport: Transport,
    /// The name server identifier (RFC 5001).
    pub nsid: &'c [u8],
}

/// An answer that was written.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct AnswerSummary {
    /// Its octets.
    pub len: usize,
    /// Its response code.
    pub rcode: Rcode,
    /// The queried type; `None` if no question was read, or its type has no name.
    pub rtype: Option<RecordType>,
    /// Whether the queried name is in the zone.
    pub in_zone: bool,
}

/// Writes the answer to `packet` into `out`; `None` if the packet gets no answer. Over UDP `out` should have
/// [`MAX_UDP`] octets, over TCP [`MAX_TCP`]; a smaller `out` truncates the answer.
pub fn answer(
    zone: &ZoneReader<'_>,
    context: &Context<'_>,
    rng: &mut fastrand::Rng,
    packet: &[u8],
    out: &mut [u8],
) -> Option<AnswerSummary> {
    // Without a whole header there is no id for an answer.
    if packet.len() < HEADER || packet[2] & QR != 0 || out.len() < HEADER {
        return None;
    }
    // NOTIFY and UPDATE, too: nobody changes this zone by DNS. The question is not read, because its format may differ.
    if packet[2] & OPCODE != 0 {
        return Some(header_only(packet, Rcode::NotImp, out));
    }
    let Ok(question) = Question::parse(packet) else {
        return Some(header_only(packet, Rcode::FormErr, out));
    };
    let limit = match (context.transport, &question.edns) {
        (Transport::Tcp, _) => MAX_TCP,
        // RFC 6891 §6.2.3: less than 512 means 512.
        (Transport::Udp, Some(edns)) => edns.size.clamp(MIN_UDP, MAX_UDP).into(),
        (Transport::Udp, None) => MIN_UDP.into(),
    };
    let limit = limit.min(out.len());
    Query { zone, context, packet, question: &question }.write(rng, &mut out[..limit])
}

/// RFC 1035 §4.1.1: the answer to a packet whose question was not read is a header alone.
fn header_only(packet: &[u8], rcode: Rcode, out: &mut [u8]) -> AnswerSummary {
    out[..HEADER].copy_from_slice(&header(packet, rcode, false, SectionCounts::default(), 0));
    AnswerSummary { len: HEADER, rcode, rtype: None, in_zone: false }
}

/// The header of the answer to `packet`: RD and CD are copied, RA, Z and AD are clear (RFC 6840
/// §5.7, §5.9).
fn header(packet: &[u8], rcode: Rcode, questions: bool, sections: SectionCounts, extra: u16) -> [u8; HEADER] {
    let authoritative = matches!(rcode, Rcode::NoError | Rcode::NxDomain);
    let mut flags = QR | packet[2] & (OPCODE | RD);
    flags |= if authoritative { AA } else { 0 } | if sections.truncated { TC } else { 0 };
    let [_, low] = rcode.number().to_be_bytes();
    let [an0, an1] = sections.answers.to_be_bytes();
    let [ns0, ns1] = sections.authority.to_be_bytes();
    let [ar0, ar1] = (sections.additional + extra).to_be_bytes();
    let code = packet[3] & CD | low & 0x0f;
    [packet[0], packet[1], flags, code, 0, u8::from(questions), an0, an1, ns0, ns1, ar0, ar1]
}

/// One well-formed query that is being answered.
struct Query<'m, 'z> {
    zone: &'m ZoneReader<'z>,
    context: &'m Context<'m>,
    packet: &'m [u8],
    question: &'m Question,
}

/// The content of an answer: the result of the lookup in terms of a message.
enum AnswerContent<'z> {
    /// Records, NOERROR.
    Records(Hit<'z>),
    /// No records but the SOA: NOERROR or NXDOMAIN.
    Negative(Rcode, Apex),
    /// An error, without records, and what the extended error says of it.
    Error(Rcode, Option<u16>),
}

impl AnswerContent<'_> {
    fn rcode(&self) -> Rcode {
        match self {
            // RFC 6604 §2: the code says how the last name of the chain was found.
            Self::Records(Hit::Cname(alias, asked))
                if *alias.resolution == Resolution::NxDomain
                    && !matches!(asked, Some(RecordType::Cname | RecordType::Any)) =>
            {
                Rcode::NxDomain
            }
            Self::Records(_) => Rcode::NoError,
            Self::Negative(rcode, _) | Self::Error(rcode, _) => *rcode,
        }
    }

    fn extended_error(&self) -> Option<u16> {
        if let Self::Error(_, error) = self { *error } else { None }
    }
}

impl<'m> Query<'m, '_> {
    fn write(&self, rng: &mut fastrand::Rng, out: &mut [u8]) -> Option<AnswerSummary> {
        let Question { name, qtype, end, edns, .. } = self.question;
        let content = self.content();
        let rcode = content.rcode();
        let opt = edns.map(|edns| OptRecord {
            dnssec_ok: edns.dnssec_ok,
            nsid: self.nsid(&edns, out.len()),
            rcode,
            error: content.extended_error(),
        });
        // OPT has its room reserved: RFC 6891 §6.1.1 wants it in every answer to a query with one, also in a truncated one.
        let mut w = WireWriter::new(out, opt.as_ref().map_or(0, OptRecord::len));
        // The header comes last, when the counts are known. The question is copied octet by octet: resolvers that vary its case
        // against forged answers compare it.
        w.put(&[0; HEADER]).and_then(|()| w.put(&self.packet[HEADER..*end])).ok()?;
        let mut renderer = ResponseRenderer { w, zone: self.zone, name, rng, sections: SectionCounts::default() };
        match &content {
            AnswerContent::Records(hit) => renderer.hit(hit),
            AnswerContent::Negative(_, apex) => renderer.negative(*apex),
            AnswerContent::Error(..) => {}
        }
        let ResponseRenderer { mut w, sections, .. } = renderer;
        w.release();
        if let Some(opt) = &opt {
            opt.write(&mut w).ok()?;
        }
        let header = header(self.packet, rcode, true, sections, opt.is_some().into());
        w.written()[..HEADER].copy_from_slice(&header);
        Some(AnswerSummary {
            len: w.len(),
            rcode,
            rtype: RecordType::from_number(*qtype),
            in_zone: self.zone.contains(name),
        })
    }

    fn content(&self) -> AnswerContent<'m> {
        let Question { name, qtype, qclass, edns, .. } = self.question;
        let rtype = RecordType::from_number(*qtype);
        // Zone transfers are not supported.
        let transfer = matches!(rtype, Some(RecordType::Axfr | RecordType::Ixfr));
        // Before anything else: what a later version means by the rest of its query is not known.
        if edns.is_some_and(|edns| edns.version > 0) {
            // RFC 6891 §6.1.3: the only version is 0.
            return AnswerContent::Error(Rcode::BadVers, None);
        }
        if transfer || !CLASSES.contains(qclass) {
            return AnswerContent::Error(Rcode::Refused, None);
        }
        match self.zone.lookup(name, rtype) {
            Lookup::Hit(hit) => AnswerContent::Records(hit),
            Lookup::NoData(apex) => AnswerContent::Negative(Rcode::NoError, apex),
            Lookup::NxDomain(apex) => AnswerContent::Negative(Rcode::NxDomain, apex),
            // This server does not recurse, so it knows nothing of other zones.
            Lookup::OutOfZone => AnswerContent::Error(Rcode::Refused, None),
            // A resolver tries again after SERVFAIL. NXDOMAIN would be cached, for services that are about to be back.
            Lookup::NotReady => AnswerContent::Error(Rcode::ServFail, Some(NOT_READY)),
            Lookup::Unavailable => AnswerContent::Error(Rcode::ServFail, Some(NETWORK_ERROR)),
        }
    }

    /// The identifier, if it was requested. Left out if the identifier and the question would fill more than
    /// half of a small packet, because the records need the room.
    fn nsid(&self, edns: &Edns, room: usize) -> Option<&[u8]> {
        let needs = self.question.end + OPT_FIXED + 4 + self.context.nsid.len();
        (edns.nsid && needs <= room / 2).then_some(self.context.nsid)
    }
}

/// The OPT record of an answer (RFC 6891 §6.1).
struct OptRecord<'m> {
    dnssec_ok: bool,
    nsid: Option<&'m [u8]>,
    rcode: Rcode,
    /// A code of RFC 8914.
    error: Option<u16>,
}

impl OptRecord<'_> {
    fn len(&self) -> usize {
        let error = if self.error.is_some() { EXTENDED_ERROR_LEN } else { 0 };
        OPT_FIXED + self.nsid.map_or(0, |nsid| 4 + nsid.len()) + error
    }

    fn write(&self, w: &mut WireWriter<'_>) -> WriteResult {
        let [upper, _] = (self.rcode.number() << 4).to_be_bytes();
        w.put(&[0])?;
        w.u16(OPT)?;
        w.u16(MAX_UDP)?;
        // Upper part of the rcode, version 0; of the flags DO is copied (RFC 3225 §3).
        w.put(&[upper, 0])?;
        w.u16(if self.dnssec_ok { DO } else { 0 })?;
        w.u16(u16::try_from(self.len() - OPT_FIXED).unwrap_or(0))?;
        if let Some(nsid) = self.nsid {
            w.u16(NSID)?;
            w.u16(u16::try_from(nsid.len()).unwrap_or(0))?;
            w.put(nsid)?;
        }
        if let Some(error) = self.error {
            w.u16(EXTENDED_ERROR)?;
            w.u16(2)?;
            w.u16(error)?;
        }
        Ok(())
    }
}
