//! Writing a message into a buffer of fixed size.
//!
//! A record is written entirely or not at all.

use std::net::{IpAddr, Ipv4Addr};

use crate::{
    model::{DashedLabel, DnsName, RecordType},
    zone::HostLabel,
};

/// Class IN.
const IN: u16 = 1;

/// Largest offset of a compression pointer: 14 bits (RFC 1035 §4.1.4).
const MAX_POINTER: usize = 0x3fff;

/// The record or field does not fit into the buffer (Knot: `KNOT_ESPACE`).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct NoSpace;

/// `Ok` if all octets were written.
pub(super) type WriteResult = Result<(), NoSpace>;

/// Writes a message into a buffer of fixed size.
#[derive(Debug)]
pub(super) struct WireWriter<'o> {
    out: &'o mut [u8],
    at: usize,
    /// The offset at which records must end.
    end: usize,
}

/// The owner of a record: a compression pointer if the offset is small enough, else the name.
#[derive(Debug, Clone, Copy)]
pub(super) struct OwnerName<'a> {
    /// Its offset in the message.
    pub(super) at: usize,
    /// Spelled out where no pointer reaches.
    pub(super) name: HostName<'a>,
}

/// The name of a host: its label before the name of its service.
#[derive(Debug, Clone, Copy)]
pub(super) struct HostName<'a> {
    /// The label; `None` for the name of the service itself.
    pub(super) target: Option<&'a HostLabel>,
    /// The service's name in wire form.
    pub(super) service: &'a [u8],
}

impl<'o> WireWriter<'o> {
    /// A writer of a message into `out`, whose last `reserved` octets are reserved for the OPT record.
    pub(super) fn new(out: &'o mut [u8], reserved: usize) -> Self {
        let end = out.len().saturating_sub(reserved);
        Self { out, at: 0, end }
    }

    /// Octets written: the offset of the next one.
    pub(super) fn len(&self) -> usize {
        self.at
    }

    /// Octets that may still be written.
    pub(super) fn room(&self) -> usize {
        self.end - self.at
    }

    /// Releases the reserved octets, for the OPT record.
    pub(super) fn release(&mut self) {
        self.end = self.out.len();
    }

    /// The octets written so far.
    pub(super) fn written(&mut self) -> &mut [u8] {
        &mut self.out[..self.at]
    }

    /// The two octets at `at`, as a number; 0 beyond what is written.
    pub(super) fn u16_at(&self, at: usize) -> u16 {
        self.out[..self.at].get(at..at + 2).map_or(0, |octets| u16::from_be_bytes([octets[0], octets[1]]))
    }

    pub(super) fn put(&mut self, octets: &[u8]) -> WriteResult {
        if octets.len() > self.room() {
            return Err(NoSpace);
        }
        let end = self.at + octets.len();
        self.out[self.at..end].copy_from_slice(octets);
        self.at = end;
        Ok(())
    }

    pub(super) fn u16(&mut self, number: u16) -> WriteResult {
        self.put(&number.to_be_bytes())
    }

    pub(super) fn u32(&mut self, number: u32) -> WriteResult {
        self.put(&number.to_be_bytes())
    }

    /// Runs `part`, and discards its octets if it fails.
    pub(super) fn whole<T>(&mut self, part: impl FnOnce(&mut Self) -> Result<T, NoSpace>) -> Result<T, NoSpace> {
        let mark = self.at;
        let written = part(self);
        if written.is_err() {
            self.at = mark;
        }
        written
    }

    /// One label, of at most 63 octets.
    pub(super) fn label(&mut self, label: &[u8]) -> WriteResult {
        self.put(&[u8::try_from(label.len()).map_err(|_| NoSpace)?])?;
        self.put(label)
    }

    /// A pointer to `at`, or `name` if a pointer cannot have that offset.
    pub(super) fn pointer_or(&mut self, at: usize, name: impl FnOnce(&mut Self) -> WriteResult) -> WriteResult {
        match u16::try_from(at) {
            // The two highest bits say that it is a pointer (RFC 1035 §4.1.4). Names beyond 16 KiB, over TCP, are spelled out.
            Ok(offset) if at <= MAX_POINTER => self.u16(0xc000 | offset),
            _ => name(self),
        }
    }

