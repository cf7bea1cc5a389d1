//! What the benches share: rounds in turns, and a table of ratios.
//!
//! Absolute figures of a shared machine are not results. Each bench measures two things in turns,
//! A B A B …, and prints the ratio of the pairs: the median with the least and the greatest.

/// The median, and the least and the greatest.
pub(crate) fn spread(mut values: Vec<f64>) -> (f64, f64, f64) {
    values.sort_by(f64::total_cmp);
    (values[values.len() / 2], values[0], values[values.len() - 1])
}

/// Prints one row: what, the ratio of pairs measured in turns, the goal.
pub(crate) fn row(what: &str, ratios: Vec<f64>, goal: &str) {
    let (median, least, most) = spread(ratios);
    println!("{what:<58} {median:>7.3} ({least:.3}–{most:.3})   goal {goal}");
}

/// Says what machine this is.
pub(crate) fn machine() {
    let model = std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let model = model
        .lines()
        .find_map(|line| line.strip_prefix("model name"))
        .map_or("unknown", |rest| rest.trim_start_matches(['\t', ':', ' ']));
    let cores = std::thread::available_parallelism().map_or(0, usize::from);
    println!("machine: {cores} cores, {model}");
}
