//! Where a watch can go on: 20 bytes that mean nothing to anyone else.

/// Bytes of an encoded cursor.
const ENCODED_BYTES: usize = 20;

/// All changes of a generation, in [`Cursor::seen`].
const ALL: u32 = u32::MAX;

/// A place in the feed of one run of the server. Generations of another run compare to nothing.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Cursor {
    epoch: u64,
    generation: u64,
    /// So many changes of the generation were seen, counted before any filter.
    seen: u32,
}

impl Cursor {
    /// Behind everything of `generation`.
    pub(super) fn after(epoch: u64, generation: u64) -> Self {
        Self { epoch, generation, seen: ALL }
    }

    /// Behind the first `seen` of the `of` changes of `generation`.
    pub(super) fn within(epoch: u64, generation: u64, seen: usize, of: usize) -> Self {
        let seen = if seen < of { u32::try_from(seen).unwrap_or(ALL) } else { ALL };
        Self { epoch, generation, seen }
    }

    /// The generation up to which everything was seen, and how many changes of the next one.
    pub(super) fn position(self) -> (u64, usize) {
        match self.seen {
            ALL => (self.generation, 0),
            // decode() lets no generation 0 pass.
            seen => (self.generation.saturating_sub(1), seen as usize),
        }
    }

    pub(super) fn encode(self) -> Vec<u8> {
        [&self.epoch.to_be_bytes()[..], &self.generation.to_be_bytes(), &self.seen.to_be_bytes()].concat()
    }

    /// Reads a cursor of the run `epoch`, which has come to `newest`. `None` for any other.
    pub(super) fn decode(bytes: &[u8], epoch: u64, newest: u64) -> Option<Self> {
        let bytes: &[u8; ENCODED_BYTES] = bytes.try_into().ok()?;
        let (run, rest) = bytes.split_first_chunk()?;
        let (generation, rest) = rest.split_first_chunk()?;
        let (seen, _) = rest.split_first_chunk()?;
        let cursor = Self {
            epoch: u64::from_be_bytes(*run),
            generation: u64::from_be_bytes(*generation),
            seen: u32::from_be_bytes(*seen),
        };
        (cursor.epoch == epoch && (1..=newest).contains(&cursor.generation)).then_some(cursor)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_cursor_reads_back_in_its_run_and_in_no_other() {
        let whole = Cursor::after(7, 100);
        let part = Cursor::within(7, 100, 3, 9);
        for cursor in [whole, part] {
            let bytes = cursor.encode();
            assert_eq!(Cursor::decode(&bytes, 7, 100), Some(cursor));
            assert_eq!(Cursor::decode(&bytes, 8, 100), None, "another run");
            assert_eq!(Cursor::decode(&bytes, 7, 99), None, "in the future");
            assert_eq!(Cursor::decode(&bytes[1..], 7, 100), None, "too short");
            assert_eq!(Cursor::decode(&[&bytes[..], &[0]].concat(), 7, 100), None, "too long");
        }
        assert_eq!(whole.position(), (100, 0));
        assert_eq!(part.position(), (99, 3));
        assert_eq!(Cursor::within(7, 100, 9, 9), whole);
        assert_eq!(Cursor::decode(&Cursor::after(7, 0).encode(), 7, 100), None);
    }
}
