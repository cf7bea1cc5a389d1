//! Compaction: the last snapshot and the closed segments behind it become one new snapshot.
//!
//! A snapshot holds the instances that stood at the end of a segment, whose number it has, one
//! entry each, in the order of their keys, and behind them the term, if there is one. With the
//! outbox each entry says since when Kubernetes lacks it, and removals that Kubernetes lacks have
//! entries too; without it a compaction forgets all that. A merge streams the old snapshot and
//! holds only what the closed segments changed. It runs on a thread of its own, reads from the disk what
//! the journal has synced, and changes nothing that the journal writes to; registrations never
//! wait for it. When it fails, the old files stay and nothing is lost but space.

use std::{
    io,
    iter::Peekable,
    path::PathBuf,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    thread,
    time::Instant,
};

use tracing::{info, warn};

use super::{
    Record,
    files::{File, Files, STAGED, publish},
    format::{Entry, Payload, Reader, Subject, Unreadable},
    frame::{Frame, FrameBuffer, HEADER_LEN, Header, Kind, Place, StoreId},
    outbox::Changes,
    walk::{Piece, Walk, read_header},
};
use crate::metrics::Metrics;

/// A frame of a snapshot is closed when its payload has this many octets.
const FRAME_OCTETS: usize = 256 << 10;

/// The new file is synced each time it has grown by this much, so that a registration's sync
/// never stands behind a whole snapshot in the disk's queue.
const SYNC_EVERY: u64 = 8 << 20;

/// What the name of a damaged file ends in once the store goes on without it.
pub(super) const DAMAGED: &str = ".damaged";

/// What the parts of one open store share.
#[derive(Debug, Clone)]
pub(super) struct Shared {
    pub(super) files: Arc<dyn Files>,
    /// The directory, for messages only.
    pub(super) dir: PathBuf,
    pub(super) id: StoreId,
    /// Whether snapshots keep the outbox.
    pub(super) outbox: bool,
    pub(super) metrics: Arc<Metrics>,
}

/// A file that is no longer written to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Closed {
    pub(super) number: u64,
    pub(super) len: u64,
}

/// What a compaction merges.
#[derive(Debug, Clone)]
pub(super) struct Plan {
    pub(super) snapshot: Option<Closed>,
    /// In order; at least one.
    pub(super) segments: Vec<Closed>,
    /// Leave out what cannot be read, instead of giving up.
    pub(super) lossy: bool,
    /// Files that are not removed afterwards but kept under another name, for whoever wants to
    /// look at what is wrong with them.
    pub(super) keep: Vec<Place>,
}

/// Why a compaction ended without a new snapshot.
#[derive(Debug, thiserror::Error)]
pub(super) enum MergeError {
    #[error(transparent)]
    Io(#[from] io::Error),
    #[error("{0}")]
    Damaged(String),
    #[error("stopped")]
    Stopped,
}

/// A compaction on its thread.
#[derive(Debug)]
pub(super) struct Running {
    thread: thread::JoinHandle<Option<Closed>>,
    stop: Arc<AtomicBool>,
}

impl Running {
    /// Starts to merge.
    pub(super) fn start(shared: Shared, plan: Plan) -> io::Result<Self> {
        let stop = Arc::new(AtomicBool::new(false));
        let seen = Arc::clone(&stop);
        let thread = thread::Builder::new().name("compaction".into()).spawn(move || {
            let began = Instant::now();
            let result = compact(&shared, &plan, &seen);
            let metrics = &shared.metrics.store;
            match result {
                Ok(snapshot) => {
                    metrics.compaction_seconds.observe(began.elapsed().as_secs_f64());
                    metrics.compacted(true);
                    info!(snapshot = snapshot.number, octets = snapshot.len, "journal compacted");
                    Some(snapshot)
                }
                Err(MergeError::Stopped) => None,
                Err(err) => {
                    metrics.compacted(false);
                    warn!(
                        dir = %shared.dir.display(), %err,
                        "the journal was not compacted; nothing is lost, it is tried again when the next segment is full"
                    );
                    None
                }
            }
        })?;
        Ok(Self { thread, stop })
    }

    /// Whether [`finish`](Self::finish) would not wait.
    pub(super) fn is_finished(&self) -> bool {
        self.thread.is_finished()
    }

    /// Asks it to give up.
    pub(super) fn stop(&self) {
        self.stop.store(true, Ordering::Relaxed);
    }

