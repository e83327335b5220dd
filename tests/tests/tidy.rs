//! The project's style, as far as a program can tell: run over every file that git tracks.
//!
//! Each rule collects all its findings, so that one run shows everything there is to mend.

use std::path::{Path, PathBuf};
use std::process::Command;

/// Longest line of Rust, in characters. The same as in rustfmt.toml; rustfmt itself leaves comments and strings alone.
const LINE_MAX: usize = 120;

/// Longest Rust file, in lines. Past it a file holds more than one noun.
const FILE_MAX: usize = 600;

/// The same for tests: a list of cases is read case by case.
const TEST_FILE_MAX: usize = 900;

/// Files that may be longer, and why.
const LONG_FILES: &[(&str, &str)] = &[];

/// Where atomics may be named directly: everything else takes them from `iotlb_proto::sync`, which loom replaces.
const ATOMICS_HOME: &str = "proto/src/sync.rs";

/// A tracked text file.
struct File {
    /// Path from the repository's root.
    path: String,
    text: String,
}

impl File {
    fn is_rust(&self) -> bool {
        self.path.ends_with(".rs")
    }

    fn is_test(&self) -> bool {
        self.path.contains("/tests/") || self.path.ends_with("/tests.rs")
    }

    /// Findings `path:line: what` for every line the test answers.
    fn findings(&self, test: impl Fn(&str) -> Option<String>) -> Vec<String> {
        let found = |(index, line): (usize, &str)| Some(format!("{}:{}: {}", self.path, index + 1, test(line)?));
        self.text.lines().enumerate().filter_map(found).collect()
    }
}

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().expect("the crate is a directory of the workspace").to_owned()
}

/// Everything git tracks and that is text. New files count as soon as they are added.
fn files() -> Vec<File> {
    let root = root();
    let output = Command::new("git").args(["ls-files", "-z"]).current_dir(&root).output().expect("git runs");
    assert!(output.status.success(), "git ls-files: {}", String::from_utf8_lossy(&output.stderr));
    let names = String::from_utf8(output.stdout).expect("our file names are ASCII");
    let files: Vec<File> = names
        .split_terminator('\0')
        // A file that is gone from the tree but still in the index, or binary, has no text.
        .filter_map(|name| Some(File { path: name.to_owned(), text: std::fs::read_to_string(root.join(name)).ok()? }))
        .collect();
    assert!(files.len() > 20, "only {} files: looking in the wrong place", files.len());
    files
}

#[track_caller]
fn none(findings: Vec<String>) {
    assert!(findings.is_empty(), "{} findings:\n{}", findings.len(), findings.join("\n"));
}

#[test]
fn lines_are_short_and_clean() {
    none(files().iter().filter(|file| file.is_rust()).flat_map(|file| file.findings(untidy_line)).collect());
}

fn untidy_line(line: &str) -> Option<String> {
    let length = line.chars().count();
    if length > LINE_MAX {
        return Some(format!("{length} characters, {LINE_MAX} are allowed"));
    }
    if line.contains('\t') {
        return Some("a tab".to_owned());
    }
    (line != line.trim_end()).then(|| "space at the end".to_owned())
}

#[test]
fn no_debugging_left_behind() {
    let banned = ["dbg", "todo"].map(|name| format!("{name}!("));
    let test = |line: &str| banned.iter().find(|call| line.contains(*call)).map(|call| format!("{call}..)"));
    none(files().iter().filter(|file| file.is_rust()).flat_map(|file| file.findings(test)).collect());
}

#[test]
fn tests_say_nothing_that_is_not_shown() {
    // Of a test that passes, or that ends the process, the harness shows nothing that these write.
    let banned = ["eprintln", "eprint"].map(|name| format!("{name}!("));
    let found = |call: &String| format!("{call}..): not shown; see tests/src/not_tested.rs");
    let test = |line: &str| banned.iter().find(|call| line.contains(*call)).map(found);
    none(files().iter().filter(|file| file.is_rust() && file.is_test()).flat_map(|file| file.findings(test)).collect());
}

#[test]
fn every_module_says_what_it_is_for() {
    let ours = |file: &&File| {
        file.is_rust() && ["proto/", "iotlbd/", "client/", "tests/"].iter().any(|d| file.path.starts_with(d))
    };
    let silent = |file: &File| (!file.text.starts_with("//! ")).then(|| format!("{}: begins without `//!`", file.path));
    none(files().iter().filter(ours).filter_map(silent).collect());
}

#[test]
fn files_hold_one_noun() {
    let files = files();
    let mut findings = Vec::new();
    for file in files.iter().filter(|file| file.is_rust()) {
        let lines = file.text.lines().count();
        let excused = LONG_FILES.iter().any(|(path, _)| *path == file.path);
        let allowed = if file.is_test() { TEST_FILE_MAX } else { FILE_MAX };
        if lines > allowed && !excused {
            findings.push(format!("{}: {lines} lines, {allowed} are allowed: split it", file.path));
        }
        if lines <= allowed && excused {
            findings.push(format!("{}: is short now: take it out of LONG_FILES", file.path));
        }
    }
    for (path, _) in LONG_FILES.iter().filter(|(path, _)| !files.iter().any(|file| file.path == *path)) {
        findings.push(format!("{path}: is gone: take it out of LONG_FILES"));
    }
    none(findings);
}

