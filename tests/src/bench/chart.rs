//! A curve as SVG, on two logarithmic axes. Its colours follow the reader's light or dark setting.

use std::fmt::Write as _;

use super::report::Curve;

const WIDTH: f64 = 850.0;
const HEIGHT: f64 = 460.0;
const LEFT: f64 = 70.0;
const RIGHT: f64 = 260.0;
const TOP: f64 = 48.0;
const BOTTOM: f64 = 78.0;
/// Least distance of two labels at the ends of their lines.
const LABEL_STEP: f64 = 17.0;

/// Classes of the lines, in the order of the series; the first is ours. Plain colours: some viewers know
/// no variables.
const STYLE: &str = "\
text{font:13px sans-serif}.small{font-size:11px}.title{font-size:16px;font-weight:600}.grid{stroke-width:1}\
.line{fill:none;stroke-width:1.6}.line.s0{stroke-width:3}.s4{stroke-dasharray:5 4}.t0{font-weight:600}\
text{fill:#1f2328}.paper{fill:#ffffff}.grid{stroke:#d0d7de}\
.s0{stroke:#0969da}.s1{stroke:#bc4c00}.s2{stroke:#8250df}.s3{stroke:#1a7f37}.s4{stroke:#6e7781}\
.t0{fill:#0969da}.t1{fill:#bc4c00}.t2{fill:#8250df}.t3{fill:#1a7f37}.t4{fill:#6e7781}\
@media(prefers-color-scheme:dark){\
text{fill:#e6edf3}.paper{fill:#0d1117}.grid{stroke:#3d444d}\
.s0{stroke:#58a6ff}.s1{stroke:#f0883e}.s2{stroke:#bc8cff}.s3{stroke:#3fb950}.s4{stroke:#8b949e}\
.t0{fill:#58a6ff}.t1{fill:#f0883e}.t2{fill:#bc8cff}.t3{fill:#3fb950}.t4{fill:#8b949e}\
}";
/// Series that have a class of their own.
const CLASSES: usize = 5;

/// The chart, with `note` (the machine) below it.
#[must_use]
pub fn svg(curve: &Curve, note: &str) -> String {
    let points = || curve.series.iter().flat_map(|series| &series.points).filter(|point| point.1 > 0.0);
    let (mut x_min, mut x_max, mut y_min, mut y_max) = (f64::MAX, 1.0_f64, f64::MAX, f64::MIN_POSITIVE);
    for &(x, y) in points() {
        let x = x as f64;
        (x_min, x_max) = (x_min.min(x), x_max.max(x));
        (y_min, y_max) = (y_min.min(y), y_max.max(y));
    }
    let (low, high) = (y_min.log10().floor(), y_max.log10().ceil());
    let (first, last) = (x_min.log2().floor(), x_max.log2().ceil());
    let x_of = |x: f64| LEFT + (x.log2() - first) / (last - first).max(1.0) * (WIDTH - LEFT - RIGHT);
    let y_of = |y: f64| HEIGHT - BOTTOM - (y.log10() - low) / (high - low).max(1.0) * (HEIGHT - TOP - BOTTOM);
    let mut text = format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {WIDTH} {HEIGHT}\" role=\"img\">\n\
         <title>{0}, {1}</title>\n<style>{STYLE}</style>\n\
         <rect class=\"paper\" width=\"{WIDTH}\" height=\"{HEIGHT}\"/>\n\
         <text class=\"title\" x=\"{LEFT}\" y=\"26\">{0}: {1}</text>\n",
        escape(&curve.name),
        escape(&curve.y_name)
    );
    // Writing to a string cannot fail, here and below.
    for power in steps(low, high) {
        let (value, y) = (10_f64.powf(power), y_of(10_f64.powf(power)));
        let right = WIDTH - RIGHT;
        let _ = writeln!(text, "<path class=\"grid\" d=\"M{LEFT} {y:.1}H{right}\"/>");
        let _ = writeln!(text, "<text x=\"{:.1}\" y=\"{:.1}\" text-anchor=\"end\">{value}</text>", LEFT - 8.0, y + 4.0);
    }
    for power in steps(first, last).step_by(2) {
        let (x, bottom) = (x_of(2_f64.powf(power)), HEIGHT - BOTTOM);
        let _ = writeln!(text, "<path class=\"grid\" d=\"M{x:.1} {TOP}V{bottom}\"/>");
        let label = format!("<tspan>2</tspan><tspan class=\"small\" dy=\"-5\">{power}</tspan>");
        let _ = writeln!(text, "<text x=\"{x:.1}\" y=\"{:.1}\" text-anchor=\"middle\">{label}</text>", bottom + 20.0);
    }
    let middle = (LEFT + WIDTH - RIGHT) / 2.0;
    let x_name = escape(&curve.x_name);
    let _ = writeln!(text, "<text x=\"{middle}\" y=\"{}\" text-anchor=\"middle\">{x_name}</text>", HEIGHT - 36.0);
    // Two lines: the machine's name is long. The second begins behind the processor.
    let cut = note.rfind(')').map_or(note.len(), |at| at + 1);
    for (line, y) in [(&note[..cut], HEIGHT - 20.0), (note[cut..].trim_start_matches([',', ' ']), HEIGHT - 6.0)] {
        let _ = writeln!(text, "<text class=\"small\" x=\"12\" y=\"{y}\">{}</text>", escape(line));
    }
    let mut labels = Vec::new();
    for (n, series) in curve.series.iter().enumerate() {
        let class = n.min(CLASSES - 1);
        let mut path = String::new();
        for &(x, y) in series.points.iter().filter(|point| point.1 > 0.0) {
            let step = if path.is_empty() { 'M' } else { 'L' };
            let _ = write!(path, "{step}{:.1} {:.1}", x_of(x as f64), y_of(y));
        }
        let _ = writeln!(text, "<path class=\"line s{class}\" d=\"{path}\"/>");
        if let Some(&(_, y)) = series.points.last() {
            labels.push((y_of(y), class, escape(&series.name)));
        }
    }
    labels.sort_by(|one, other| one.0.total_cmp(&other.0));
    let mut free = 0.0_f64;
    for (y, class, name) in labels {
        let y = y.max(free);
        free = y + LABEL_STEP;
        let _ =
            writeln!(text, "<text class=\"t{class}\" x=\"{}\" y=\"{:.1}\">{name}</text>", WIDTH - RIGHT + 8.0, y + 4.0);
    }
    text + "</svg>\n"
}

/// Whole numbers from `low` to `high`.
fn steps(low: f64, high: f64) -> impl Iterator<Item = f64> {
    std::iter::successors(Some(low), |at| Some(at + 1.0)).take_while(move |at| *at <= high)
}

fn escape(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_series_has_a_line_and_a_label_and_nothing_is_left_unescaped() {
        let mut curve = Curve::new("a < b", "x", "ns");
        for (x, y) in [(64, 2.0), (1 << 20, 9.0)] {
            curve.add("ours", x, y);
            curve.add("theirs & others", x, y * 50.0);
        }
        let text = svg(&curve, "here");
        assert_eq!(text.matches("class=\"line ").count(), 2);
        assert!(text.contains("theirs &amp; others</text>") && text.contains("a &lt; b"));
        assert!(!text.contains("NaN") && !text.contains("inf"));
    }
}
