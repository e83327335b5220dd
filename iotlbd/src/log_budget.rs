//! How much peers can make this process write into its log.

/// What a budget has for a line.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Taken {
    /// It may be written.
    Yes,
    /// It may not, and is the first of those.
    First,
    /// It may not.
    No,
}

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
        self.spend(now_ns) == Taken::Yes
    }

    /// As [`LogBudget::take`], and also tells which refusal is the first of a span.
    pub(crate) fn spend(&mut self, now_ns: u64) -> Taken {
        if now_ns.saturating_sub(self.since_ns) >= LogBudget::SPAN_NS {
            *self = LogBudget { since_ns: now_ns, written: 0 };
        }
        self.written = self.written.saturating_add(1);
        match self.written.cmp(&(LogBudget::LINES + 1)) {
            std::cmp::Ordering::Less => Taken::Yes,
            std::cmp::Ordering::Equal => Taken::First,
            std::cmp::Ordering::Greater => Taken::No,
        }
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
        let spent: Vec<Taken> = (0..11).map(|_| budget.spend(start + LogBudget::SPAN_NS)).collect();
        assert_eq!(spent[8..], [Taken::Yes, Taken::First, Taken::No]);
        let start = start + LogBudget::SPAN_NS;
        assert!(budget.take(start + LogBudget::SPAN_NS));
    }
}