    /// Waits for it and gives the new snapshot, if there is one.
    pub(super) fn finish(self, metrics: &Metrics) -> Option<Closed> {
        self.thread.join().unwrap_or_else(|_| {
            metrics.store.compacted(false);
            warn!("the compaction of the journal panicked; it is tried again when the next segment is full");
            None
        })
    }
}

/// Merges as planned, puts the new snapshot in place and takes away what it replaces.
pub(super) fn compact(shared: &Shared, plan: &Plan, stop: &AtomicBool) -> Result<Closed, MergeError> {
    let files = &*shared.files;
    let place = Place::snapshot(plan.segments.last().expect("a plan has a segment").number);
    let name = place.name();
    let mut len = 0;
    let published = publish(files, &name, |file| {
        len = merge(shared, plan, place, file, stop)?;
        Ok(())
    });
    if let Err(err) = published {
        // Best effort: what stays is removed at the next start.
        let _ = files.remove(&format!("{name}{STAGED}"));
        return Err(err);
    }
    // 4. Only now, with the new name on the disk, the old may go. What stays, or comes back after
    //    a crash, goes with the next snapshot or at the next start.
    if let Err(err) = remove_old(files, plan, place.number) {
        warn!(dir = %shared.dir.display(), %err, "cannot remove what a snapshot has replaced; it costs only space");
    }
    shared.metrics.store.snapshot_bytes.set(i64::try_from(len).unwrap_or(i64::MAX));
    Ok(Closed { number: place.number, len })
}

fn remove_old(files: &dyn Files, plan: &Plan, newest: u64) -> io::Result<()> {
    for name in files.list()? {
        match Place::of(&name) {
            Some(old) if !superseded(old, newest) => {}
            Some(old) if plan.keep.contains(&old) => files.rename(&name, &format!("{name}{DAMAGED}"))?,
            Some(_) => files.remove(&name)?,
            None => {}
        }
    }
    Ok(())
}

/// Whether the snapshot `newest` makes a file needless.
pub(super) fn superseded(place: Place, newest: u64) -> bool {
    match place.kind {
        Kind::Journal => place.number <= newest,
        Kind::Snapshot => place.number < newest,
    }
}

/// Writes the merge into `file` and gives its length.
fn merge(
    shared: &Shared,
    plan: &Plan,
    place: Place,
    file: &mut dyn File,
    stop: &AtomicBool,
) -> Result<u64, MergeError> {
    let mut source = Source { shared, lossy: plan.lossy, stop, generation: 0 };
    let mut changes = Changes::default();
    for segment in &plan.segments {
        source.entries(Place::journal(segment.number), segment.len, &mut |entry, generation| {
            changes.take(entry, generation);
            Ok(())
        })?;
    }
    let Changes { entries, services, mut term } = changes;
    let mut changes = entries.into_iter().peekable();
    let mut writer = Writer::begin(shared, place, file, source.generation)?;
    if let Some(old) = plan.snapshot {
        let mut last = Vec::new();
        source.entries(Place::snapshot(old.number), old.len, &mut |mut entry, generation| {
            let key = entry.key();
            if !last.is_empty() && key <= last {
                return Err(MergeError::Damaged(format!("{} is not in order", Place::snapshot(old.number).name())));
            }
            if let Subject::Term { term: old } = entry.subject() {
                term.get_or_insert(old);
                return Ok(());
            }
            writer.generation = writer.generation.max(generation);
            writer.changes_before(&mut changes, Some(&key))?;
            if changes.peek().is_none_or(|(changed, _)| *changed != key) {
                services.settle(&key, &mut entry, generation);
                writer.instance(entry)?;
            }
            last = key;
            Ok(())
        })?;
    }
    writer.changes_before(&mut changes, None)?;
    writer.term(term.unwrap_or(0))?;
    writer.generation = source.generation;
    writer.end()
}

/// Reads the files that are merged.
struct Source<'m> {
    shared: &'m Shared,
    lossy: bool,
    stop: &'m AtomicBool,
    /// The highest met.
    generation: u64,
}

