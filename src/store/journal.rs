//! The open journal: appends batches as frames to the active segment.
//!
//! - All batches but the last are durable. Each frame has the offset up to which the file was durable.
//! - After a failed write or sync the journal writes nothing more. The system may have dropped
//!   the dirty pages and report the next sync as a success, so only a restart, which reads the
//!   file and writes the last batch again, can continue.
//! - A *sync marker* is a frame without records. Its `synced` offset is its own: everything before it
//!   is durable. One is written when a journal is opened and one when it is closed.

use std::{io, sync::Arc, time::Instant};

use tracing::warn;

use super::{
    DirectoryTerm, Record, StoreError,
    clean_stop::{CLEAN_STOP, CleanStop},
    compaction::{ClosedFile, CompactionPlan, CompactionTask, StoreContext, read_back},
    disk::{File, is_out_of_descriptors, write_atomically},
    error::IoContext,
    format::Entry,
    frame::{FileId, Frame, FrameBuffer, HEADER_LEN, Header},
    reader::read_exact,
};

/// Payload size in bytes at which a frame is finished, far below what a reader accepts.
const JOURNAL_FRAME_BYTES: usize = 1 << 20;

/// The open journal. Dropping it closes it.
#[derive(Debug)]
pub struct Journal {
    context: StoreContext,
    segment: Segment,
    /// Closed segments that are in no snapshot yet, in order.
    closed: Vec<ClosedFile>,
    snapshot: Option<ClosedFile>,
    compaction: Option<CompactionTask>,
    segment_bytes: u64,
    pub(super) frame_bytes: usize,
    frame: FrameBuffer,
    generation: u64,
    /// The next segment could not be created for want of a descriptor, and that was logged.
    rotation_delayed: bool,
    /// The first failure. It is final.
    failed: Option<StoreError>,
}

/// The active segment.
#[derive(Debug)]
pub(super) struct Segment {
    file_id: FileId,
    file: Box<dyn File>,
    /// Its length in bytes. All of it is durable, except within [`Journal::append`].
    end: u64,
}

