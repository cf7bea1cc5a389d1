//! Parsing of queries: the header, the one question and the OPT record, in one pass.
//!
//! Only the name is copied. Records that do not belong in a query are skipped.

use crate::zone::QName;

/// Octets of a header (RFC 1035 §4.1.1).
pub(super) const HEADER: usize = 12;

/// QR: this is a response.
pub(super) const QR: u8 = 0x80;
/// The opcode's bits in the third octet.
pub(super) const OPCODE: u8 = 0x78;
/// RD: recursion desired.
pub(super) const RD: u8 = 0x01;
/// CD, in the fourth octet: checking disabled (RFC 4035 §3.1.6).
pub(super) const CD: u8 = 0x10;

/// The type of OPT (RFC 6891 §6.1.1).
pub(super) const OPT: u16 = 41;
/// Option NSID (RFC 5001).
pub(super) const NSID: u16 = 3;
/// DO, in the flags of OPT (RFC 3225).
pub(super) const DO: u16 = 0x8000;

/// A well-formed query of one question.
#[derive(Debug, Clone)]
pub(super) struct Question {
    /// The name, in lower case.
    pub(super) name: QName,
    /// The type asked for.
    pub(super) qtype: u16,
    /// The class asked for.
    pub(super) qclass: u16,
    /// Where the question ends in the packet.
    pub(super) end: usize,
    /// The OPT record, if there is one.
    pub(super) edns: Option<Edns>,
}

/// The OPT record of a query (RFC 6891).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Edns {
    /// The UDP payload size of the sender, in octets.
    pub(super) size: u16,
    /// The version; only 0 exists.
    pub(super) version: u8,
    /// The flag DO.
    pub(super) dnssec_ok: bool,
    /// Whether the name server identifier is requested (RFC 5001).
    pub(super) nsid: bool,
}

/// The packet cannot be parsed: FORMERR.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Malformed;

/// A position in a packet.
struct PacketReader<'p> {
    packet: &'p [u8],
    at: usize,
}

impl Question {
    /// Parses a query whose header was checked already. Octets after the last record that the header
    /// counts are ignored.
    pub(super) fn parse(packet: &[u8]) -> Result<Self, Malformed> {
        // Behind id and flags, which the caller has looked at.
        let mut reader = PacketReader { packet, at: 4 };
        // RFC 9619 §4: a query has one question.
        if reader.u16()? != 1 {
            return Err(Malformed);
        }
        // A record takes 11 octets at least, so the length of the packet bounds the loops below, whatever these counts claim.
        let others = usize::from(reader.u16()?) + usize::from(reader.u16()?);
        let additional = reader.u16()?;
        let name = QName::parse(packet.get(HEADER..).ok_or(Malformed)?).map_err(|_| Malformed)?;
        reader.at = HEADER + name.wire_len();
        let (qtype, qclass) = (reader.u16()?, reader.u16()?);
        let end = reader.at;
        for _ in 0..others {
            reader.record()?;
        }
        let mut edns = None;
        for _ in 0..additional {
            if let Some(found) = reader.record()?
                && edns.replace(found).is_some()
            {
                // RFC 6891 §6.1.1: more than one OPT is a FORMERR.
                return Err(Malformed);
            }
        }
        Ok(Self { name, qtype, qclass, end, edns })
    }
}

impl PacketReader<'_> {
    fn take(&mut self, len: usize) -> Result<&[u8], Malformed> {
        let taken = self.packet.get(self.at..self.at + len).ok_or(Malformed)?;
        self.at += len;
        Ok(taken)
    }

    fn u16(&mut self) -> Result<u16, Malformed> {
        Ok(u16::from_be_bytes(self.take(2)?.try_into().map_err(|_| Malformed)?))
    }

    /// Skips a name; returns whether it was the root. Pointers are not followed.
    fn name(&mut self) -> Result<bool, Malformed> {
        let begin = self.at;
        loop {
            match self.take(1)?[0] {
                0 => return Ok(self.at == begin + 1),
                len @ 1..=63 => self.take(usize::from(len)).map(|_| ())?,
                // A pointer ends a name. Where it leads does not matter to who skips it, so no loop of pointers can be built.
                0xc0.. => return self.take(1).map(|_| false),
                _ => return Err(Malformed),
            }
            // RFC 1035 §2.3.4.
            if self.at - begin > 255 {
                return Err(Malformed);
            }
        }
    }

    /// Skips a record, or reads it if it is OPT.
    fn record(&mut self) -> Result<Option<Edns>, Malformed> {
        let root = self.name()?;
        let (rtype, class) = (self.u16()?, self.u16()?);
        let ttl = [self.u16()?, self.u16()?];
        let len = usize::from(self.u16()?);
        if rtype != OPT {
            return self.take(len).map(|_| None);
        }
        // RFC 6891 §6.1.2: the owner of OPT is the root.
        if !root {
            return Err(Malformed);
        }
        let mut options = PacketReader { packet: self.take(len)?, at: 0 };
        let mut nsid = false;
        while options.at < options.packet.len() {
            let (code, len) = (options.u16()?, usize::from(options.u16()?));
            options.take(len)?;
            nsid |= code == NSID;
        }
        let [_, version] = ttl[0].to_be_bytes();
        Ok(Some(Edns { size: class, version, dnssec_ok: ttl[1] & DO != 0, nsid }))
    }
}
