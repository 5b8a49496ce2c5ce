//! Counts what programs found.

use std::fmt;

/// How many of each kind of fault are described.
const DESCRIBED: usize = 20;

/// Writers may get one `ESTALE` in so many operations: if the host replaces a file without pause, even
/// the second walk of a path may find a file that is replaced a moment later.
const WRITES_PER_STALE: u64 = 1000;

/// As many more of these are no fault. In a short run their number is a matter of chance, and of how
/// long the machine's load lets a program wait between two requests.
const FEW_STALE: u64 = 10;

/// One in so many records may be let through after `ESTALE` to what the host has removed.
const RECORDS_PER_PASS: u64 = 500;

/// What programs found.
#[derive(Clone, Debug, Default)]
pub struct Report {
    /// Changes that the host made.
    pub changes: u64,
    /// Reading calls.
    pub reads: u64,
    /// Changing calls that were acknowledged, each with one thing to find.
    pub records: u64,
    /// Effects found where the path leads.
    pub arrived: u64,
    /// Effects found in what the host removed from the path afterwards.
    pub displaced_later: u64,
    /// Effects found in what has another name on the host.
    pub elsewhere: u64,
    /// Effects found in a file that the guest had open already.
    pub was_open: u64,
    /// Effects found in what was looked up after `ESTALE`, and let through.
    pub passed: u64,
    /// Effects that the host has changed afterwards.
    pub overtaken: u64,
    /// Calls that failed because something didn't exist.
    pub missing: u64,
    /// Of these, calls for something that existed: the guest relied on a removed directory.
    pub outdated: u64,
    /// Calls on a removed file that were refused, if the server sees no OPEN.
    pub refused: u64,
    /// Reading calls that failed with `ESTALE`.
    pub stale_reads: u64,
    /// Changing calls that failed with `ESTALE`.
    pub stale_writes: u64,
    /// Second attempts that a guest's kernel made, if known.
    pub retries: u64,
    /// How many records are nowhere, or not where they can be found.
    pub lost: u64,
    /// Descriptions of some lost records.
    pub losses: Vec<String>,
    /// Errors that no program should see.
    pub errors: u64,
    /// Descriptions of some of these errors.
    pub described: Vec<String>,
}

impl Report {
    /// Counts a lost record.
    pub(crate) fn lose(&mut self, what: String) {
        self.lost += 1;
        if self.losses.len() < DESCRIBED {
            self.losses.push(what);
        }
    }

    /// Counts an error that no program should see.
    pub(crate) fn error(&mut self, what: String) {
        self.errors += 1;
        if self.described.len() < DESCRIBED {
            self.described.push(what);
        }
    }

    /// Adds what another report found.
    pub fn add(&mut self, other: Self) {
        self.changes += other.changes;
        self.reads += other.reads;
        self.records += other.records;
        self.arrived += other.arrived;
        self.displaced_later += other.displaced_later;
        self.elsewhere += other.elsewhere;
        self.was_open += other.was_open;
        self.passed += other.passed;
        self.overtaken += other.overtaken;
        self.missing += other.missing;
        self.outdated += other.outdated;
        self.refused += other.refused;
        self.stale_reads += other.stale_reads;
        self.stale_writes += other.stale_writes;
        self.retries += other.retries;
        self.lost += other.lost;
        self.errors += other.errors;
        self.losses.extend(other.losses);
        self.losses.truncate(DESCRIBED);
        self.described.extend(other.described);
        self.described.truncate(DESCRIBED);
    }

    /// Describes what is wrong, if anything is.
    #[must_use]
    pub fn fault(&self) -> Option<String> {
        let too_many_stale =
            self.stale_writes.saturating_sub(FEW_STALE) * WRITES_PER_STALE > self.records;
        let too_many_passed = self.passed * RECORDS_PER_PASS > self.records + RECORDS_PER_PASS;
        self.loss()
            .or_else(|| (too_many_stale || too_many_passed).then(|| self.describe()))
    }

    /// Describes what must not happen even once, if it did. The other faults are frequencies, which
    /// only a long run can show.
    #[must_use]
    pub fn loss(&self) -> Option<String> {
        let wrong = self.lost > 0 || self.errors > 0 || self.stale_reads > 0;
        wrong.then(|| self.describe())
    }

    fn describe(&self) -> String {
        let mut text = self.to_string();
        for line in self.losses.iter().chain(&self.described) {
            text.push_str("\n  ");
            text.push_str(line);
        }
        text
    }
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "{} changes on the host, {} reads, {} records: {} arrived, {} displaced later, \
             {} in what has another name, {} in what was open, {} passed, {} overtaken, \
             {} lost; {} calls found nothing ({} what was there), {} refused, {} retries, ESTALE for {} reads and {} writes, {} other errors",
            self.changes,
            self.reads,
            self.records,
            self.arrived,
            self.displaced_later,
            self.elsewhere,
            self.was_open,
            self.passed,
            self.overtaken,
            self.lost,
            self.missing,
            self.outdated,
            self.refused,
            self.retries,
            self.stale_reads,
            self.stale_writes,
            self.errors
        )
    }
}