impl Source<'_> {
    /// Gives every entry of a file to `take`, with the generation of its frame.
    fn entries(
        &mut self,
        place: Place,
        len: u64,
        take: &mut dyn FnMut(Entry, u64) -> Result<(), MergeError>,
    ) -> Result<(), MergeError> {
        let name = place.name();
        let damaged = |what: &dyn std::fmt::Display| MergeError::Damaged(format!("{name}: {what}"));
        let file = match self.shared.files.open(&name) {
            Err(err) if self.lossy && err.kind() == io::ErrorKind::NotFound => return Ok(()),
            file => file?,
        };
        let header = read_header(&*file, place)?;
        let ours = header.as_ref().is_ok_and(|header| header.id == self.shared.id);
        if !self.lossy && (!ours || file.len()? != len) {
            return Err(damaged(&"is not the file that was there"));
        }
        if header.is_ok() && !ours {
            return Ok(()); // of another store: reported, and left out as a whole
        }
        let mut reader = Reader::default();
        let mut ended = false;
        let mut walk = Walk::new(&*file, place, len);
        while let Some(piece) = walk.next()? {
            if self.stop.load(Ordering::Relaxed) {
                return Err(MergeError::Stopped);
            }
            let (at, frame, payload) = match piece {
                Piece::Frame { at, frame, payload } => (at, frame, payload),
                Piece::Bad(_) if self.lossy => continue,
                Piece::Bad(at) => return Err(damaged(&format_args!("octets {at:?} cannot be read"))),
            };
            self.generation = self.generation.max(frame.generation);
            ended = frame.end;
            let payload = match Payload::read(payload) {
                Ok(payload) => payload,
                Err(Unreadable::Invalid(_)) if self.lossy => continue,
                Err(Unreadable::Invalid(err) | Unreadable::Newer(err)) => {
                    return Err(damaged(&format_args!("the frame at {}: {err}", at.start)));
                }
            };
            for entry in payload.entries {
                // Recovery has taken every entry through the door; only what it left out as lost
                // must be left out again.
                if !self.lossy || reader.record(entry.clone()).is_ok() {
                    take(entry, frame.generation)?;
                }
            }
        }
        if place.kind == Kind::Snapshot && !ended && !self.lossy {
            return Err(damaged(&"has no end"));
        }
        Ok(())
    }
}

/// Writes a snapshot.
struct Writer<'m> {
    shared: &'m Shared,
    place: Place,
    file: &'m mut dyn File,
    frame: FrameBuffer,
    /// The highest generation of what is merged, as far as it is known.
    generation: u64,
    at: u64,
    synced: u64,
}

impl<'m> Writer<'m> {
    fn begin(shared: &'m Shared, place: Place, file: &'m mut dyn File, generation: u64) -> io::Result<Self> {
        file.write_at(0, &Header { id: shared.id, place, previous_len: 0 }.encode())?;
        Ok(Self { shared, place, file, frame: FrameBuffer::new(), generation, at: HEADER_LEN as u64, synced: 0 })
    }

    /// Writes the changes whose keys stand before `key`.
    fn changes_before(
        &mut self,
        changes: &mut Peekable<impl Iterator<Item = (Vec<u8>, Entry)>>,
        key: Option<&Vec<u8>>,
    ) -> io::Result<()> {
        while let Some((_, entry)) = changes.next_if(|(changed, _)| key.is_none_or(|key| changed < key)) {
            self.instance(entry)?;
        }
        Ok(())
    }

    /// Writes what is to be remembered of an instance, whose entry says since when it is lacking.
    fn instance(&mut self, mut entry: Entry) -> io::Result<()> {
        if !self.shared.outbox {
            entry.set_since(None);
        }
        if entry.removes() && entry.since(0) == 0 {
            return Ok(());
        }
        self.put(&entry)
    }

    fn term(&mut self, term: u64) -> io::Result<()> {
        if !self.shared.outbox || term == 0 {
            return Ok(());
        }
        self.put(&Entry::from(&Record::Term { term }))
    }

    fn put(&mut self, entry: &Entry) -> io::Result<()> {
        self.frame.push(entry);
        if self.frame.payload_len() >= FRAME_OCTETS {
            self.flush(false)?;
        }
        Ok(())
    }

    fn flush(&mut self, end: bool) -> io::Result<()> {
        let frame = Frame { more: false, end, unknown_flags: 0, generation: self.generation, synced: self.synced };
        let bytes = self.frame.seal(&frame, self.place, self.at);
        self.file.write_at(self.at, bytes)?;
        self.at += bytes.len() as u64;
        self.shared.metrics.store.snapshot_written_bytes.inc_by(bytes.len() as u64);
        self.frame.clear();
        if self.at - self.synced >= SYNC_EVERY {
            self.file.sync()?;
            self.synced = self.at;
        }
        Ok(())
    }

    fn end(mut self) -> Result<u64, MergeError> {
        self.flush(true)?;
        Ok(self.at)
    }
}