#[test]
fn atomics_come_from_the_shim() {
    // Written in two parts so that this file does not find itself.
    let banned = ["std::sync", "core::sync"].map(|path| format!("{path}::atomic"));
    let test = |line: &str| banned.iter().find(|path| line.contains(*path)).cloned();
    let elsewhere = |file: &&File| file.is_rust() && file.path != ATOMICS_HOME;
    none(files().iter().filter(elsewhere).flat_map(|file| file.findings(test)).collect());
}

#[test]
fn no_word_of_somebodys_machine() {
    // Written in parts for the same reason. A home directory or a build tree of one machine helps nobody on another.
    let banned = [["/ro", "ot/"].concat(), ["/wo", "rk/"].concat(), ["/ho", "me/"].concat()];
    let test = |line: &str| banned.iter().find(|path| line.contains(*path)).cloned();
    // Names of crates and addresses of where they came from are cargo's, not ours.
    let ours = |file: &&File| file.path != "Cargo.lock";
    none(files().iter().filter(ours).flat_map(|file| file.findings(test)).collect());
}

#[test]
fn links_between_documents_lead_somewhere() {
    let root = root();
    let mut findings = Vec::new();
    for file in files().iter().filter(|file| file.path.ends_with(".md")) {
        let directory = root.join(&file.path).parent().expect("a file has a directory").to_owned();
        findings.extend(file.findings(|line| {
            let broken = |target: &&str| !directory.join(target.split('#').next().unwrap_or_default()).exists();
            relative_links(line).into_iter().find(broken).map(|target| format!("no {target}"))
        }));
    }
    none(findings);
}

/// Targets of `[text](target)` that are paths.
fn relative_links(line: &str) -> Vec<&str> {
    let targets = line.split("](").skip(1).filter_map(|rest| rest.split(')').next());
    targets
        .filter(|target| !target.contains("://") && !target.starts_with('#') && !target.starts_with("mailto:"))
        .collect()
}

#[test]
fn every_integration_test_is_run() {
    let files = files();
    let output = Command::new("bash").args(["tests/run", "--tests"]).current_dir(root()).output().expect("bash runs");
    assert!(output.status.success(), "tests/run --tests: {}", String::from_utf8_lossy(&output.stderr));
    let listed = String::from_utf8(output.stdout).expect("our file names are ASCII");
    let script = files.iter().find(|file| file.path == "tests/run").expect("it is tracked");
    let own = with_a_section(&script.text);
    let is_crate = |folder: &str| files.iter().any(|file| file.path.strip_suffix("/Cargo.toml") == Some(folder));
    let names = files.iter().filter_map(|file| {
        let (folder, name) = integration_test(&file.path)?;
        is_crate(folder).then_some((file, name))
    });
    let runs = |name: &str| {
        listed.lines().any(|line| line == name)
            || own.iter().any(|own| own.strip_suffix('*').map_or(own == &name, |start| name.starts_with(start)))
    };
    let missing =
        |(file, name): (&File, &str)| (!runs(name)).then(|| format!("{}: no section of tests/run runs it", file.path));
    none(names.filter_map(missing).collect());
}

/// The crate's folder and the name of an integration test, if that is what this path is.
fn integration_test(path: &str) -> Option<(&str, &str)> {
    let (folder, file) = path.rsplit_once("/tests/")?;
    let name = file.strip_suffix("/main.rs").or_else(|| file.strip_suffix(".rs"))?;
    (!name.contains('/')).then_some((folder, name))
}

/// Names of integration tests, which may end with a star, that the script gives to cargo by themselves.
fn with_a_section(script: &str) -> Vec<&str> {
    let calls = script.lines().filter_map(|line| Some(line.split_once("cargo test ")?.1));
    let names = calls.flat_map(|call| call.split("--test ").skip(1)).filter_map(|rest| rest.split(' ').next());
    names.map(|name| name.trim_matches(['\'', ';'])).collect()
}

#[test]
fn the_rules_find_what_they_look_for() {
    assert!(untidy_line(&"x".repeat(LINE_MAX + 1)).is_some());
    assert!(untidy_line(&"x".repeat(LINE_MAX)).is_none());
    assert!(untidy_line("a\tb").is_some());
    assert!(untidy_line("a ").is_some());
    assert_eq!(relative_links("[a](b.md) [c](https://d) [e](#f) [g](h/i.svg#j)"), ["b.md", "h/i.svg#j"]);
    assert_eq!(integration_test("a/b/tests/c.rs"), Some(("a/b", "c")));
    assert_eq!(integration_test("a/tests/c/main.rs"), Some(("a", "c")));
    assert_eq!(integration_test("a/tests/c/mod.rs"), None);
    let script = "cargo clippy --test a\n cargo test --lib --test 'b_*' --test c\nd() { cargo test --test e; }";
    assert_eq!(with_a_section(script), ["b_*", "c", "e"]);
    let file = File { path: "x.rs".to_owned(), text: "good\nbad \n".to_owned() };
    assert_eq!(file.findings(untidy_line), ["x.rs:2: space at the end"]);
}
