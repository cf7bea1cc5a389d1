//! The open journal: batches become frames at the end of the newest segment.
//!
//! - At most one batch is not known to be synced, and it is the last. Each frame says from where.
//! - After a failed write or sync nothing is written any more. The system may have dropped the
//!   octets and call the next sync a success, so only a start, which reads what is there and
//!   writes the last batch again, can go on.
//! - A *mark* is a frame without records. It vouches for everything before it: one is written
//!   when a journal is opened and one when it is closed.

use std::{fs, io, sync::Arc, time::Instant};

use tracing::warn;

use super::{
    Record, StoreError,
    files::{File, no_descriptor, publish},
    format::Entry,
    frame::{Frame, FrameBuffer, HEADER_LEN, Header, Place},
    snapshot::{Closed, Plan, Running, Shared},
    walk::read_exact,
};

/// A frame is closed when its payload has this many octets, well below what a reader takes.
const FRAME_OCTETS: usize = 1 << 20;

/// The open journal. Dropping it closes it.
#[derive(Debug)]
pub struct Journal {
    shared: Shared,
    segment: Segment,
    /// The segments before it that no snapshot has yet, in order.
    closed: Vec<Closed>,
    snapshot: Option<Closed>,
    compaction: Option<Running>,
    segment_octets: u64,
    pub(super) frame_octets: usize,
    frame: FrameBuffer,
    generation: u64,
    /// The next segment could not be begun for want of a descriptor, and that was said.
    crowded: bool,
    /// What ended the journal's use.
    failed: Option<StoreError>,
    /// Held until everything above is at rest.
    _lock: Option<fs::File>,
}

/// The segment that is written to.
#[derive(Debug)]
pub(super) struct Segment {
    place: Place,
    file: Box<dyn File>,
    /// Its length. All of it is synced, except within [`Journal::append`].
    end: u64,
}