    /// The name of a host, without compression.
    pub(super) fn host(&mut self, host: HostName<'_>) -> WriteResult {
        match host.target {
            Some(HostLabel::Dashed(ip)) => self.dashed(*ip)?,
            Some(HostLabel::Registered(label)) => self.label(label.as_str().as_bytes())?,
            Some(HostLabel::External(name)) => return self.name(name),
            None => {}
        }
        self.put(host.service)
    }

    /// A whole name, without compression.
    pub(super) fn name(&mut self, name: &DnsName) -> WriteResult {
        name.labels().try_for_each(|label| self.label(label.as_bytes()))?;
        self.put(&[0])
    }

    /// The label of an address with dashes. IPv4 has its own encoder, because most SRV records have such a
    /// label and `core::fmt` would dominate their cost.
    pub(super) fn dashed(&mut self, ip: IpAddr) -> WriteResult {
        match ip {
            IpAddr::V4(ip) => {
                let (text, len) = dashed_v4(ip);
                self.label(&text[..len])
            }
            IpAddr::V6(_) => self.label(DashedLabel::new(ip).as_bytes()),
        }
    }

    /// A record whose RDATA is what `rdata` writes.
    pub(super) fn record(
        &mut self,
        owner: OwnerName<'_>,
        rtype: RecordType,
        ttl: u32,
        rdata: impl FnOnce(&mut Self) -> WriteResult,
    ) -> WriteResult {
        self.whole(|w| {
            w.pointer_or(owner.at, |w| w.host(owner.name))?;
            let [t0, t1] = rtype.number().to_be_bytes();
            let [c0, c1] = IN.to_be_bytes();
            let [s0, s1, s2, s3] = ttl.to_be_bytes();
            w.put(&[t0, t1, c0, c1, s0, s1, s2, s3, 0, 0])?;
            // RDLENGTH is 0 above and set after RDATA is written.
            let begin = w.at;
            rdata(w)?;
            let len = u16::try_from(w.at - begin).map_err(|_| NoSpace)?;
            w.out[begin - 2..begin].copy_from_slice(&len.to_be_bytes());
            Ok(())
        })
    }
}

/// `10-0-0-1`, and its length in octets.
fn dashed_v4(ip: Ipv4Addr) -> ([u8; 15], usize) {
    let (mut text, mut len) = ([b'-'; 15], 0);
    for (index, octet) in ip.octets().into_iter().enumerate() {
        len += usize::from(index > 0);
        // A digit is written from the power of ten on that it stands for, so without leading zeros; the last one always.
        for (from, digit) in [(100, octet / 100), (10, octet / 10 % 10), (0, octet % 10)] {
            if octet >= from {
                text[len] = b'0' + digit;
                len += 1;
            }
        }
    }
    (text, len)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn dashed_ipv4_labels_equal_those_of_the_model() {
        let edges = [0u8, 1, 9, 10, 11, 99, 100, 101, 109, 110, 199, 200, 255];
        for a in edges {
            for b in edges {
                let ip = Ipv4Addr::new(a, b, 255 - a, b / 2);
                let (text, len) = dashed_v4(ip);
                assert_eq!(&text[..len], DashedLabel::new(ip.into()).as_bytes());
            }
        }
    }

    #[test]
    fn record_that_does_not_fit_leaves_no_octets() {
        let mut out = [0; 30];
        let mut w = WireWriter::new(&mut out, 2);
        let owner = OwnerName { at: 12, name: HostName { target: None, service: b"\0" } };
        assert_eq!(w.record(owner, RecordType::A, 5, |w| w.put(&[1, 2, 3, 4])), Ok(()));
        assert_eq!((w.len(), w.room()), (16, 12));
        assert_eq!(w.record(owner, RecordType::A, 5, |w| w.put(&[1, 2, 3, 4])), Err(NoSpace));
        assert_eq!(w.len(), 16);
        w.release();
        assert_eq!((w.room(), w.put(&[0; 15])), (14, Err(NoSpace)));
        assert_eq!(w.u16_at(0), 0xc00c);
    }
}
