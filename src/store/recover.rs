//! Recovery: reads the directory at the start, checks it, and opens the journal.
//!
//! Every file is scanned before any record is used, so that a refusal names everything that is
//! wrong at once. Then the records are replayed, the active segment is repaired, and obsolete files
//! are removed.
//!
//! # Torn write or corruption
//!
//! Bytes that are no valid frame are a *torn write* if nothing shows that they were ever durable:
//! they are in the active segment, and no later frame has a `synced` offset past them. After a
//! crash only a batch that was not acknowledged looks like this, because pages may reach the disk
//! in any order. A torn write is cut off from the beginning of its batch, and reported.
//!
//! Everything else is *corruption*: acknowledged records are lost, and the start is refused until
//! somebody accepts the loss. Then everything that can be read is merged into a new snapshot, and
//! the corrupt files are set aside.

use std::{fs, ops::Range, path::PathBuf, sync::Arc, sync::atomic::AtomicBool};

use tracing::warn;

use super::{
    Corruption, Journal, Options, Record, RecoveryProgress, RecoveryReport, StoreError,
    compaction::{CORRUPT_SUFFIX, ClosedFile, CompactionPlan, StoreContext, compact, superseded},
    disk::{Directory, File, TEMP_SUFFIX},
    error::IoContext,
    format::{DecodeError, Payload, RecordDecoder},
    frame::{FileId, FileKind, HEADER_LEN, Header, HeaderError, StoreId},
    journal::{LiveFiles, Segment},
    outbox::Outbox,
    reader::{FrameReader, ScanItem, read_header},
};
use crate::metrics::Metrics;

/// Bytes between two progress reports.
const PROGRESS_INTERVAL: u64 = 4 << 20;

/// What a recovery works with.
pub(super) struct StoreOpener<'o> {
    pub(super) files: Arc<dyn Directory>,
    pub(super) dir: PathBuf,
    pub(super) lock: Option<fs::File>,
    pub(super) options: &'o Options,
    pub(super) metrics: Arc<Metrics>,
}

/// The files of the directory: live ones, and obsolete ones, which a snapshot has replaced.
#[derive(Debug, Default)]
struct FileSet {
    snapshot: Option<u64>,
    /// Later than the snapshot, in order.
    segments: Vec<u64>,
    obsolete: Vec<String>,
}

impl FileSet {
    fn of(names: Vec<String>) -> Self {
        let mut set = Self::default();
        let ids: Vec<FileId> = names.iter().filter_map(|name| FileId::parse(name)).collect();
        set.snapshot =
            ids.iter().filter(|file_id| file_id.kind == FileKind::Snapshot).map(|file_id| file_id.number).max();
        let obsolete = |file_id: FileId| set.snapshot.is_some_and(|newest| superseded(file_id, newest));
        let segments = ids.iter().filter(|file_id| file_id.kind == FileKind::Journal && !obsolete(**file_id));
        set.segments = segments.map(|file_id| file_id.number).collect();
        set.segments.sort_unstable();
        set.obsolete = names
            .into_iter()
            .filter(|name| match name.strip_suffix(TEMP_SUFFIX) {
                Some(stem) => FileId::parse(stem).is_some(),
                None => FileId::parse(name).is_some_and(obsolete),
            })
            .collect();
        set
    }
}

/// Bytes of a file that are no frame, with the generations of the frames around them.
#[derive(Debug)]
struct CorruptRange {
    bytes: Range<u64>,
    after: Option<u64>,
    before: Option<u64>,
}

impl CorruptRange {
    fn loss(&self) -> String {
        match (self.after, self.before) {
            (Some(after), Some(before)) => format!("what changed after generation {after} and before {before}"),
            (Some(after), None) => format!("what changed after generation {after}"),
            (None, Some(before)) => format!("what changed before generation {before}"),
            (None, None) => "everything in the file".into(),
        }
    }
}

