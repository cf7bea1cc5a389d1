//! How results look: tables of at most 80 columns, JSON, YAML, names.

use std::{
    env,
    fmt::Write as _,
    io::{self, Write as _},
    time::{Duration, SystemTime},
};

use serde::Serialize;

use super::error::{CommandError, ErrorKind};
use crate::model::UnixMillis;

/// An empty cell.
pub(super) const NONE: &str = "<none>";

/// Columns of a terminal that tables fit into unless `-o wide` is given.
const MAX_WIDTH: usize = 80;

/// Spaces between columns, as in `kubectl`.
const COLUMN_GAP: usize = 3;

/// A column is never cut below this many characters.
const MIN_COLUMN_WIDTH: usize = 8;

/// Values of `-o`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub(super) enum Format {
    /// More columns, nothing cut
    Wide,
    /// JSON; the shape is stable
    Json,
    /// The same as YAML
    Yaml,
    /// Names only, one a line, as other commands take them
    Name,
}

/// `-o`, for every subcommand.
#[derive(Debug, clap::Args)]
pub(super) struct OutputArgs {
    /// How the result looks, instead of a table of at most 80 columns
    #[arg(short = 'o', long = "output", value_enum, value_name = "FORMAT")]
    pub(super) output: Option<Format>,
}

/// Prints to standard output and flushes it.
pub(super) fn print(text: &str) -> Result<(), CommandError> {
    // Not `print!`, which panics where the reader has left (`gangplank ls | head`).
    let mut out = io::stdout().lock();
    out.write_all(text.as_bytes())?;
    Ok(out.flush()?)
}

/// Prints `value` as indented JSON.
pub(super) fn print_json(value: &impl Serialize) -> Result<(), CommandError> {
    let mut out = io::BufWriter::new(io::stdout().lock());
    serde_json::to_writer_pretty(&mut out, value).map_err(io::Error::from)?;
    out.write_all(b"\n")?;
    Ok(out.flush()?)
}

/// Prints `value` as one YAML document.
pub(super) fn print_yaml(value: &impl Serialize) -> Result<(), CommandError> {
    let text = serde_yaml_ng::to_string(value).map_err(|err| {
        CommandError::new(ErrorKind::Failed, format!("the result cannot be written as YAML: {err}")).hint("use -o json")
    })?;
    print(&text)
}

/// Whether a stream may be coloured: only a terminal, and only without `NO_COLOR`
/// (no-color.org: set and not empty).
pub(super) fn colour_allowed(terminal: bool) -> bool {
    terminal && env::var_os("NO_COLOR").is_none_or(|value| value.is_empty())
}

/// Rows under titles, each column as wide as its widest cell.
#[derive(Debug)]
pub(super) struct Table {
    titles: Vec<&'static str>,
    /// Columns that may be cut so that a row fits, in this order.
    cut: Vec<usize>,
    rows: Vec<Vec<String>>,
}