/// Something was tried and the system said no.
struct Tried(&'static str, io::Error);

impl Segment {
    /// Makes a new segment behind one of `previous_len` octets.
    pub(super) fn create(shared: &Shared, number: u64, previous_len: u64) -> io::Result<Self> {
        let place = Place::journal(number);
        let header = Header { id: shared.id, place, previous_len };
        let file = publish(&*shared.files, &place.name(), |file| file.write_at(0, &header.encode()))?;
        Ok(Self { place, file, end: HEADER_LEN as u64 })
    }

    /// Goes on in a segment that stands: `keep` octets of it are good, of which the first
    /// `proven` are known to be on the disk.
    pub(super) fn resume(place: Place, mut file: Box<dyn File>, proven: u64, keep: u64) -> (Self, io::Result<()>) {
        let done = Self::settle(&mut *file, proven, keep);
        (Self { place, file, end: keep }, done)
    }

    /// A segment that stands, and that nothing can be done with.
    pub(super) fn unsettled(place: Place, file: Box<dyn File>, end: u64) -> Self {
        Self { place, file, end }
    }

    fn settle(file: &mut dyn File, proven: u64, keep: u64) -> io::Result<()> {
        // 1. Cut what is torn.
        if file.len()? > keep {
            file.truncate(keep)?;
        }
        // 2. Write the last batch again, just as it reads. If its sync had failed, it is in
        //    memory but perhaps not on the disk, and a sync alone would not bring it there.
        let mut chunk = Vec::new();
        let mut at = proven;
        while at < keep {
            chunk.resize(usize::try_from((keep - at).min(1 << 20)).expect("at most 1 MiB"), 0);
            read_exact(file, at, &mut chunk)?;
            file.write_at(at, &chunk)?;
            at += chunk.len() as u64;
        }
        // 3. From here on everything that was read is durable. Only now may a mark say so.
        file.sync()
    }
}

/// What a start has found, for the journal that goes on from there.
#[derive(Debug)]
pub(super) struct Found {
    pub(super) closed: Vec<Closed>,
    pub(super) snapshot: Option<Closed>,
    pub(super) generation: u64,
}

impl Journal {
    pub(super) fn open(
        shared: Shared,
        segment: Segment,
        found: Found,
        segment_octets: u64,
        lock: Option<fs::File>,
    ) -> Self {
        let Found { closed, snapshot, generation } = found;
        let metrics = &shared.metrics.store;
        metrics.failed.set(0);
        metrics.snapshot_bytes.set(snapshot.map_or(0, |snapshot| gauge(snapshot.len)));
        let mut journal = Self {
            shared,
            segment,
            closed,
            snapshot,
            compaction: None,
            segment_octets,
            frame_octets: FRAME_OCTETS,
            frame: FrameBuffer::new(),
            generation,
            crowded: false,
            failed: None,
            _lock: lock,
        };
        journal.show_octets();
        journal
    }

    /// Appends one batch; when it returns, the batch is durable. A full segment is closed first,
    /// which may start a compaction in the background; it is never waited for.
    ///
    /// A batch without records makes its generation durable. One that says that Kubernetes has a
    /// generation makes that one durable too.
    ///
    /// # Errors
    /// After the first error every later call fails too: what reached the disk is unknown until
    /// a restart reads it.
    pub fn append(&mut self, generation: u64, records: &[Record]) -> Result<(), StoreError> {
        self.usable()?;
        if self.segment.end >= self.segment_octets {
            match self.begin_segment() {
                Ok(()) => {
                    self.crowded = false;
                    self.compact();
                }
                // Nothing was made, so nothing is in doubt. Whoever holds the descriptors must not
                // end registrations: the segment grows, and the next batch tries again.
                Err((_, err)) if no_descriptor(&err) => {
                    if !std::mem::replace(&mut self.crowded, true) {
                        warn!(%err, "the next journal segment cannot be begun; this one grows until it can");
                    }
                }
                Err((place, err)) => return Err(self.fail("create", place, err)),
            }
        }
        let named = records.iter().filter_map(|record| match record {
            Record::Mirrored { generation, .. } => Some(*generation),
            _ => None,
        });
        self.generation = named.fold(self.generation.max(generation), u64::max);
        self.write(records).map_err(|Tried(doing, err)| self.fail(doing, self.segment.place, err))?;
        self.show_octets();
        Ok(())
    }

    /// Whether appending can succeed: not after a failure, be it of an append or of the start,
    /// which reads what it can even when the disk is full.
    ///
    /// # Errors
    /// The failure.
    pub fn usable(&self) -> Result<(), StoreError> {
        self.failed.clone().map_or(Ok(()), Err)
    }

    fn write(&mut self, records: &[Record]) -> Result<(), Tried> {
        let synced = self.segment.end;
        let mut at = synced;
        // 1. The octets, behind everything that is known to be on the disk.
        self.frame.clear();
        for record in records {
            if self.frame.payload_len() >= self.frame_octets {
                at = self.write_frame(at, synced, true)?;
            }
            self.frame.push(&Entry::from(record));
        }
        at = self.write_frame(at, synced, false)?;
        // 2. The sync. If it fails, the octets may or may not be there.
        let began = Instant::now();
        self.segment.file.sync().map_err(|err| Tried("sync", err))?;
        self.shared.metrics.store.sync_seconds.observe(began.elapsed().as_secs_f64());
        // 3. Only now are they known to be on the disk.
        self.segment.end = at;
        Ok(())
    }

    fn write_frame(&mut self, at: u64, synced: u64, more: bool) -> Result<u64, Tried> {
        let frame = Frame { more, end: false, unknown_flags: 0, generation: self.generation, synced };
        let bytes = self.frame.seal(&frame, self.segment.place, at);
        self.segment.file.write_at(at, bytes).map_err(|err| Tried("write", err))?;
        let written = bytes.len() as u64;
        self.shared.metrics.store.journal_written_bytes.inc_by(written);
        self.frame.clear();
        Ok(at + written)
    }

    /// The newest segment could not be put in order at the start.
    pub(super) fn unsettled(&mut self, err: io::Error) -> StoreError {
        self.fail("repair", self.segment.place, err)
    }

    /// Vouches for everything before: from now on, damage there is not taken for a torn tail.
    pub(super) fn mark(&mut self) -> Result<(), StoreError> {
        self.usable()?;
        self.write(&[]).map_err(|Tried(doing, err)| self.fail(doing, self.segment.place, err))
    }

    /// Closes the segment and begins the next, whose header vouches for the closed one.
    pub(super) fn rotate(&mut self) -> Result<(), StoreError> {
        self.usable()?;
        self.begin_segment().map_err(|(place, err)| self.fail("create", place, err))
    }

    /// The error says which segment could not be made.
    fn begin_segment(&mut self) -> Result<(), (Place, io::Error)> {
        let Segment { place, end, .. } = self.segment;
        let next = place.number + 1;
        self.segment = Segment::create(&self.shared, next, end).map_err(|err| (Place::journal(next), err))?;
        self.closed.push(Closed { number: place.number, len: end });
        Ok(())
    }

    /// Starts a compaction if one is worth its writing and none runs. Never waits.
    pub(super) fn compact(&mut self) {
        if self.compaction.as_ref().is_some_and(|running| !running.is_finished()) {
            return;
        }
        self.reap();
        // Each octet of the journal makes at most three be written to snapshots, and a start
        // reads at most half as much again as the snapshot and a segment.
        let closed: u64 = self.closed.iter().map(|segment| segment.len).sum();
        if closed == 0 || closed < self.snapshot.map_or(0, |snapshot| snapshot.len) / 2 {
            return;
        }
        let plan = Plan { snapshot: self.snapshot, segments: self.closed.clone(), lossy: false, keep: Vec::new() };
        match Running::start(self.shared.clone(), plan) {
            Ok(running) => self.compaction = Some(running),
            Err(err) => warn!(%err, "no thread for the compaction of the journal; tried again at the next segment"),
        }
    }

    /// Takes in what a finished compaction has done; waits for one that still runs.
    pub(super) fn reap(&mut self) {
        let finished = self.compaction.take().and_then(|running| running.finish(&self.shared.metrics));
        if let Some(snapshot) = finished {
            self.replaced_by(snapshot);
        }
    }

    /// A snapshot stands in place of the segments that it has.
    pub(super) fn replaced_by(&mut self, snapshot: Closed) {
        self.closed.retain(|segment| segment.number > snapshot.number);
        self.snapshot = Some(snapshot);
        self.show_octets();
    }

    /// What a compaction of everything closed would merge.
    pub(super) fn closed(&self) -> (Option<Closed>, Vec<Closed>) {
        (self.snapshot, self.closed.clone())
    }

    /// Notes that nothing can be written any more, and gives the error for it.
    fn fail(&mut self, doing: &'static str, place: Place, err: io::Error) -> StoreError {
        self.shared.metrics.store.failed.set(1);
        let path = self.shared.dir.join(place.name());
        let failure = StoreError::Failed { doing, path, source: Arc::new(err) };
        self.failed = Some(failure.clone());
        failure
    }

    fn show_octets(&mut self) {
        let closed: u64 = self.closed.iter().map(|segment| segment.len).sum();
        self.shared.metrics.store.journal_bytes.set(gauge(closed + self.segment.end));
    }
}

/// A clean end: no thread is left behind, and damage to the last batch will be told from a torn one.
impl Drop for Journal {
    fn drop(&mut self) {
        if let Some(running) = &self.compaction {
            running.stop();
        }
        self.reap();
        if self.failed.is_none()
            && let Err(err) = self.mark()
        {
            warn!(%err, "the journal was not closed cleanly; nothing acknowledged is lost");
        }
    }
}

/// Octets as a gauge has them.
fn gauge(octets: u64) -> i64 {
    i64::try_from(octets).unwrap_or(i64::MAX)
}