/// The result of scanning one file.
#[derive(Debug)]
struct FileScan {
    file_id: FileId,
    file: Box<dyn File>,
    len: u64,
    header: Result<Header, HeaderError>,
    corrupt: Vec<CorruptRange>,
    /// The file was durable up to this offset at some time.
    synced: u64,
    /// End of the last whole batch before any corrupt range.
    last_batch_end: u64,
    /// End of the last valid frame.
    last_frame_end: u64,
    /// The last frame of a snapshot is there.
    complete: bool,
    /// Records are replayed up to this offset; 0 for none.
    replay_end: u64,
}

impl FileScan {
    /// Whether the file is intact up to its durable offset.
    fn has_torn_tail(&self) -> bool {
        self.corrupt.first().map_or(self.last_batch_end, |range| range.bytes.start) >= self.synced
    }
}

impl StoreOpener<'_> {
    /// See [`DataDir::recover`](super::DataDir::recover).
    pub(super) fn run(
        mut self,
        record: &mut dyn FnMut(Record),
        progress: &mut dyn FnMut(RecoveryProgress),
    ) -> Result<(Journal, RecoveryReport), StoreError> {
        let set = FileSet::of(self.files.list().io_context("list", &self.dir)?);
        let mut repairs = Vec::new();
        let mut corruptions = missing_segments(&set, &self.dir);
        let mut scans = Vec::new();
        let ids = set.snapshot.map(FileId::snapshot).into_iter();
        for file_id in ids.chain(set.segments.iter().map(|number| FileId::journal(*number))) {
            scans.push(self.scan(file_id)?);
        }
        let id = scans.iter().find_map(|scan| Some(scan.header.as_ref().ok()?.id));
        let id = id.unwrap_or_else(StoreId::random);
        self.classify(&mut scans, id, &mut corruptions, &mut repairs);
        self.refuse(&corruptions)?;

        let mut outbox = Outbox::new(self.options.outbox);
        let generation = self.read(&scans, id, &mut corruptions, &mut outbox, record, progress)?;
        for corruption in &corruptions {
            repairs.push(format!("loss accepted: {corruption}"));
        }
        let context = StoreContext {
            files: Arc::clone(&self.files),
            dir: self.dir.clone(),
            id,
            outbox: self.options.outbox,
            metrics: Arc::clone(&self.metrics),
        };
        let mut journal = self.journal(&context, scans, set.snapshot, generation, &mut repairs)?;
        let drops_outbox = !self.options.outbox && outbox.term > 0;
        if drops_outbox && let Err(err) = journal.append(generation, &[Record::Term { term: 0 }]) {
            // The stored term still vouches for the outbox, so no snapshot may drop it: none is made.
            warn!(dir = %self.dir.display(), %err, "cannot reset the term under which Kubernetes was written to");
        }
        if !corruptions.is_empty() {
            quarantine(&context, &mut journal, &corruptions)?;
        }
        self.remove_obsolete(&set.obsolete);
        if !drops_outbox || journal.usable().is_ok() {
            journal.compact();
        }
        let term = if drops_outbox { 0 } else { outbox.term };
        Ok((journal, RecoveryReport { generation, repairs, term, outbox: outbox.into_records() }))
    }

    /// Reads a file once to check its frames, not its records.
    fn scan(&self, file_id: FileId) -> Result<FileScan, StoreError> {
        let path = self.dir.join(file_id.file_name());
        let file = self.files.open(&file_id.file_name()).io_context("open", &path)?;
        let len = file.len().io_context("read", &path)?;
        let header = read_header(&*file, file_id).io_context("read", &path)?;
        if let Err(HeaderError::Newer(version)) = header {
            return Err(StoreError::Newer { path, what: format!("format version {version}") });
        }
        let start = HEADER_LEN as u64;
        let (mut corrupt, mut synced, mut last_batch_end, mut last_frame_end, mut complete) =
            (Vec::<CorruptRange>::new(), start, start, start, false);
        let mut last = None;
        let mut frames = FrameReader::new(&*file, file_id, len);
        while let Some(item) = frames.next().io_context("read", &path)? {
            match item {
                ScanItem::Garbage(bytes) => corrupt.push(CorruptRange { bytes, after: last, before: None }),
                ScanItem::Frame { frame, .. } if frame.unknown_flags != 0 => {
                    return Err(StoreError::Newer { path, what: format!("frame flags {:#x}", frame.unknown_flags) });
                }
                ScanItem::Frame { at, frame, .. } => {
                    if let Some(range) = corrupt.last_mut() {
                        range.before.get_or_insert(frame.generation);
                    } else if !frame.more {
                        last_batch_end = at.end;
                    }
                    synced = synced.max(frame.synced);
                    complete = frame.end && at.end == len;
                    last_frame_end = at.end;
                    last = Some(frame.generation);
                }
            }
        }
        drop(frames);
        Ok(FileScan {
            file_id,
            file,
            len,
            header,
            corrupt,
            synced,
            last_batch_end,
            last_frame_end,
            complete,
            replay_end: len,
        })
    }

    /// Tells corruption from a torn write.
    fn classify(
        &self,
        scans: &mut [FileScan],
        id: StoreId,
        corruptions: &mut Vec<Corruption>,
        repairs: &mut Vec<String>,
    ) {
        for index in 0..scans.len() {
            // This file's length by the header of the next one; 0 when that header cannot be read.
            let next = scans.get(index + 1).map(|next| match &next.header {
                Ok(header) if header.id == id => header.previous_len,
                _ => 0,
            });
            let scan = &mut scans[index];
            let newest = scan.file_id.kind == FileKind::Journal && next.is_none();
            let path = self.dir.join(scan.file_id.file_name());
            let mut found = |bytes: Option<Range<u64>>, what: &str, loss: String| {
                corruptions.push(Corruption { path: path.clone(), bytes, what: what.into(), loss });
            };
            match &scan.header {
                Ok(header) if header.id == id => {}
                Ok(_) => {
                    found(None, "belongs to the data directory of another gangplank", "everything in the file".into());
                    scan.replay_end = 0;
                    continue;
                }
                Err(_) => {
                    let end = scan.len.min(HEADER_LEN as u64);
                    found(Some(0..end), "the header is corrupt", "nothing if the rest is intact".into());
                }
            }
            if newest && scan.has_torn_tail() {
                let (cut, kept) = (scan.len.saturating_sub(scan.last_batch_end), scan.last_batch_end);
                if cut > 0 {
                    repairs.push(format!(
                        "{}: cut {cut} bytes from offset {kept} on: they look like a batch that was being written when \
                         gangplank or the machine stopped, and nothing shows that it was acknowledged; kept the \
                         {kept} bytes before it",
                        path.display(),
                    ));
                }
                scan.replay_end = kept;
                continue;
            }
            if newest {
                // If the loss is accepted, everything valid is replayed and the rest is cut off.
                scan.replay_end = scan.last_frame_end;
            }
            for range in &scan.corrupt {
                found(Some(range.bytes.clone()), "the checksum does not match", range.loss());
            }
            match (scan.file_id.kind, next) {
                (FileKind::Snapshot, _) if !scan.complete => found(
                    Some(scan.len..scan.len),
                    "the snapshot ends too early",
                    "the instances after that, in order of namespace and name".into(),
                ),
                (FileKind::Journal, Some(closed @ 1..)) if scan.len < closed => {
                    found(Some(scan.len..closed), "bytes are missing at the end", "what they held".into());
                }
                (FileKind::Journal, Some(closed @ 1..)) if scan.len > closed => {
                    let beyond = "there are bytes after the end at which it was closed";
                    found(Some(closed..scan.len), beyond, "nothing acknowledged".into());
                    scan.replay_end = closed;
                }
                _ => {}
            }
        }
    }

    /// Gives every instance's record to `record`, the others to the outbox alone, and says which generation is the highest.
    fn read(
        &self,
        scans: &[FileScan],
        id: StoreId,
        corruptions: &mut Vec<Corruption>,
        outbox: &mut Outbox,
        record: &mut dyn FnMut(Record),
        progress: &mut dyn FnMut(RecoveryProgress),
    ) -> Result<u64, StoreError> {
        let total = scans.iter().map(|scan| scan.replay_end).sum();
        let (mut generation, mut before, mut reported) = (0, 0, 0);
        for scan in scans {
            if scan.header.as_ref().is_ok_and(|header| header.id != id) {
                continue;
            }
            let path = self.dir.join(scan.file_id.file_name());
            let mut reader = RecordDecoder::default();
            let mut frames = FrameReader::new(&*scan.file, scan.file_id, scan.replay_end);
            while let Some(item) = frames.next().io_context("read", &path)? {
                let ScanItem::Frame { at, frame, payload } = item else { continue };
                generation = generation.max(frame.generation);
                let mut reject = |err| self.reject(&path, at.clone(), frame.generation, err, corruptions);
                match Payload::read(payload) {
                    Ok(payload) => {
                        for entry in payload.entries {
                            let outbox_key = outbox.outbox_key(&entry, frame.generation);
                            match reader.record(entry) {
                                Ok(read) => outbox.take(outbox_key, read).into_iter().for_each(&mut *record),
                                Err(err) => reject(err)?,
                            }
                        }
                    }
                    Err(err) => reject(err)?,
                }
                let read = before + at.end;
                if read - reported >= PROGRESS_INTERVAL {
                    reported = read;
                    progress(RecoveryProgress { read, total });
                }
            }
            before += scan.replay_end;
        }
        progress(RecoveryProgress { read: total, total });
        Ok(generation)
    }

    /// Handles a record that cannot be used although its checksum is right.
    fn reject(
        &self,
        path: &std::path::Path,
        bytes: Range<u64>,
        generation: u64,
        err: DecodeError,
        corruptions: &mut Vec<Corruption>,
    ) -> Result<(), StoreError> {
        match err {
            DecodeError::Newer(what) => Err(StoreError::Newer { path: path.into(), what }),
            DecodeError::Invalid(err) => {
                corruptions.push(Corruption {
                    path: path.into(),
                    bytes: Some(bytes),
                    what: format!("a record is not one that gangplank would write: {err}"),
                    loss: format!("that record, of generation {generation}"),
                });
                self.refuse(corruptions)
            }
        }
    }

    /// Fails if anything is corrupt, unless the loss is accepted.
    fn refuse(&self, corruptions: &[Corruption]) -> Result<(), StoreError> {
        if corruptions.is_empty() || self.options.accept_loss {
            return Ok(());
        }
        Err(StoreError::Corrupt { dir: self.dir.clone(), corruptions: corruptions.to_vec() })
    }

    /// Opens the journal at the end of the active segment.
    fn journal(
        &mut self,
        context: &StoreContext,
        mut scans: Vec<FileScan>,
        snapshot: Option<u64>,
        generation: u64,
        repairs: &mut Vec<String>,
    ) -> Result<Journal, StoreError> {
        let active = scans.pop_if(|scan| scan.file_id.kind == FileKind::Journal && scan.replay_end > 0);
        let closed = |kind| {
            scans
                .iter()
                .filter(move |scan| scan.file_id.kind == kind)
                .map(|scan| ClosedFile { number: scan.file_id.number, len: scan.replay_end })
        };
        let found = LiveFiles {
            closed: closed(FileKind::Journal).collect(),
            snapshot: closed(FileKind::Snapshot).next(),
            generation,
        };
        let last = found.closed.last().map(|segment| segment.number).or(snapshot).unwrap_or(0);
        let mut repaired = Ok(());
        let segment = match active {
            // Nothing was appended to it. It is created again, in case the directory was not synced
            // when it was created.
            Some(FileScan { file_id, header: Ok(header), replay_end, .. }) if replay_end == HEADER_LEN as u64 => {
                match Segment::create(context, file_id.number, header.previous_len) {
                    Ok(segment) => segment,
                    Err(err) => {
                        let file = self
                            .files
                            .open(&file_id.file_name())
                            .io_context("open", self.dir.join(file_id.file_name()))?;
                        repaired = Err(err);
                        Segment::unwritable(file_id, file, replay_end)
                    }
                }
            }
            Some(active) => {
                let (segment, done) = Segment::resume(active.file_id, active.file, active.synced, active.replay_end);
                repaired = done;
                segment
            }
            None => {
                let previous_len = found.closed.last().map_or(0, |segment| segment.len);
                let name = FileId::journal(last + 1).file_name();
                Segment::create(context, last + 1, previous_len).io_context("create", self.dir.join(name))?
            }
        };
        let mut journal = Journal::open(context.clone(), segment, found, self.options.segment_bytes, self.lock.take());
        let opened = match repaired {
            Ok(()) => journal.append_sync_marker(),
            Err(err) => Err(journal.fail_repair(err)),
        };
        // What is stored can be served all the same.
        if let Err(err) = opened {
            repairs.push(format!("not repaired: {err}"));
        }
        Ok(journal)
    }

    /// Removes files that no start reads any more.
    fn remove_obsolete(&self, obsolete: &[String]) {
        if obsolete.is_empty() {
            return;
        }
        // The name of the snapshot that replaces them must be on the disk first.
        let removed = self.files.sync_dir().and_then(|()| obsolete.iter().try_for_each(|name| self.files.remove(name)));
        if let Err(err) = removed {
            warn!(dir = %self.dir.display(), %err, "cannot remove files that a snapshot has replaced; they only take space");
        }
    }
}

