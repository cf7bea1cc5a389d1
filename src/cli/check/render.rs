//! Findings as text.

use std::fmt::Write as _;

use super::finding::{CheckResult, Finding};

/// Where the headings are that ids name.
const PAGE: &str = "docs/troubleshooting.md";

/// The mark of a result, and its colour on a terminal.
const fn mark(result: CheckResult) -> (&'static str, &'static str) {
    match result {
        CheckResult::Passed => ("√", "\x1b[32m"),
        CheckResult::Warning => ("‼", "\x1b[33m"),
        CheckResult::Failed => ("×", "\x1b[31m"),
        CheckResult::Skipped => ("-", "\x1b[2m"),
    }
}

/// The checks under the titles of their categories, and how many ended how; of `faults_only` the faults alone.
pub(super) fn text(findings: &[Finding], faults_only: bool, colour: bool) -> String {
    let mut text = String::new();
    let mut category = None;
    for finding in findings.iter().filter(|finding| !faults_only || finding.is_fault()) {
        if !faults_only && category != Some(finding.category) {
            let gap = if category.is_none() { "" } else { "\n" };
            writeln!(text, "{gap}{}", finding.category.title()).expect("a String takes everything");
            category = Some(finding.category);
        }
        text += &one(finding, colour);
    }
    if !faults_only {
        let count = |result| findings.iter().filter(|finding| finding.result == result).count();
        let [passed, warnings, failed, skipped] =
            [CheckResult::Passed, CheckResult::Warning, CheckResult::Failed, CheckResult::Skipped].map(count);
        writeln!(text, "\n{passed} passed, {warnings} warnings, {failed} failed, {skipped} skipped")
            .expect("a String takes everything");
    }
    text
}

/// One check: a line, and of a fault its cause, its fix and its heading.
pub(super) fn one(finding: &Finding, colour: bool) -> String {
    let (mark, paint) = mark(finding.result);
    let (on, off) = if colour { (paint, "\x1b[0m") } else { ("", "") };
    let said = finding.observed.as_deref().or(finding.reason.as_deref()).unwrap_or_default();
    let skipped = if finding.result == CheckResult::Skipped { "skipped: " } else { "" };
    let mut text = format!("{on}{mark}{off} {:<21} {skipped}{said}\n", finding.id.as_str());
    if finding.is_fault() {
        for (what, line) in [("cause", &finding.cause), ("fix", &finding.fix)] {
            if let Some(line) = line {
                writeln!(text, "    {what:<6} {line}").expect("a String takes everything");
            }
        }
        writeln!(text, "    {:<6} {PAGE}#{}", "see", finding.id.as_str()).expect("a String takes everything");
    }
    text
}
