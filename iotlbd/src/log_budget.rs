//! How much peers can make this process write into its log.

/// Bounds what hostile peers can write into the log: so many lines in so long a time.
#[derive(Debug, Default)]
pub(crate) struct LogBudget {
    since_ns: u64,
    written: u32,
}

impl LogBudget {
    const LINES: u32 = 10;
    const SPAN_NS: u64 = 10_000_000_000;

    /// Whether one more line may be written now.
    pub(crate) fn take(&mut self, now_ns: u64) -> bool {
        if now_ns.saturating_sub(self.since_ns) >= LogBudget::SPAN_NS {
            *self = LogBudget { since_ns: now_ns, written: 0 };
        }
        self.written = self.written.saturating_add(1);
        self.written <= LogBudget::LINES
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_log_budget_runs_out_and_comes_back() {
        let mut budget = LogBudget::default();
        let start = LogBudget::SPAN_NS * 5;
        assert_eq!((0..100).filter(|_| budget.take(start)).count(), 10);
        assert!(!budget.take(start + LogBudget::SPAN_NS - 1));
        assert!(budget.take(start + LogBudget::SPAN_NS));
    }
}
