//! Rows with a ratio and a target; a table for people and JSON for programs.

use std::fmt::Write as _;
use std::path::{Path, PathBuf};

use serde::Serialize;

/// Which way a ratio is good.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Target {
    /// `peer / ours` must reach this: so many times faster.
    FasterAtLeast(f64),
    /// `ours / peer` must not pass this.
    CostsAtMost(f64),
    /// Shown for context.
    None,
}

/// One comparison.
#[derive(Clone, Debug, Serialize)]
pub struct Row {
    /// What was measured.
    pub name: String,
    /// Unit of `ours` and `peer`.
    pub unit: &'static str,
    /// Our median.
    pub ours: f64,
    /// The peer's median, of the same run.
    pub peer: f64,
    /// Who the peer is.
    pub peer_name: String,
    /// `peer / ours` where the target is to be faster, else `ours / peer`.
    pub ratio: f64,
    /// What the ratio should be.
    pub target: String,
    /// Whether it is.
    pub ok: bool,
}

impl Row {
    /// A row from two medians.
    #[must_use]
    pub fn new(
        name: impl Into<String>,
        unit: &'static str,
        ours: f64,
        peer: f64,
        peer_name: &str,
        target: Target,
    ) -> Row {
        let (ratio, text, ok) = match target {
            Target::FasterAtLeast(wanted) => (peer / ours, format!(">= {wanted}x faster"), peer / ours >= wanted),
            Target::CostsAtMost(wanted) => (ours / peer, format!("<= {wanted}x"), ours / peer <= wanted),
            Target::None => (ours / peer, "-".to_owned(), true),
        };
        Row { name: name.into(), unit, ours, peer, peer_name: peer_name.to_owned(), ratio, target: text, ok }
    }
}

/// How a cost grows with something.
#[derive(Clone, Debug, Serialize)]
pub struct Curve {
    /// What was measured.
    pub name: String,
    /// What grows.
    pub x_name: String,
    /// What is shown, with its unit.
    pub y_name: String,
    /// One for each contestant.
    pub series: Vec<Series>,
}

/// One line of a [`Curve`].
#[derive(Clone, Debug, Serialize)]
pub struct Series {
    /// Whose.
    pub name: String,
    /// Medians.
    pub points: Vec<(u64, f64)>,
}

impl Curve {
    /// Without points.
    #[must_use]
    pub fn new(name: &str, x_name: &str, y_name: &str) -> Curve {
        Curve { name: name.to_owned(), x_name: x_name.to_owned(), y_name: y_name.to_owned(), series: Vec::new() }
    }

    /// A point of the series `name`.
    pub fn add(&mut self, name: &str, x: u64, y: f64) {
        let at = self.series.iter().position(|series| series.name == name).unwrap_or_else(|| {
            self.series.push(Series { name: name.to_owned(), points: Vec::new() });
            self.series.len() - 1
        });
        self.series[at].points.push((x, y));
    }

    /// What grows, then the value of each series there.
    fn lines(&self) -> impl Iterator<Item = (u64, Vec<f64>)> {
        let points = self.series.first().map_or(&[][..], |series| &series.points);
        points.iter().enumerate().map(|(n, &(x, _))| {
            let values = self.series.iter().map(|series| series.points.get(n).map_or(f64::NAN, |point| point.1));
            (x, values.collect())
        })
    }
}

/// A run as Markdown: the machine, the comparisons, the curves.
#[must_use]
pub fn markdown(machine: &str, rows: &[Row], curves: &[Curve]) -> String {
    let mut text = format!("# A recorded run\n\nMedians of one run of `cargo bench -p iotlb-tests`. {machine}\n\n");
    text +=
        "| measured | ours | peer | ratio | target | met | peer is |\n| --- | ---: | ---: | ---: | --- | --- | --- |\n";
    for row in rows {
        let met = if row.target == "-" { "" } else { yes_no(row.ok) };
        // Writing to a string cannot fail, here and below.
        let _ = writeln!(
            text,
            "| {} | {:.2} {} | {:.2} {} | {:.2} | {} | {met} | {} |",
            row.name, row.ours, row.unit, row.peer, row.unit, row.ratio, row.target, row.peer_name
        );
    }
    for curve in curves {
        let _ = writeln!(text, "\n## {}\n\nIn {}.\n", curve.name, curve.y_name);
        let names: Vec<_> = curve.series.iter().map(|series| series.name.as_str()).collect();
        let _ = writeln!(text, "| {} | {} |", curve.x_name, names.join(" | "));
        let _ = writeln!(text, "| ---: |{}", " ---: |".repeat(names.len()));
        for (x, values) in curve.lines() {
            let values: Vec<_> = values.iter().map(|value| format!("{value:.2}")).collect();
            let _ = writeln!(text, "| {x} | {} |", values.join(" | "));
        }
    }
    text
}

