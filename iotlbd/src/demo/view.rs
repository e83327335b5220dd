//! The live view: one screen that fits 80 by 24.

use std::time::Duration;

use ratatui::Frame;
use ratatui::layout::{Constraint, Layout, Rect};
use ratatui::style::{Color, Modifier, Style};
use ratatui::text::{Line, Span};
use ratatui::widgets::{Block, Paragraph, Row, Sparkline, Table};

use super::load::Phase;
use super::report::{Percentiles, count, nanoseconds, percent};

/// What is shown; taken from counters, no widget knows where from.
#[derive(Clone, Debug)]
pub struct Snapshot {
    /// Since the workers started.
    pub elapsed: Duration,
    /// When the demo ends by itself.
    pub total: Duration,
    /// How the guest unmaps.
    pub phase: Phase,
    /// Per second, all workers.
    pub lookups: u64,
    /// Per second, all workers.
    pub hits: u64,
    /// Per second, all workers.
    pub misses: u64,
    /// Per second.
    pub updates: u64,
    /// Per second.
    pub invalidations: u64,
    /// Since the start.
    pub stale_reads: u64,
    /// From INVALIDATE to acknowledgement, since the start.
    pub drain_ns: Percentiles,
    /// From a worker's question to its answer, since the start.
    pub miss_ns: Percentiles,
    /// Lookups per second in the past, oldest first.
    pub history: Vec<u64>,
    /// One row a worker.
    pub workers: Vec<WorkerRow>,
}

/// A worker's row.
#[derive(Clone, Debug)]
pub struct WorkerRow {
    /// Its name.
    pub name: String,
    /// Its process number.
    pub pid: u32,
    /// Per second.
    pub lookups: u64,
    /// Per second.
    pub hits: u64,
    /// Per second.
    pub misses: u64,
    /// Since the start.
    pub denied: u64,
    /// Since the start.
    pub stale_reads: u64,
}

/// Colours, or none where `NO_COLOR` is set.
#[derive(Clone, Copy, Debug)]
pub struct Theme {
    colours: bool,
}

impl Theme {
    /// With or without colours.
    #[must_use]
    pub fn new(colours: bool) -> Theme {
        Theme { colours }
    }

    /// As the environment asks: <https://no-color.org>.
    #[must_use]
    pub fn from_environment() -> Theme {
        Theme::new(std::env::var_os("NO_COLOR").is_none_or(|value| value.is_empty()))
    }

    fn colour(self, colour: Color) -> Style {
        if self.colours { Style::new().fg(colour) } else { Style::new() }
    }

    fn verdict(self, stale_reads: u64) -> Style {
        let colour = if stale_reads == 0 { Color::Green } else { Color::Red };
        self.colour(colour).add_modifier(Modifier::BOLD)
    }
}

/// Draws everything.
pub fn draw(frame: &mut Frame<'_>, snapshot: &Snapshot, theme: Theme) {
    let rows = u16::try_from(snapshot.workers.len()).unwrap_or(u16::MAX).saturating_add(3);
    let [title, figures, history, workers, footer] = Layout::vertical([
        Constraint::Length(1),
        Constraint::Length(8),
        Constraint::Min(4),
        Constraint::Length(rows.min(9)),
        Constraint::Length(1),
    ])
    .areas(frame.area());
    draw_title(frame, title, snapshot, theme);
    draw_figures(frame, figures, snapshot, theme);
    let bars = Sparkline::default()
        .block(Block::bordered().title(" lookups a second "))
        .data(newest(&snapshot.history, history.width.saturating_sub(2)))
        .style(theme.colour(Color::Cyan));
    frame.render_widget(bars, history);
    draw_workers(frame, workers, snapshot, theme);
    frame.render_widget(Paragraph::new(" q or Ctrl-C ends the demo"), footer);
}

/// One line for a log, where there is no terminal.
#[must_use]
pub fn plain(snapshot: &Snapshot) -> String {
    format!(
        "{:>3} s  {} lookups/s, hits {}, {} misses/s, {} invalidations/s, drain p99 {}, miss p99 {}, stale reads {}",
        snapshot.elapsed.as_secs(),
        count(snapshot.lookups),
        percent(snapshot.hits, snapshot.lookups),
        count(snapshot.misses),
        count(snapshot.invalidations),
        nanoseconds(snapshot.drain_ns.p99),
        nanoseconds(snapshot.miss_ns.p99),
        count(snapshot.stale_reads),
    )
}

fn draw_title(frame: &mut Frame<'_>, area: Rect, snapshot: &Snapshot, theme: Theme) {
    let phase = match snapshot.phase {
        Phase::Strict => "strict: each page is invalidated at once",
        Phase::Lazy => "lazy: unmapped pages are flushed together",
    };
    let line = Line::from(vec![
        Span::styled(" iotlbd demo ", theme.colour(Color::Cyan).add_modifier(Modifier::BOLD)),
        Span::raw(format!(" {:>3} of {} s   ", snapshot.elapsed.as_secs(), snapshot.total.as_secs())),
        Span::raw(phase),
    ]);
    frame.render_widget(Paragraph::new(line), area);
}