impl Table {
    /// A table with these titles. The columns in `cut` are cut if a row would not fit, except with
    /// `-o wide`.
    pub(super) fn new(titles: &[&'static str], cut: &[&str], format: Option<Format>) -> Self {
        let cut = if format == Some(Format::Wide) { &[] } else { cut };
        let index = |name: &&str| titles.iter().position(|title| title == name).expect("one of the titles");
        Self { titles: titles.to_vec(), cut: cut.iter().map(index).collect(), rows: Vec::new() }
    }

    pub(super) fn row(&mut self, cells: Vec<String>) {
        debug_assert_eq!(cells.len(), self.titles.len(), "one cell for each title");
        self.rows.push(cells);
    }

    /// The table as text; each line ends in a line feed.
    pub(super) fn render(&self) -> String {
        // Characters, not bytes: names of nodes are ASCII, but registrants need not be.
        let length = |text: &str| text.chars().count();
        let mut widths: Vec<usize> = self.titles.iter().map(|title| length(title)).collect();
        for row in &self.rows {
            for (width, cell) in widths.iter_mut().zip(row) {
                *width = length(cell).max(*width);
            }
        }
        for at in &self.cut {
            let all = widths.iter().sum::<usize>() + COLUMN_GAP * (widths.len() - 1);
            let floor = MIN_COLUMN_WIDTH.max(length(self.titles[*at]));
            widths[*at] = widths[*at].saturating_sub(all.saturating_sub(MAX_WIDTH)).max(floor.min(widths[*at]));
        }
        let mut text = String::new();
        let titles = self.titles.iter().map(|title| (*title).to_owned()).collect();
        for row in std::iter::once(&titles).chain(&self.rows) {
            let mut line = String::new();
            for (cell, width) in row.iter().zip(&widths) {
                let width = *width;
                write!(line, "{:<width$}{:COLUMN_GAP$}", shortened(cell, width), "")
                    .expect("a String takes everything");
            }
            // Without blanks at the end, which would wrap in a narrow terminal.
            text.push_str(line.trim_end());
            text.push('\n');
        }
        text
    }
}

/// `text` in at most `width` characters; the last one is `…` if text is missing.
fn shortened(text: &str, width: usize) -> String {
    if text.chars().count() <= width {
        return text.to_owned();
    }
    let mut short: String = text.chars().take(width.saturating_sub(1)).collect();
    short.push('…');
    short
}

/// How long ago `since` was, by this machine's clock: `5m`, `3h`, `2d`, in the steps of `kubectl`.
pub(super) fn age(since: UnixMillis, now: SystemTime) -> String {
    match now.duration_since(since.to_system_time()) {
        Ok(age) => duration(age),
        // The server's clock is ahead of this machine's.
        Err(_) => duration(Duration::ZERO),
    }
}

/// How long it is until `end`, or that it is over.
pub(super) fn remaining(end: SystemTime, now: SystemTime) -> String {
    match end.duration_since(now) {
        Ok(left) if !left.is_zero() => duration(left),
        _ => "expired".to_owned(),
    }
}

fn duration(age: Duration) -> String {
    let seconds = age.as_secs();
    let (minutes, hours, days) = (seconds / 60, seconds / 3600, seconds / 86_400);
    let two = |large: u64, unit, small: u64, small_unit| match small {
        0 => format!("{large}{unit}"),
        small => format!("{large}{unit}{small}{small_unit}"),
    };
    match () {
        () if seconds < 120 => format!("{seconds}s"),
        () if minutes < 10 => two(minutes, 'm', seconds % 60, 's'),
        () if minutes < 180 => format!("{minutes}m"),
        () if hours < 8 => two(hours, 'h', minutes % 60, 'm'),
        () if hours < 48 => format!("{hours}h"),
        () if days < 8 => two(days, 'd', hours % 24, 'h'),
        () if days < 730 => format!("{days}d"),
        () if days < 2920 => two(days / 365, 'y', days % 365, 'd'),
        () => format!("{}y", days / 365),
    }
}

/// A part of the whole: `33%`, `0.5%`, `0%`.
pub(super) fn percent(share: f64) -> String {
    let hundredths = share * 100.0;
    if hundredths > 0.0 && hundredths < 1.0 {
        return if hundredths < 0.1 { "<0.1%".into() } else { format!("{hundredths:.1}%") };
    }
    format!("{hundredths:.0}%")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ages_are_those_of_kubectl() {
        const M: u64 = 60;
        const H: u64 = 60 * M;
        const D: u64 = 24 * H;
        for (seconds, shown) in [
            (0, "0s"),
            (1, "1s"),
            (119, "119s"),
            (2 * M, "2m"),
            (3 * M + 5, "3m5s"),
            (10 * M + 5, "10m"),
            (179 * M, "179m"),
            (3 * H, "3h"),
            (7 * H + 23 * M, "7h23m"),
            (8 * H + M, "8h"),
            (47 * H, "47h"),
            (2 * D, "2d"),
            (2 * D + 3 * H, "2d3h"),
            (8 * D + H, "8d"),
            (729 * D, "729d"),
            (731 * D, "2y1d"),
            (3000 * D, "8y"),
        ] {
            assert_eq!(duration(Duration::from_secs(seconds)), shown);
        }
        let now = SystemTime::UNIX_EPOCH + Duration::from_secs(1000);
        assert_eq!(age(UnixMillis(700_000), now), "5m");
        assert_eq!(age(UnixMillis(9_000_000), now), "0s", "the server's clock is ahead");
    }

    #[test]
    fn table_is_aligned_without_trailing_spaces() {
        let mut table = Table::new(&["NAMESPACE", "NAME", "AGE"], &[], None);
        table.row(vec!["prod".into(), "a-longer-name".into(), "5m".into()]);
        table.row(vec!["prod".into(), "w".into(), NONE.into()]);
        assert_eq!(
            table.render(),
            "NAMESPACE   NAME            AGE\n\
             prod        a-longer-name   5m\n\
             prod        w               <none>\n"
        );
    }

    #[test]
    fn tables_are_cut_to_80_columns() {
        let cells = || vec!["prod".to_owned(), "web".into(), "http=8080,".repeat(9), "50%,".repeat(20), "5m".into()];
        let titles = ["NAMESPACE", "NAME", "PORTS", "SHARES", "AGE"];
        let mut table = Table::new(&titles, &["SHARES", "PORTS"], None);
        table.row(cells());
        let text = table.render();
        for line in text.lines() {
            assert!(line.chars().count() <= 80, "{line}");
        }
        assert!(text.contains('…'), "{text}");
        assert!(text.lines().all(|line| line.ends_with("AGE") || line.ends_with("5m")), "{text}");

        let mut wide = Table::new(&titles, &["SHARES", "PORTS"], Some(Format::Wide));
        wide.row(cells());
        assert!(wide.render().contains(&"50%,".repeat(20)));
    }

    #[test]
    fn shares_are_short() {
        for (share, shown) in
            [(0.0, "0%"), (1.0, "100%"), (1.0 / 3.0, "33%"), (0.005, "0.5%"), (0.0001, "<0.1%"), (0.01, "1%")]
        {
            assert_eq!(percent(share), shown);
        }
    }

    #[test]
    fn colour_is_for_terminals_only() {
        assert!(!colour_allowed(false));
    }
}