/// The curves as text.
#[must_use]
pub fn curves_text(curves: &[Curve]) -> String {
    let mut text = String::new();
    for curve in curves {
        let _ = writeln!(text, "\n{} ({})", curve.name, curve.y_name);
        let names: Vec<_> = curve.series.iter().map(|series| series.name.as_str()).collect();
        let _ = writeln!(text, "{:>20}  {}", curve.x_name, names.join(" | "));
        for (x, values) in curve.lines() {
            let values: Vec<_> = values.iter().map(|value| format!("{value:>10.2}")).collect();
            let _ = writeln!(text, "{x:>20}  {}", values.join("  "));
        }
    }
    text
}

fn yes_no(ok: bool) -> &'static str {
    if ok { "yes" } else { "NO" }
}

/// The table as text.
#[must_use]
pub fn table(rows: &[Row]) -> String {
    let mut text = format!(
        "{:<60} {:>12} {:>12} {:>8}  {:<16} {:<4} peer\n",
        "measured (medians of one run)", "ours", "peer", "ratio", "target", "ok"
    );
    for row in rows {
        let ok = if row.target == "-" { "" } else { yes_no(row.ok) };
        // Writing to a string cannot fail.
        let _ = writeln!(
            text,
            "{:<60} {:>9.2} {:<2} {:>9.2} {:<2} {:>8.2}  {:<16} {:<4} {}",
            row.name, row.ours, row.unit, row.peer, row.unit, row.ratio, row.target, ok, row.peer_name
        );
    }
    text
}

/// Where the JSON goes: `bench.json` in the build directory.
#[must_use]
pub fn json_path() -> PathBuf {
    let target = std::env::var_os("CARGO_TARGET_DIR").map_or_else(
        || Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap_or_else(|| Path::new(".")).join("target"),
        PathBuf::from,
    );
    target.join("bench.json")
}

/// Where the curves go: beside the rows.
#[must_use]
pub fn curves_path() -> PathBuf {
    json_path().with_file_name("bench-curves.json")
}

/// Writes the rows as a JSON array: what programs that compare runs read.
///
/// # Errors
/// The file cannot be written.
pub fn write_rows(path: &Path, rows: &[Row]) -> std::io::Result<()> {
    write_json(path, &serde_json::json!(rows))
}

/// Writes the machine and the curves as a JSON object.
///
/// # Errors
/// The file cannot be written.
pub fn write_curves(path: &Path, machine: &str, curves: &[Curve]) -> std::io::Result<()> {
    write_json(path, &serde_json::json!({ "machine": machine, "curves": curves }))
}

fn write_json(path: &Path, value: &serde_json::Value) -> std::io::Result<()> {
    let text = serde_json::to_string_pretty(value).map_err(std::io::Error::other)?;
    if let Some(folder) = path.parent() {
        std::fs::create_dir_all(folder)?;
    }
    std::fs::write(path, text + "\n")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_ratio_points_the_way_of_its_target() {
        let faster = Row::new("a", "ns", 2.0, 50.0, "p", Target::FasterAtLeast(20.0));
        assert!(faster.ok && (faster.ratio - 25.0).abs() < 1e-9);
        assert!(!Row::new("a", "ns", 2.0, 30.0, "p", Target::FasterAtLeast(20.0)).ok);
        let dearer = Row::new("a", "ns", 3.0, 2.0, "p", Target::CostsAtMost(1.2));
        assert!(!dearer.ok && (dearer.ratio - 1.5).abs() < 1e-9);
    }
}
