//! What happens to a worker that holds a reply back.

use super::config::StallPolicy;

/// Between two reports once nothing is left to do but wait.
const REMIND_NS: u64 = 10_000_000_000;

const NS_PER_MS: u64 = 1_000_000;

/// One worker's way from "a reply waits for it" to its end.
#[derive(Debug, Default)]
pub(crate) struct Stall {
    holding: Option<Holding>,
}

#[derive(Debug)]
struct Holding {
    since_ns: u64,
    /// How many steps were taken.
    taken: Taken,
    remind_ns: u64,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Taken {
    Nothing,
    Reported,
    Revoked,
    Killed,
}

/// The next step to take.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Step {
    /// Say so.
    Report,
    /// Tell it to give up guest memory.
    Revoke,
    /// Kill it.
    Kill,
    /// Say that the reply is still held.
    Remind,
}

impl Stall {
    /// A reply waits for this worker. Returns the step that is due; call again until there is none. With the time it
    /// has held the reply for, in ms.
    pub(crate) fn held(&mut self, now_ns: u64, policy: &StallPolicy) -> Option<(Step, u64)> {
        let holding =
            self.holding.get_or_insert(Holding { since_ns: now_ns, taken: Taken::Nothing, remind_ns: u64::MAX });
        let held_ns = now_ns.saturating_sub(holding.since_ns);
        let due = |ms: u32| held_ns >= u64::from(ms) * NS_PER_MS;
        let step = match holding.taken {
            Taken::Nothing if due(policy.report_ms) => (Taken::Reported, Step::Report),
            Taken::Reported if due(policy.revoke_ms) => (Taken::Revoked, Step::Revoke),
            Taken::Revoked if due(policy.kill_ms) => (Taken::Killed, Step::Kill),
            Taken::Killed if now_ns >= holding.remind_ns => (Taken::Killed, Step::Remind),
            _ => return None,
        };
        holding.taken = step.0;
        if step.0 == Taken::Killed {
            holding.remind_ns = now_ns.saturating_add(REMIND_NS);
        }
        Some((step.1, held_ns / NS_PER_MS))
    }

    /// Nothing waits for it any more. Returns whether it had been reported.
    pub(crate) fn over(&mut self) -> bool {
        self.holding.take().is_some_and(|holding| holding.taken > Taken::Nothing)
    }

    /// When [`Stall::held`] has something to say next.
    pub(crate) fn deadline_ns(&self, policy: &StallPolicy) -> Option<u64> {
        let holding = self.holding.as_ref()?;
        let after = |ms: u32| holding.since_ns.saturating_add(u64::from(ms) * NS_PER_MS);
        Some(match holding.taken {
            Taken::Nothing => after(policy.report_ms),
            Taken::Reported => after(policy.revoke_ms),
            Taken::Revoked => after(policy.kill_ms),
            Taken::Killed => holding.remind_ns,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const POLICY: StallPolicy = StallPolicy { report_ms: 100, revoke_ms: 1000, kill_ms: 5000 };
    const MS: u64 = NS_PER_MS;

    #[test]
    fn each_step_once_and_in_order() {
        let mut stall = Stall::default();
        assert_eq!(stall.held(10 * MS, &POLICY), None);
        assert_eq!(stall.deadline_ns(&POLICY), Some(110 * MS));
        assert_eq!(stall.held(109 * MS, &POLICY), None);
        assert_eq!(stall.held(110 * MS, &POLICY), Some((Step::Report, 100)));
        assert_eq!(stall.held(110 * MS, &POLICY), None);
        assert_eq!(stall.deadline_ns(&POLICY), Some(1010 * MS));
        assert_eq!(stall.held(1010 * MS, &POLICY), Some((Step::Revoke, 1000)));
        assert_eq!(stall.held(5010 * MS, &POLICY), Some((Step::Kill, 5000)));
        assert_eq!(stall.held(5011 * MS, &POLICY), None);
        assert_eq!(stall.held(15_010 * MS, &POLICY), Some((Step::Remind, 15_000)));
        assert_eq!(stall.held(15_011 * MS, &POLICY), None);
        assert!(stall.over());
    }

    #[test]
    fn a_late_look_takes_all_steps_that_are_due() {
        let mut stall = Stall::default();
        stall.held(0, &POLICY);
        let steps: Vec<Step> = std::iter::from_fn(|| stall.held(6000 * MS, &POLICY)).map(|(step, _)| step).collect();
        assert_eq!(steps, [Step::Report, Step::Revoke, Step::Kill]);
    }

    #[test]
    fn an_end_starts_the_clock_anew() {
        let mut stall = Stall::default();
        stall.held(0, &POLICY);
        assert!(!stall.over());
        assert_eq!(stall.deadline_ns(&POLICY), None);
        assert_eq!(stall.held(200 * MS, &POLICY), None);
        assert_eq!(stall.deadline_ns(&POLICY), Some(300 * MS));
    }
}
