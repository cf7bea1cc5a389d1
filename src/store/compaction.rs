//! Compaction: the snapshot and the closed segments after it become one new snapshot.
//!
//! A snapshot has the number of a segment and holds the instances at the end of that segment, one
//! entry each, in the order of their keys, and then the term, if there is one. With the outbox each
//! entry has the generation since which it is unmirrored, and unmirrored removals have entries too;
//! without it a compaction drops all that.
//!
//! A merge streams the old snapshot and holds what the closed segments changed in a window of keys
//! ([`ClosedChanges`]), as many as fit [`MAX_WINDOW_BYTES`]; then it reads the segments again for the
//! next window. So its memory has a bound, whatever the segments hold, and costs reads instead: each
//! window reads all closed segments.
//!
//! It runs on a thread of its own, reads durable files only, and changes nothing that the journal
//! writes to: registrations never wait for it. When it fails, the old files stay, and only space is
//! lost.

use std::{
    io,
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
    DirectoryTerm, Record,
    disk::{Directory, File, TEMP_SUFFIX, write_atomically},
    format::{DecodeError, Entry, EntryKind, Payload, RecordDecoder},
    frame::{FileId, FileKind, Frame, FrameBuffer, HEADER_LEN, Header, StoreId},
    outbox::{ClosedChanges, Outbox},
    reader::{FrameReader, ScanItem, read_header},
};
use crate::{metrics::Metrics, model::UnixMillis, replicas::word::TombstoneLifetime};

/// Payload size in bytes at which a frame of a snapshot is finished.
const SNAPSHOT_FRAME_BYTES: usize = 256 << 10;

/// Bytes after which the new snapshot is synced, so that the sync of a batch never waits behind a
/// whole snapshot in the disk's queue.
const SYNC_INTERVAL: u64 = 8 << 20;

/// Most bytes of changes that a merge holds at once, counted as they are encoded, with their keys. In
/// memory they take about three times as much. A full segment of the default size needs a few windows
/// at most; only large stores, which compact several segments together, need more.
#[cfg(not(test))]
pub(super) const MAX_WINDOW_BYTES: usize = 64 << 20;

/// So small that every test of the store merges in many windows.
#[cfg(test)]
pub(super) const MAX_WINDOW_BYTES: usize = 256;

/// Ending of a corrupt file that was set aside.
pub(super) const CORRUPT_SUFFIX: &str = ".corrupt";

/// What all parts of an open store use.
#[derive(Debug, Clone)]
pub(super) struct StoreContext {
    pub(super) files: Arc<dyn Directory>,
    /// The directory's path, for messages only.
    pub(super) dir: PathBuf,
    pub(super) id: StoreId,
    /// Whether snapshots keep the outbox.
    pub(super) outbox: bool,
    /// Whether snapshots keep removals for the lifetime of tombstones.
    pub(super) tombstones: bool,
    pub(super) metrics: Arc<Metrics>,
}

/// A file that is not written to any more.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct ClosedFile {
    pub(super) number: u64,
    pub(super) len: u64,
}

/// The input of a compaction.
#[derive(Debug, Clone)]
pub(super) struct CompactionPlan {
    pub(super) snapshot: Option<ClosedFile>,
    /// In order; at least one.
    pub(super) segments: Vec<ClosedFile>,
    /// Leave out what is corrupt, instead of failing.
    pub(super) lossy: bool,
    /// Corrupt files without a second name, which are renamed afterwards instead of removed.
    pub(super) keep: Vec<FileId>,
}

impl CompactionPlan {
    /// The snapshot that it makes.
    pub(super) fn snapshot_id(&self) -> FileId {
        FileId::snapshot(self.segments.last().expect("a plan has a segment").number)
    }
}

