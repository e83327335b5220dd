//! The header in the repository is the one that belongs to the sources.

use std::path::Path;

use iotlb_proto::control::message::NAME_MAX;
use iotlb_proto::layout::worker::{CELL_PAGES_MAX, SLOT_CAPACITY};

#[test]
fn the_header_is_made_of_these_sources() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let config = cbindgen::Config::from_file(root.join("cbindgen.toml")).expect("cbindgen.toml is read");
    let mut bytes = Vec::new();
    let bindings = cbindgen::Builder::new().with_crate(root).with_config(config).generate().expect("the sources parse");
    bindings.write(&mut bytes);
    let made = String::from_utf8(bytes).expect("a header is text");
    // What only Rust wants to know.
    let made = without_safety(&made);
    let path = root.join("include/iotlb.h");
    if std::env::var_os("IOTLB_WRITE_HEADER").is_some() {
        std::fs::write(&path, &made).expect("the header can be written");
    }
    let kept = std::fs::read_to_string(&path).expect("the header is there");
    assert!(
        kept == made,
        "include/iotlb.h is not of these sources: run IOTLB_WRITE_HEADER=1 cargo test -p iotlb-client-c --test header"
    );
}

#[test]
fn numbers_that_the_header_names_are_those_of_the_layout() {
    let header = include_str!("../include/iotlb.h");
    assert_eq!((CELL_PAGES_MAX, SLOT_CAPACITY, NAME_MAX), (17, 64, 64));
    assert!(header.contains("at most 17 pages") && header.contains("all 64 of this worker"));
    assert_eq!(header.matches("at most 64 bytes").count(), 2);
    let version =
        env!("CARGO_PKG_VERSION").split('.').fold(0, |sum, part| 100 * sum + part.parse::<u32>().expect("a number"));
    assert!(header.contains(&format!("#define IOTLB_VERSION {version}\n")), "{version}");
}

/// Leaves the `# Safety` sections out: what they ask of a caller is said once, at the top of the header.
fn without_safety(header: &str) -> String {
    let mut lines: Vec<&str> = Vec::new();
    let mut inside = false;
    for line in header.lines() {
        let comment = line.trim_start().strip_prefix("//");
        inside = comment.is_some_and(|text| inside || text.trim() == "# Safety");
        if inside {
            // The empty line before it belongs to it.
            if lines.last().is_some_and(|last| last.trim() == "//") {
                lines.pop();
            }
        } else {
            lines.push(line);
        }
    }
    lines.join("\n") + "\n"
}