/// A failed operation and the system's error.
struct WriteError(&'static str, io::Error);

impl Segment {
    /// Creates the segment that follows one of `previous_len` bytes.
    pub(super) fn create(context: &StoreContext, number: u64, previous_len: u64) -> io::Result<Self> {
        let file_id = FileId::journal(number);
        let header = Header { id: context.id, file_id, previous_len };
        let file = write_atomically(&*context.files, &file_id.file_name(), |file| file.write_at(0, &header.encode()))?;
        Ok(Self { file_id, file, end: HEADER_LEN as u64 })
    }

    /// Opens an existing segment, whose first `keep` bytes are valid and first `synced` bytes durable.
    pub(super) fn resume(file_id: FileId, mut file: Box<dyn File>, synced: u64, keep: u64) -> (Self, io::Result<()>) {
        let done = Self::repair(&mut *file, synced, keep);
        (Self { file_id, file, end: keep }, done)
    }

    /// An existing segment that cannot be written.
    pub(super) fn unwritable(file_id: FileId, file: Box<dyn File>, end: u64) -> Self {
        Self { file_id, file, end }
    }

    fn repair(file: &mut dyn File, synced: u64, keep: u64) -> io::Result<()> {
        // 1. Cut the torn write off.
        if file.len()? > keep {
            file.truncate(keep)?;
        }
        // 2. Write the last batch again, unchanged. If its sync had failed, its pages may be clean
        //    in the page cache but not on the disk, and a sync alone would not write them.
        let mut chunk = Vec::new();
        let mut at = synced;
        while at < keep {
            chunk.resize(usize::try_from((keep - at).min(1 << 20)).expect("at most 1 MiB"), 0);
            read_exact(file, at, &mut chunk)?;
            file.write_at(at, &chunk)?;
            at += chunk.len() as u64;
        }
        // 3. Everything that was read is durable from here on. Only now may a sync marker say so.
        file.sync()
    }
}

/// The files and the generation that a start has found.
#[derive(Debug)]
pub(super) struct LiveFiles {
    pub(super) closed: Vec<ClosedFile>,
    pub(super) snapshot: Option<ClosedFile>,
    pub(super) generation: u64,
}

impl Journal {
    pub(super) fn open(context: StoreContext, segment: Segment, found: LiveFiles, segment_bytes: u64) -> Self {
        let LiveFiles { closed, snapshot, generation } = found;
        let metrics = &context.metrics.store;
        metrics.failed.set(0);
        metrics.snapshot_bytes.set(snapshot.map_or(0, |snapshot| gauge(snapshot.len)));
        let mut journal = Self {
            context,
            segment,
            closed,
            snapshot,
            compaction: None,
            segment_bytes,
            frame_bytes: JOURNAL_FRAME_BYTES,
            frame: FrameBuffer::new(),
            generation,
            rotation_delayed: false,
            failed: None,
        };
        journal.update_size_metrics();
        journal
    }

    /// Appends one batch, which is durable when this returns. A full segment is closed first, which
    /// may start a compaction in the background; no call waits for it.
    ///
    /// A batch without records makes its generation durable, and a [`Record::Mirrored`] the one it names.
    ///
    /// # Errors
    /// After the first error every later call fails too: only a restart can tell what reached the
    /// disk.
    pub fn append(&mut self, generation: u64, records: &[Record]) -> Result<(), StoreError> {
        self.append_as(generation, records, |record| Entry::from(record))
    }

    /// As [`Journal::append`], for records that Kubernetes has already: they do not come into the
    /// outbox, and earlier records of their instances leave it.
    ///
    /// # Errors
    /// As [`Journal::append`].
    pub fn append_mirrored(&mut self, generation: u64, records: &[Record]) -> Result<(), StoreError> {
        self.append_as(generation, records, |record| {
            let mut entry = Entry::from(record);
            entry.set_since(Some(0));
            entry
        })
    }

    fn append_as(
        &mut self,
        generation: u64,
        records: &[Record],
        entry: fn(&Record) -> Entry,
    ) -> Result<(), StoreError> {
        self.usable()?;
        if self.segment.end >= self.segment_bytes {
            // Once it is closed, nobody looks for it until a start.
            self.check_in_place()?;
            match self.create_next_segment() {
                Ok(()) => {
                    self.rotation_delayed = false;
                    self.compact();
                }
                // Nothing was written, so nothing is in doubt. A want of descriptors must not stop
                // registrations: the segment grows, and the next batch tries again.
                Err((_, err)) if is_out_of_descriptors(&err) => {
                    if !std::mem::replace(&mut self.rotation_delayed, true) {
                        warn!(%err, "cannot create the next journal segment; this one grows until that succeeds");
                    }
                }
                Err((file_id, err)) => return Err(self.fail("create", file_id, err)),
            }
        }
        let named = records.iter().filter_map(|record| match record {
            Record::Mirrored { generation, .. } => Some(*generation),
            _ => None,
        });
        // What Kubernetes has may be a later generation than this batch: the stored one must not be behind it after a start.
        self.generation = named.fold(self.generation.max(generation), u64::max);
        // The order matters: a file that is removed during the sync took the batch with it, so the check comes after the write.
        self.write(records, entry)
            .map_err(|WriteError(operation, err)| self.fail(operation, self.segment.file_id, err))?;
        self.check_in_place()?;
        self.update_size_metrics();
        Ok(())
    }

    /// Whether a batch can be appended: not after a failed append, nor after a start that could read
    /// the store but not write to it.
    ///
    /// # Errors
    /// The first failure.
    pub fn usable(&self) -> Result<(), StoreError> {
        self.failed.clone().map_or(Ok(()), Err)
    }

    /// Whether everything that was appended is still in the data directory. A sync succeeds even for
    /// a file that was removed. Costs three stats.
    ///
    /// # Errors
    /// [`StoreError::Removed`], or the first failure. It is final, as in [`append`](Self::append).
    pub fn check_in_place(&mut self) -> Result<(), StoreError> {
        self.usable()?;
        let Segment { file_id, file, .. } = &self.segment;
        let file_id = *file_id;
        let found = file.identity().and_then(|file| self.context.files.find_missing(&file_id.file_name(), file));
        match found.map_err(|err| self.fail("find", file_id, err))? {
            None => Ok(()),
            Some(path) => Err(self.stop(StoreError::Removed { path })),
        }
    }

    fn write(&mut self, records: &[Record], entry: fn(&Record) -> Entry) -> Result<(), WriteError> {
        let synced = self.segment.end;
        let mut at = synced;
        // 1. The bytes, after everything that is durable.
        self.frame.clear();
        for record in records {
            if self.frame.payload_len() >= self.frame_bytes {
                at = self.write_frame(at, synced, true)?;
            }
            self.frame.push(&entry(record));
        }
        at = self.write_frame(at, synced, false)?;
        // 2. The sync. If it fails, the bytes may or may not be on the disk.
        let began = Instant::now();
        self.segment.file.sync().map_err(|err| WriteError("sync", err))?;
        self.context.metrics.store.sync_seconds.observe(began.elapsed().as_secs_f64());
        // 3. Only now are they durable.
        self.segment.end = at;
        Ok(())
    }

    fn write_frame(&mut self, at: u64, synced: u64, more: bool) -> Result<u64, WriteError> {
        let frame = Frame { more, end: false, unknown_flags: 0, generation: self.generation, synced };
        let bytes = self.frame.finish(&frame, self.segment.file_id, at);
        self.segment.file.write_at(at, bytes).map_err(|err| WriteError("write", err))?;
        let written = bytes.len() as u64;
        self.context.metrics.store.journal_written_bytes.inc_by(written);
        self.frame.clear();
        Ok(at + written)
    }

    /// Notes that the start could not repair the active segment.
    pub(super) fn fail_repair(&mut self, err: io::Error) -> StoreError {
        self.fail("repair", self.segment.file_id, err)
    }

    /// Writes a sync marker: corruption before it is not taken for a torn write any more.
    pub(super) fn append_sync_marker(&mut self) -> Result<(), StoreError> {
        self.usable()?;
        self.write(&[], |record| Entry::from(record))
            .map_err(|WriteError(operation, err)| self.fail(operation, self.segment.file_id, err))
    }

    fn record_clean_stop(&mut self) -> Result<(), StoreError> {
        // If another directory is at the path now, it must not get this store's clean-stop file.
        self.check_in_place()?;
        let Segment { file_id, end, .. } = self.segment;
        let stop = CleanStop { id: self.context.id, segment: file_id.number, len: end, generation: self.generation };
        stop.write(&*self.context.files).io_context("write", self.context.dir.join(CLEAN_STOP))
    }

    /// Closes the segment and creates the next one, whose header has the closed one's length.
    pub(super) fn rotate(&mut self) -> Result<(), StoreError> {
        self.usable()?;
        self.create_next_segment().map_err(|(file_id, err)| self.fail("create", file_id, err))
    }

    /// The error names the segment that could not be created.
    fn create_next_segment(&mut self) -> Result<(), (FileId, io::Error)> {
        let Segment { file_id, end, .. } = self.segment;
        let next = file_id.number + 1;
        // All of the closed segment is durable, so the next header may say how long it is. The journal
        // changes to the next one only when its name is durable: until then a start would not find it.
        self.segment = Segment::create(&self.context, next, end).map_err(|err| (FileId::journal(next), err))?;
        self.closed.push(ClosedFile { number: file_id.number, len: end });
        Ok(())
    }

    /// Starts a compaction if none runs and there is enough to compact. Never waits.
    pub(super) fn compact(&mut self) {
        if self.compaction.as_ref().is_some_and(|running| !running.is_finished()) {
            return;
        }
        self.reap();
        // Bounds the write amplification of snapshots at three, and what a start reads at 1.5 times
        // the snapshot and one segment.
        let closed: u64 = self.closed.iter().map(|segment| segment.len).sum();
        if closed == 0 || closed < self.snapshot.map_or(0, |snapshot| snapshot.len) / 2 {
            return;
        }
        let plan =
            CompactionPlan { snapshot: self.snapshot, segments: self.closed.clone(), lossy: false, keep: Vec::new() };
        match CompactionTask::start(self.context.clone(), plan) {
            Ok(running) => self.compaction = Some(running),
            Err(err) => warn!(%err, "cannot start the thread of the compaction; tried again at the next segment"),
        }
    }

    /// Reads the files again, as a start would; a second for a million instances. Passes every record of an instance to
    /// `record`, later ones after earlier ones, and returns the term and the outbox. Stops a compaction that runs. After a
    /// failed append: what was durable before it.
    ///
    /// # Errors
    /// When a file cannot be read, or is not what was written. It is final, as in [`append`](Self::append).
    pub fn read_back(&mut self, record: &mut dyn FnMut(Record)) -> Result<(DirectoryTerm, Vec<Record>), StoreError> {
        // It would remove the files that are read next.
        if let Some(running) = &self.compaction {
            running.stop();
        }
        self.reap();
        let Segment { file_id, end, .. } = self.segment;
        let closed = self.closed.iter().map(|segment| (FileId::journal(segment.number), segment.len));
        let snapshot = self.snapshot.iter().map(|snapshot| (FileId::snapshot(snapshot.number), snapshot.len));
        let files: Vec<(FileId, u64)> = snapshot.chain(closed).chain([(file_id, end)]).collect();
        let outbox =
            read_back(&self.context, &files, record).map_err(|(file_id, err)| self.fail("read", file_id, err))?;
        Ok((outbox.term.unwrap_or_default(), outbox.into_records()))
    }

    /// Waits for the compaction, if there is one, and applies its result.
    pub(super) fn reap(&mut self) {
        let finished = self.compaction.take().and_then(|running| running.finish(&self.context.metrics));
        if let Some(snapshot) = finished {
            self.install_snapshot(snapshot);
        }
    }

    /// Replaces the closed segments that the snapshot contains.
    pub(super) fn install_snapshot(&mut self, snapshot: ClosedFile) {
        self.closed.retain(|segment| segment.number > snapshot.number);
        self.snapshot = Some(snapshot);
        self.update_size_metrics();
    }

    /// The input of a compaction of all closed segments.
    pub(super) fn compaction_input(&self) -> (Option<ClosedFile>, Vec<ClosedFile>) {
        (self.snapshot, self.closed.clone())
    }

    /// Stops the journal and returns the error.
    fn fail(&mut self, operation: &'static str, file_id: FileId, err: io::Error) -> StoreError {
        let path = self.context.dir.join(file_id.file_name());
        self.stop(StoreError::JournalFailed { operation, path, source: Arc::new(err) })
    }

    fn stop(&mut self, err: StoreError) -> StoreError {
        self.context.metrics.store.failed.set(1);
        self.failed = Some(err.clone());
        err
    }

    fn update_size_metrics(&mut self) {
        let closed: u64 = self.closed.iter().map(|segment| segment.len).sum();
        self.context.metrics.store.journal_bytes.set(gauge(closed + self.segment.end));
    }
}

/// A clean stop: joins the compaction, writes a sync marker after the last batch, and records the length.
impl Drop for Journal {
    fn drop(&mut self) {
        if let Some(running) = &self.compaction {
            running.stop();
        }
        self.reap();
        if self.failed.is_none()
            && let Err(err) = self.append_sync_marker().and_then(|()| self.record_clean_stop())
        {
            warn!(%err, "the journal was not closed cleanly; no acknowledged record is lost");
        }
    }
}

fn gauge(bytes: u64) -> i64 {
    i64::try_from(bytes).unwrap_or(i64::MAX)
}