/// Why a compaction made no snapshot.
#[derive(Debug, thiserror::Error)]
pub(super) enum CompactionError {
    /// Of the new snapshot, whose name the messages of the callers have.
    #[error(transparent)]
    Write(#[from] io::Error),
    #[error("cannot read {}: {err}", path.display())]
    Read { path: PathBuf, err: io::Error },
    #[error("{0}")]
    Corrupt(String),
    #[error("stopped")]
    Stopped,
}

/// A compaction on a thread of its own.
#[derive(Debug)]
pub(super) struct CompactionTask {
    thread: thread::JoinHandle<Option<ClosedFile>>,
    stop: Arc<AtomicBool>,
}

impl CompactionTask {
    pub(super) fn start(context: StoreContext, plan: CompactionPlan) -> io::Result<Self> {
        let stop = Arc::new(AtomicBool::new(false));
        let seen = Arc::clone(&stop);
        let thread = thread::Builder::new().name("compaction".into()).spawn(move || {
            let began = Instant::now();
            let result = compact(&context, &plan, &seen);
            let metrics = &context.metrics.store;
            match result {
                Ok(snapshot) => {
                    metrics.compaction_seconds.observe(began.elapsed().as_secs_f64());
                    metrics.compacted(true);
                    info!(snapshot = snapshot.number, bytes = snapshot.len, "journal compacted");
                    Some(snapshot)
                }
                Err(CompactionError::Stopped) => None,
                Err(err) => {
                    metrics.compacted(false);
                    warn!(
                        dir = %context.dir.display(), snapshot = plan.snapshot_id().number, %err,
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

    /// Asks it to stop early.
    pub(super) fn stop(&self) {
        // Nothing else is handed over by the flag: `finish` joins the thread before its result is used.
        self.stop.store(true, Ordering::Relaxed);
    }

    /// Waits for it and returns the new snapshot, if there is one.
    pub(super) fn finish(self, metrics: &Metrics) -> Option<ClosedFile> {
        self.thread.join().unwrap_or_else(|_| {
            metrics.store.compacted(false);
            warn!("the compaction of the journal panicked; it is tried again when the next segment is full");
            None
        })
    }
}

/// Writes the new snapshot, then removes the files that it replaces.
pub(super) fn compact(
    context: &StoreContext,
    plan: &CompactionPlan,
    stop: &AtomicBool,
) -> Result<ClosedFile, CompactionError> {
    let files = &*context.files;
    let file_id = plan.snapshot_id();
    let name = file_id.file_name();
    let mut len = 0;
    let published = write_atomically(files, &name, |file| {
        len = merge(context, plan, file_id, file, stop)?;
        Ok(())
    });
    if let Err(err) = published {
        // Best effort: the next start removes it.
        let _ = files.remove(&format!("{name}{TEMP_SUFFIX}"));
        return Err(err);
    }
    // The old files last: until the new name is durable they are all there is. What cannot be removed, or comes back
    // after a crash, is removed with the next snapshot or by the next start.
    if let Err(err) = remove_old(files, plan, file_id.number) {
        warn!(dir = %context.dir.display(), %err, "cannot remove files that a snapshot has replaced; they only take space");
    }
    context.metrics.store.snapshot_bytes.set(i64::try_from(len).unwrap_or(i64::MAX));
    Ok(ClosedFile { number: file_id.number, len })
}

fn remove_old(files: &dyn Directory, plan: &CompactionPlan, newest: u64) -> io::Result<()> {
    for name in files.list()? {
        match FileId::parse(&name) {
            Some(old) if !superseded(old, newest) => {}
            Some(old) if plan.keep.contains(&old) => files.rename(&name, &format!("{name}{CORRUPT_SUFFIX}"))?,
            Some(_) => files.remove(&name)?,
            None => {}
        }
    }
    Ok(())
}

/// Whether the snapshot `newest` replaces the file.
pub(super) fn superseded(file_id: FileId, newest: u64) -> bool {
    match file_id.kind {
        FileKind::Journal => file_id.number <= newest,
        FileKind::Snapshot => file_id.number < newest,
    }
}

/// Writes the snapshot into `file` and returns its length.
fn merge(
    context: &StoreContext,
    plan: &CompactionPlan,
    file_id: FileId,
    file: &mut dyn File,
    stop: &AtomicBool,
) -> Result<u64, CompactionError> {
    let window = |first| -> Result<(ClosedChanges, u64), CompactionError> {
        let mut source = MergeInput { context, lossy: plan.lossy, stop, generation: 0 };
        let mut changes = ClosedChanges::from_key(first, MAX_WINDOW_BYTES);
        for segment in &plan.segments {
            source.entries(FileId::journal(segment.number), segment.len, &mut |entry, generation| {
                changes.take(entry, generation);
                Ok(())
            })?;
        }
        Ok((changes, source.generation))
    };
    // The first window reads all segments before the snapshot is begun: its frames have the generation of what they hold, and
    // corruption is found before the disk is filled.
    let (mut changes, generation) = window(Vec::new())?;
    let mut term = changes.term;
    let mut source = MergeInput { context, lossy: plan.lossy, stop, generation };
    let mut writer = SnapshotWriter::begin(context, file_id, file, generation)?;
    if let Some(old) = plan.snapshot {
        let mut last = Vec::new();
        source.entries(FileId::snapshot(old.number), old.len, &mut |mut entry, generation| {
            let key = entry.key();
            // Both sides are merged in one pass in the order of keys. An entry out of order would be written twice, or
            // over a later one.
            if !last.is_empty() && key <= last {
                return Err(CompactionError::Corrupt(format!(
                    "{} is not in order",
                    FileId::snapshot(old.number).file_name()
                )));
            }
            if let EntryKind::Term(old) = entry.kind() {
                // A term in the segments is later than that of the snapshot before them.
                term.get_or_insert(old);
                return Ok(());
            }
            writer.generation = writer.generation.max(generation);
            // The key is in a later window. What is left of this one comes before the key.
            while let Some(end) = changes.end.take_if(|end| *end <= key) {
                writer.changes_before(&mut changes, None)?;
                (changes, _) = window(end)?;
            }
            writer.changes_before(&mut changes, Some(&key))?;
            // A changed instance is written with the changes, when a later key, or the end, follows.
            if !changes.entries.contains_key(&key) {
                changes.services.settle(&key, &mut entry, generation);
                writer.instance(entry)?;
            }
            last = key;
            Ok(())
        })?;
    }
    // The changes behind the last key of the old snapshot, which may fill more windows.
    loop {
        writer.changes_before(&mut changes, None)?;
        let Some(end) = changes.end.take() else { break };
        (changes, _) = window(end)?;
    }
    writer.term(term)?;
    writer.generation = source.generation;
    writer.end()
}

/// Reads the files of an open store, each with its length in bytes: passes the records of instances to `record`, and returns
/// the outbox. The error is that of a file.
pub(super) fn read_back(
    context: &StoreContext,
    files: &[(FileId, u64)],
    record: &mut dyn FnMut(Record),
) -> Result<Outbox, (FileId, io::Error)> {
    let mut outbox = Outbox::new(true);
    let mut decoder = RecordDecoder::default();
    let never = AtomicBool::new(false);
    let mut input = MergeInput { context, lossy: false, stop: &never, generation: 0 };
    for (file_id, len) in files {
        let read = input.entries(*file_id, *len, &mut |entry, generation| {
            let outbox_key = outbox.outbox_key(&entry, generation);
            let read = decoder.record(entry).map_err(|err| CompactionError::Corrupt(format!("{err:?}")))?;
            outbox.take(outbox_key, read).into_iter().for_each(&mut *record);
            Ok(())
        });
        read.map_err(|err| match err {
            CompactionError::Write(err) | CompactionError::Read { err, .. } => (*file_id, err),
            CompactionError::Corrupt(_) | CompactionError::Stopped => (*file_id, io::Error::other(err.to_string())),
        })?;
    }
    Ok(outbox)
}

/// Reads the files of a merge, or of another reader of an open store.
struct MergeInput<'m> {
    context: &'m StoreContext,
    lossy: bool,
    stop: &'m AtomicBool,
    /// The highest that was read.
    generation: u64,
}

impl MergeInput<'_> {
    /// Passes every entry of a file to `take`, with the generation of its frame.
    fn entries(
        &mut self,
        file_id: FileId,
        len: u64,
        take: &mut dyn FnMut(Entry, u64) -> Result<(), CompactionError>,
    ) -> Result<(), CompactionError> {
        let name = file_id.file_name();
        let corrupt = |what: &dyn std::fmt::Display| CompactionError::Corrupt(format!("{name}: {what}"));
        let failed = |err| CompactionError::Read { path: self.context.dir.join(&name), err };
        let file = match self.context.files.open(&name) {
            // A segment that is missing as a whole is among the losses that the operator has accepted.
            Err(err) if self.lossy && err.kind() == io::ErrorKind::NotFound => return Ok(()),
            file => file.map_err(failed)?,
        };
        let header = read_header(&*file, file_id).map_err(failed)?;
        let same_store = header.as_ref().is_ok_and(|header| header.id == self.context.id);
        // A closed file never changes. If this one did, somebody has replaced it, and the rest must not be removed on
        // its word.
        if !self.lossy && (!same_store || file.len().map_err(failed)? != len) {
            return Err(corrupt(&"is not the file that was there"));
        }
        if header.is_ok() && !same_store {
            return Ok(()); // a file of another store, which recovery has reported
        }
        let mut reader = RecordDecoder::default();
        let mut ended = false;
        let mut frames = FrameReader::new(&*file, file_id, len);
        while let Some(item) = frames.next().map_err(failed)? {
            if self.stop.load(Ordering::Relaxed) {
                return Err(CompactionError::Stopped);
            }
            let (at, frame, payload) = match item {
                ScanItem::Frame { at, frame, payload } => (at, frame, payload),
                ScanItem::Garbage(_) if self.lossy => continue,
                ScanItem::Garbage(at) => return Err(corrupt(&format_args!("bytes {at:?} cannot be read"))),
            };
            self.generation = self.generation.max(frame.generation);
            ended = frame.end;
            let payload = match Payload::read(payload) {
                Ok(payload) => payload,
                Err(DecodeError::Invalid(_)) if self.lossy => continue,
                Err(DecodeError::Invalid(err) | DecodeError::Newer(err)) => {
                    return Err(corrupt(&format_args!("the frame at {}: {err}", at.start)));
                }
            };
            for entry in payload.entries {
                // Recovery has validated every entry; only what it dropped as corrupt must be dropped
                // again.
                if !self.lossy || reader.record(entry.clone()).is_ok() {
                    take(entry, frame.generation)?;
                }
            }
        }
        // Every checksum of a snapshot that was cut off between two frames is right. Only the flag of its last frame
        // tells.
        if file_id.kind == FileKind::Snapshot && !ended && !self.lossy {
            return Err(corrupt(&"has no end"));
        }
        Ok(())
    }
}

/// Writes a snapshot.
struct SnapshotWriter<'m> {
    context: &'m StoreContext,
    file_id: FileId,
    file: &'m mut dyn File,
    frame: FrameBuffer,
    /// The highest generation that was read so far.
    generation: u64,
    /// Removals before this clock need not be remembered.
    expired_before: u64,
    /// The key of the service whose `RefuseBefore` came last, and its clock.
    refuse_before: (Vec<u8>, u64),
    at: u64,
    synced: u64,
}

impl<'m> SnapshotWriter<'m> {
    fn begin(context: &'m StoreContext, file_id: FileId, file: &'m mut dyn File, generation: u64) -> io::Result<Self> {
        file.write_at(0, &Header { id: context.id, file_id, previous_len: 0 }.encode())?;
        let now = UnixMillis::now().0.saturating_mul(1_000);
        // A directory that was never used with Kubernetes: nobody can bring back what was removed, so no removal is remembered.
        let expired_before = if context.tombstones { TombstoneLifetime::DEFAULT.expired_before(now) } else { u64::MAX };
        Ok(Self {
            context,
            file_id,
            file,
            frame: FrameBuffer::new(),
            generation,
            expired_before,
            refuse_before: (Vec::new(), 0),
            at: HEADER_LEN as u64,
            synced: 0,
        })
    }

    /// Writes the changes whose keys are before `key`, or all that are held.
    fn changes_before(&mut self, changes: &mut ClosedChanges, key: Option<&Vec<u8>>) -> io::Result<()> {
        while let Some(entry) = changes.pop_before(key) {
            self.instance(entry)?;
        }
        Ok(())
    }

    /// Writes an instance's entry, unless it is a removal that need not be kept. A `RefuseBefore` comes before the
    /// entries of its service, because of its key.
    fn instance(&mut self, mut entry: Entry) -> io::Result<()> {
        if let EntryKind::RefuseBefore { clock } = entry.kind() {
            if clock < self.expired_before {
                return Ok(());
            }
            self.refuse_before = (entry.key(), clock);
            return self.put(&entry);
        }
        if !self.context.outbox {
            entry.set_since(None);
        }
        // A removal is kept while Kubernetes may still have the instance, and while an old registration of it must be
        // refused. After that, no entry says the same.
        if entry.is_removal() && entry.since(0) == 0 && !self.is_remembered(&entry) {
            return Ok(());
        }
        self.put(&entry)
    }

    fn is_remembered(&self, removal: &Entry) -> bool {
        let clock = removal.removal_clock();
        let (service, refuse_before) = &self.refuse_before;
        // A put that old is refused although nothing is known of its removal.
        let is_dropped = || *refuse_before >= clock && removal.key().starts_with(service);
        clock > 0 && clock >= self.expired_before && !is_dropped()
    }

    fn term(&mut self, term: Option<DirectoryTerm>) -> io::Result<()> {
        let Some(term) = term else { return Ok(()) };
        let term = if self.context.outbox { term } else { DirectoryTerm::default() };
        self.put(&Entry::from(&Record::Term(term)))
    }

    fn put(&mut self, entry: &Entry) -> io::Result<()> {
        self.frame.push(entry);
        if self.frame.payload_len() >= SNAPSHOT_FRAME_BYTES {
            self.flush(false)?;
        }
        Ok(())
    }

    fn flush(&mut self, end: bool) -> io::Result<()> {
        let frame = Frame { more: false, end, unknown_flags: 0, generation: self.generation, synced: self.synced };
        let bytes = self.frame.finish(&frame, self.file_id, self.at);
        self.file.write_at(self.at, bytes)?;
        self.at += bytes.len() as u64;
        self.context.metrics.store.snapshot_written_bytes.inc_by(bytes.len() as u64);
        self.frame.clear();
        if self.at - self.synced >= SYNC_INTERVAL {
            self.file.sync()?;
            self.synced = self.at;
        }
        Ok(())
    }

    fn end(mut self) -> Result<u64, CompactionError> {
        // Also without entries: a snapshot whose last frame lacks the flag counts as cut off.
        self.flush(true)?;
        Ok(self.at)
    }
}
