//! `cargo bench -p iotlb-tests --bench iotlb`: this project and its peers, in one run.
//!
//! Prints a table and curves, and writes `bench.json` (an array of rows) and `bench-curves.json` into the build
//! directory. Arguments: names of groups, to run only those, which leaves these files as they are; `--quick` for a run
//! that only shows that everything still works; `--record FOLDER` to write the run as Markdown and its first curve as
//! SVG (`docs/bench` holds such a run), which only a whole run is good for.

mod chain;

use std::path::{Path, PathBuf};
use std::process::ExitCode;

use iotlb_tests::bench::groups::{self, Group, Run};
use iotlb_tests::bench::report::{curves_path, curves_text, json_path, markdown, table, write_curves, write_rows};
use iotlb_tests::bench::{chart, child, hardware};

/// All groups, in the order of the table; [`chain`] says why it is one of this crate.
fn all() -> Vec<Group> {
    let mut all = groups::ALL.to_vec();
    all.push(("chain", chain::run));
    all
}

fn main() -> ExitCode {
    let result = child::run_if_child().unwrap_or_else(parent);
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("iotlb bench: {error}");
            ExitCode::FAILURE
        }
    }
}

fn parent() -> Result<(), Box<dyn std::error::Error>> {
    let all = all();
    let mut run = Run::default();
    let mut names = Vec::new();
    let mut record: Option<PathBuf> = None;
    let mut arguments = std::env::args().skip(1);
    while let Some(argument) = arguments.next() {
        match argument.as_str() {
            "--quick" => run.quick = true,
            // Cargo says this to every benchmark.
            "--bench" => {}
            "--record" => record = Some(arguments.next().ok_or("--record needs a folder")?.into()),
            name if all.iter().any(|(known, _)| known.contains(name)) => names.push(argument),
            other => {
                let known: Vec<_> = all.iter().map(|(name, _)| *name).collect();
                return Err(format!("no group has {other} in its name; there are {}", known.join(", ")).into());
            }
        }
    }
    if record.is_some() && (run.quick || !names.is_empty()) {
        return Err("--record takes a whole run: without --quick and without names of groups".into());
    }
    for (name, group) in &all {
        if names.is_empty() || names.iter().any(|wanted| name.contains(wanted.as_str())) {
            group(&mut run)?;
        }
    }
    let machine = hardware::machine();
    println!("{machine}\n\n{}{}", table(&run.rows), curves_text(&run.curves));
    if !names.is_empty() {
        // Whoever compares runs takes the files for all groups of one.
        println!("{} rows, {} curves, written nowhere: not all groups were run", run.rows.len(), run.curves.len());
        return Ok(());
    }
    let path = json_path();
    write_rows(&path, &run.rows).map_err(|error| format!("{}: {error}", path.display()))?;
    let curves = curves_path();
    write_curves(&curves, &machine, &run.curves).map_err(|error| format!("{}: {error}", curves.display()))?;
    println!("{} rows, {} curves in {}", run.rows.len(), run.curves.len(), path.display());
    record.map_or(Ok(()), |folder| write_record(&folder, &machine, &run))
}

fn write_record(folder: &Path, machine: &str, run: &Run) -> Result<(), Box<dyn std::error::Error>> {
    // Cargo runs benchmarks in their package's folder; people give paths from the workspace.
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap_or_else(|| Path::new("."));
    let folder = root.join(folder);
    std::fs::create_dir_all(&folder)?;
    std::fs::write(folder.join("run.md"), markdown(machine, &run.rows, &run.curves))?;
    if let Some(curve) = run.curves.first() {
        std::fs::write(folder.join("latency.svg"), chart::svg(curve, machine))?;
    }
    println!("recorded in {}", folder.display());
    Ok(())
}
