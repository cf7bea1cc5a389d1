//! The name in a question: its labels in lower case, on the stack.

/// Most octets of a name in a message (RFC 1035 §2.3.4).
const MAX_NAME: usize = 255;

/// Most labels that fit 255 octets, without the root.
const MAX_LABELS: usize = 127;

/// Most octets of a label (RFC 1035 §2.3.4).
const MAX_LABEL: u8 = 63;

/// The octets are not a name as a question carries it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct InvalidName;

/// A name from a question, in wire form and lower case.
#[derive(Clone)]
pub(crate) struct QName {
    octets: [u8; MAX_NAME],
    len: usize,
    /// The offset of each label's length octet.
    starts: [u8; MAX_LABELS],
    labels: usize,
}

impl QName {
    /// Reads the name that `octets` begin with.
    ///
    /// # Errors
    /// When it does not end, is longer than 255 octets, or holds anything but plain labels. A
    /// compression pointer there could only point at the header or at the name itself (RFC 1035
    /// §4.1.4 wants a *prior* name), so that it is a fault too.
    pub(crate) fn parse(octets: &[u8]) -> Result<Self, InvalidName> {
        let mut name = Self { octets: [0; MAX_NAME], len: 0, starts: [0; MAX_LABELS], labels: 0 };
        let mut at = 0;
        loop {
            let len = *octets.get(at).ok_or(InvalidName)?;
            if len == 0 {
                break;
            }
            // 0xC0 is a pointer; 0x40 and 0x80 are reserved (RFC 1035 §4.1.4).
            if len > MAX_LABEL {
                return Err(InvalidName);
            }
            // 127 labels of one octet fill 254 octets; what is longer is refused before it counts.
            *name.starts.get_mut(name.labels).ok_or(InvalidName)? = u8::try_from(at).map_err(|_| InvalidName)?;
            name.labels += 1;
            at += 1 + usize::from(len);
        }
        name.len = at + 1;
        let copy = name.octets.get_mut(..name.len).ok_or(InvalidName)?;
        copy.copy_from_slice(octets.get(..name.len).ok_or(InvalidName)?);
        // RFC 4343: only A–Z have a case. Length octets are below 'A', so that the name is
        // lower-cased as a whole.
        copy.make_ascii_lowercase();
        Ok(name)
    }

    /// Octets in wire form, with the root: 1..=255.
    #[must_use]
    pub(crate) fn wire_len(&self) -> usize {
        self.len
    }

    /// How many labels, without the root.
    #[must_use]
    pub(crate) fn labels(&self) -> usize {
        self.labels
    }

    /// The label at `index`, counted from the left; empty beyond the last.
    #[must_use]
    pub(crate) fn label(&self, index: usize) -> &[u8] {
        let from = self.offset(index);
        let len = usize::from(self.octets[from]);
        self.octets.get(from + 1..from + 1 + len).unwrap_or_default()
    }

    /// Where the label at `index` begins, or the root for any index beyond the last.
    #[must_use]
    pub(crate) fn offset(&self, index: usize) -> usize {
        if index < self.labels { usize::from(self.starts[index]) } else { self.len - 1 }
    }

    /// The name from the label at `index` on, in wire form with the root.
    #[must_use]
    pub(crate) fn suffix(&self, index: usize) -> &[u8] {
        &self.octets[self.offset(index)..self.len]
    }
}

impl std::fmt::Display for QName {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        if self.labels == 0 {
            return f.write_str(".");
        }
        (0..self.labels).try_for_each(|index| write!(f, "{}.", self.label(index).escape_ascii()))
    }
}

impl std::fmt::Debug for QName {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "QName({self})")
    }
}

#[cfg(test)]
impl QName {
    /// The name that `text` spells, with or without a final dot; its labels may hold anything but
    /// a dot.
    ///
    /// # Errors
    /// When a label or the name is too long, or a label is empty.
    pub(crate) fn from_text(text: &str) -> Result<Self, InvalidName> {
        let mut wire = Vec::with_capacity(text.len() + 2);
        for label in text.strip_suffix('.').unwrap_or(text).split('.').filter(|_| !matches!(text, "" | ".")) {
            if label.is_empty() {
                return Err(InvalidName);
            }
            wire.push(u8::try_from(label.len()).map_err(|_| InvalidName)?);
            wire.extend_from_slice(label.as_bytes());
        }
        wire.push(0);
        Self::parse(&wire)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn labels_and_suffixes_are_lower_cased() {
        let name = QName::parse(b"\x03WeB\x04prod\0rest").expect("valid");
        assert_eq!((name.labels(), name.wire_len()), (2, 10));
        assert_eq!((name.label(0), name.label(1), name.label(2)), (&b"web"[..], &b"prod"[..], &b""[..]));
        assert_eq!(name.suffix(1), b"\x04prod\0");
        assert_eq!(name.suffix(2), b"\0");
        assert_eq!(name.to_string(), "web.prod.");
        assert_eq!(QName::from_text(".").expect("the root").labels(), 0);
    }

    #[test]
    fn rfc1035_2_3_4_limits_of_names_and_labels() {
        let mut longest = b"\x01a".repeat(127);
        longest.push(0);
        assert_eq!(QName::parse(&longest).expect("255 octets").labels(), 127);
        let mut longer = b"\x01a".repeat(126);
        longer.extend_from_slice(b"\x02aa\0");
        assert_eq!(QName::parse(&longer).expect_err("256 octets"), InvalidName);
        assert!(QName::parse(&b"\x01a".repeat(300)).is_err());
        for bad in [&b""[..], b"\x03ab", b"\x01a", b"\x40", b"\x80a", b"\xc0\x0c", b"\x01a\xc0\x0c"] {
            assert!(QName::parse(bad).is_err(), "{bad:?}");
        }
        assert!(QName::from_text("a..b").is_err());
    }
}