/// The segments that are missing.
fn missing_segments(files_found: &FileSet, dir: &std::path::Path) -> Vec<Corruption> {
    if files_found.snapshot.is_none() && files_found.segments.is_empty() {
        return Vec::new(); // a new directory
    }
    let mut expected = files_found.snapshot.unwrap_or(0) + 1;
    let mut missing = Vec::new();
    // There is always a segment after a snapshot: it is created first.
    let end = files_found.segments.last().map_or(expected + 1, |last| last + 1);
    for number in files_found.segments.iter().copied().chain([end]) {
        if number > expected {
            let what = match number - expected {
                1 => "is missing".into(),
                more => format!("is missing, and so are the {} segments after it", more - 1),
            };
            let path = dir.join(FileId::journal(expected).file_name());
            missing.push(Corruption { path, bytes: None, what, loss: "everything in it".into() });
        }
        expected = number + 1;
    }
    missing
}

/// Writes everything that can be read into a new snapshot and renames the corrupt files.
fn quarantine(context: &StoreContext, journal: &mut Journal, corruptions: &[Corruption]) -> Result<(), StoreError> {
    journal.rotate()?;
    let (snapshot, segments) = journal.compaction_input();
    let names = corruptions.iter().filter_map(|corruption| FileId::parse(corruption.path.file_name()?.to_str()?));
    let plan = CompactionPlan { snapshot, segments, lossy: true, keep: names.collect() };
    match compact(context, &plan, &AtomicBool::new(false)) {
        Ok(snapshot) => {
            journal.install_snapshot(snapshot);
            Ok(())
        }
        Err(err) => Err(StoreError::Io {
            operation: "write a new snapshot without the corrupt files in",
            path: context.dir.clone(),
            source: Arc::new(std::io::Error::other(format!("{err} (corrupt files keep the ending {CORRUPT_SUFFIX})"))),
        }),
    }
}