fn draw_figures(frame: &mut Frame<'_>, area: Rect, snapshot: &Snapshot, theme: Theme) {
    let [left, right] = Layout::horizontal([Constraint::Fill(1), Constraint::Fill(1)]).areas(area);
    let bold = Style::new().add_modifier(Modifier::BOLD);
    let figure = |name: &'static str, value: String, style: Style| {
        Line::from(vec![Span::raw(format!(" {name:<18}")), Span::styled(format!("{value:>16}"), style)])
    };
    let rates = vec![
        figure("lookups/s", count(snapshot.lookups), bold),
        figure("hit ratio", percent(snapshot.hits, snapshot.lookups), bold),
        figure("misses/s", count(snapshot.misses), bold),
        figure("updates/s", count(snapshot.updates), bold),
        figure("invalidations/s", count(snapshot.invalidations), bold),
    ];
    frame.render_widget(Paragraph::new(rates).block(Block::bordered().title(" traffic ")), left);
    let latencies = vec![
        figure("drain p50", nanoseconds(snapshot.drain_ns.p50), bold),
        figure("drain p99", nanoseconds(snapshot.drain_ns.p99), bold),
        figure("miss p50", nanoseconds(snapshot.miss_ns.p50), bold),
        figure("miss p99", nanoseconds(snapshot.miss_ns.p99), bold),
        Line::default(),
        figure("stale reads", count(snapshot.stale_reads), theme.verdict(snapshot.stale_reads)),
    ];
    frame.render_widget(Paragraph::new(latencies).block(Block::bordered().title(" latency ")), right);
}

fn draw_workers(frame: &mut Frame<'_>, area: Rect, snapshot: &Snapshot, theme: Theme) {
    let names = ["pid", "lookups/s", "hit ratio", "misses/s", "denied", "stale"].map(str::to_owned);
    let header = row("worker".to_owned(), names).style(Style::new().add_modifier(Modifier::BOLD));
    let rows = snapshot.workers.iter().map(|worker| {
        let figures = [
            worker.pid.to_string(),
            count(worker.lookups),
            percent(worker.hits, worker.lookups),
            count(worker.misses),
            count(worker.denied),
            count(worker.stale_reads),
        ];
        let row = row(worker.name.clone(), figures);
        if worker.stale_reads == 0 { row } else { row.style(theme.verdict(worker.stale_reads)) }
    });
    let widths = [
        Constraint::Min(10),
        Constraint::Length(8),
        Constraint::Length(13),
        Constraint::Length(10),
        Constraint::Length(10),
        Constraint::Length(10),
        Constraint::Length(7),
    ];
    let title = format!(" {} worker processes ", snapshot.workers.len());
    frame.render_widget(Table::new(rows, widths).header(header).block(Block::bordered().title(title)), area);
}

/// A name on the left, figures on the right of their columns.
fn row(name: String, figures: [String; 6]) -> Row<'static> {
    let figures = figures.into_iter().map(|text| Line::from(text).right_aligned());
    Row::new(std::iter::once(Line::from(name)).chain(figures))
}

fn newest(history: &[u64], width: u16) -> &[u64] {
    &history[history.len().saturating_sub(usize::from(width))..]
}

#[cfg(test)]
mod tests {
    use ratatui::Terminal;
    use ratatui::backend::TestBackend;

    use super::*;

    fn snapshot() -> Snapshot {
        let worker = |number: u32, stale_reads| WorkerRow {
            name: format!("worker-{number}"),
            pid: 4000 + number,
            lookups: 12_345_678,
            hits: 12_340_000,
            misses: 5_678,
            denied: 12,
            stale_reads,
        };
        Snapshot {
            elapsed: Duration::from_millis(3_400),
            total: Duration::from_secs(10),
            phase: Phase::Lazy,
            lookups: 24_691_356,
            hits: 24_680_000,
            misses: 11_356,
            updates: 5_000,
            invalidations: 2_500,
            stale_reads: 0,
            drain_ns: Percentiles { p50: 45_000, p99: 1_200_000 },
            miss_ns: Percentiles { p50: 80_000, p99: 2_300_000 },
            history: vec![0, 4, 8, 4],
            workers: vec![worker(0, 0), worker(1, 0)],
        }
    }

    fn screen(snapshot: &Snapshot, theme: Theme, width: u16, height: u16) -> Terminal<TestBackend> {
        let mut terminal = Terminal::new(TestBackend::new(width, height)).expect("memory only");
        terminal.draw(|frame| draw(frame, snapshot, theme)).expect("memory only");
        terminal
    }

    #[test]
    fn everything_fits_80_by_24() {
        let terminal = screen(&snapshot(), Theme::new(true), 80, 24);
        let cells = terminal.backend().buffer().content();
        let text: Vec<String> = cells
            .chunks(80)
            .map(|row| row.iter().map(ratatui::buffer::Cell::symbol).collect::<String>().trim_end().to_owned())
            .collect();
        assert_eq!(
            text.join("\n"),
            include_str!("view_80x24.txt").trim_end(),
            "the screen is now:\n{}",
            text.join("\n")
        );
    }

    #[test]
    fn no_color_means_none() {
        let mut broken = snapshot();
        broken.stale_reads = 3;
        broken.workers[1].stale_reads = 3;
        let coloured = |theme| {
            let terminal = screen(&broken, theme, 80, 24);
            terminal.backend().buffer().content().iter().any(|cell| cell.fg != Color::Reset)
        };
        assert!(coloured(Theme::new(true)));
        assert!(!coloured(Theme::new(false)));
    }

    #[test]
    fn odd_sizes_do_not_panic() {
        let mut many = snapshot();
        many.workers = (0..40).map(|_| many.workers[0].clone()).collect();
        many.history = vec![u64::MAX; 500];
        for (width, height) in [(1, 1), (20, 5), (80, 24), (200, 80)] {
            screen(&many, Theme::new(true), width, height);
        }
    }

    #[test]
    fn plain_lines_say_the_same() {
        assert_eq!(
            plain(&snapshot()),
            "  3 s  24,691,356 lookups/s, hits 99.95 %, 11,356 misses/s, 2,500 invalidations/s, drain p99 1.2 ms, \
             miss p99 2.3 ms, stale reads 0"
        );
    }
}
