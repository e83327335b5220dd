//! What happens to a worker that holds a reply back.

use super::config::StallPolicy;

/// Between two reports once nothing is left to do but wait.
const REMIND_NS: u64 = 10_000_000_000;

const NS_PER_MS: u64 = 1_000_000;

/// One worker's way from "a reply waits for it" to its end.
///
/// Who lets go in time is left alone, until it has been told to give up guest memory. That order stands: a worker that
/// follows it leaves, so one that holds a reply again has not, however short it holds each.
#[derive(Debug, Default)]
pub(crate) struct Stall {
    holding: Option<Holding>,
}

#[derive(Debug)]
struct Holding {
    since_ns: u64,
    /// A reply waits now. `false` only when the worker was told to give up and let go.
    waited_for: bool,
    /// How many steps were taken.
    taken: Taken,
    /// When the last of them was.
    taken_ns: u64,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Taken {
    Nothing,
    Reported,
    Revoked,
    Killed,
    Reminded,
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
        let holding = self.holding.get_or_insert(Holding {
            since_ns: now_ns,
            waited_for: true,
            taken: Taken::Nothing,
            taken_ns: now_ns,
        });
        holding.waited_for = true;
        if now_ns < holding.next_ns(policy) {
            return None;
        }
        (holding.taken, holding.taken_ns) = (holding.taken.next(), now_ns);
        let step = match holding.taken {
            Taken::Nothing | Taken::Reported => Step::Report,
            Taken::Revoked => Step::Revoke,
            Taken::Killed => Step::Kill,
            Taken::Reminded => Step::Remind,
        };
        Some((step, now_ns.saturating_sub(holding.since_ns) / NS_PER_MS))
    }

    /// Nothing waits for it any more. Returns whether it had been reported.
    pub(crate) fn over(&mut self) -> bool {
        let Some(holding) = &mut self.holding else { return false };
        let was_reported = std::mem::take(&mut holding.waited_for) && holding.taken > Taken::Nothing;
        if holding.taken < Taken::Revoked {
            self.holding = None;
        }
        was_reported
    }

    /// When [`Stall::held`] has something to say next.
    pub(crate) fn deadline_ns(&self, policy: &StallPolicy) -> Option<u64> {
        self.holding.as_ref().filter(|holding| holding.waited_for).map(|holding| holding.next_ns(policy))
    }
}

impl Holding {
    /// When the next step is due. It waits for its time after the one before was taken, not after the wait began: who
    /// was stopped together with this process for a while has the time it was promised when both go on.
    fn next_ns(&self, policy: &StallPolicy) -> u64 {
        let between = |from_ms: u32, to_ms: u32| u64::from(to_ms.saturating_sub(from_ms)) * NS_PER_MS;
        let wait_ns = match self.taken {
            Taken::Nothing => between(0, policy.report_ms),
            Taken::Reported => between(policy.report_ms, policy.revoke_ms),
            Taken::Revoked => between(policy.revoke_ms, policy.kill_ms),
            Taken::Killed | Taken::Reminded => REMIND_NS,
        };
        self.taken_ns.saturating_add(wait_ns)
    }
}

impl Taken {
    fn next(self) -> Taken {
        match self {
            Taken::Nothing => Taken::Reported,
            Taken::Reported => Taken::Revoked,
            Taken::Revoked => Taken::Killed,
            Taken::Killed | Taken::Reminded => Taken::Reminded,
        }
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
    fn a_late_look_takes_one_step_and_the_next_has_its_time() {
        let mut stall = Stall::default();
        stall.held(0, &POLICY);
        let steps: Vec<Step> = std::iter::from_fn(|| stall.held(6000 * MS, &POLICY)).map(|(step, _)| step).collect();
        assert_eq!(steps, [Step::Report]);
        assert_eq!(stall.deadline_ns(&POLICY), Some(6900 * MS));
        assert_eq!(stall.held(6900 * MS, &POLICY), Some((Step::Revoke, 6900)));
        assert_eq!(stall.held(10_899 * MS, &POLICY), None);
        assert_eq!(stall.held(10_900 * MS, &POLICY), Some((Step::Kill, 10_900)));
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

    #[test]
    fn an_order_to_give_up_stands_when_the_hold_ends() {
        let mut stall = Stall::default();
        for now_ns in [0, 100 * MS, 1000 * MS] {
            stall.held(now_ns, &POLICY);
        }
        assert_eq!(stall.deadline_ns(&POLICY), Some(5000 * MS));
        assert!(stall.over());
        assert!(!stall.over(), "said once a hold");
        assert_eq!(stall.deadline_ns(&POLICY), None, "nobody waits");
        // Held again, and again in time.
        assert_eq!(stall.held(4000 * MS, &POLICY), None, "it was told");
        assert_eq!(stall.deadline_ns(&POLICY), Some(5000 * MS));
        assert!(stall.over());
        assert_eq!(stall.held(9000 * MS, &POLICY), Some((Step::Kill, 9000)));
        assert!(stall.over());
        assert_eq!(stall.held(9001 * MS, &POLICY), None, "killed once");
    }
}
