//! A position in the change feed from which a watch resumes: 20 bytes, opaque to clients.

/// Bytes of an encoded cursor.
const ENCODED_BYTES: usize = 20;

/// [`Cursor::seen`] of a cursor after all changes of its generation.
const ALL: u32 = u32::MAX;

/// A position in the feed of one run of the server. A cursor of another run is invalid.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Cursor {
    epoch: u64,
    generation: u64,
    /// Number of changes of the generation before the position, counted before any filter.
    seen: u32,
}

impl Cursor {
    /// The position after all changes of `generation`.
    pub(super) fn after(epoch: u64, generation: u64) -> Self {
        Self { epoch, generation, seen: ALL }
    }

    /// The position after the first `seen` of the `of` changes of `generation`.
    pub(super) fn within(epoch: u64, generation: u64, seen: usize, of: usize) -> Self {
        let seen = if seen < of { u32::try_from(seen).unwrap_or(ALL) } else { ALL };
        Self { epoch, generation, seen }
    }

    /// The last generation that is wholly before the position, and the number of changes of the next one.
    pub(super) fn position(self) -> (u64, usize) {
        match self.seen {
            ALL => (self.generation, 0),
            // Not below 0: `decode` refuses generation 0.
            seen => (self.generation.saturating_sub(1), seen as usize),
        }
    }

    pub(super) fn encode(self) -> Vec<u8> {
        [&self.epoch.to_be_bytes()[..], &self.generation.to_be_bytes(), &self.seen.to_be_bytes()].concat()
    }

    /// Reads a cursor of the run `epoch`, whose last generation is `newest`. `None` if it is invalid.
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
        // A generation to come is no position of this run: a watch from there would skip what happens until then.
        (cursor.epoch == epoch && (1..=newest).contains(&cursor.generation)).then_some(cursor)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn cursor_is_valid_in_its_run_only() {
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
