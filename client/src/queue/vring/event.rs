//! Event-index arithmetic (section 2.7.10).

/// Whether moving an index from `old` to `new` passes `event`: the other side asked to be told once the entry
/// `event` is there. All three are running 16-bit indexes.
#[must_use]
pub(super) fn passes(event: u16, new: u16, old: u16) -> bool {
    new.wrapping_sub(event).wrapping_sub(1) < new.wrapping_sub(old)
}

#[cfg(test)]
mod tests {
    use super::passes;

    #[test]
    fn told_exactly_when_the_event_lies_in_the_new_entries() {
        // Against the plain meaning, with indexes that do not wrap, shifted to every place they could wrap at.
        for shift in (0..=u16::MAX).step_by(257).chain([u16::MAX, u16::MAX - 1, 0x7fff, 0x8000]) {
            for old in 0..6u16 {
                for new in old..6 {
                    for event in 0..6 {
                        let plain = (old..new).contains(&event);
                        let wrapped =
                            passes(event.wrapping_add(shift), new.wrapping_add(shift), old.wrapping_add(shift));
                        assert_eq!(wrapped, plain, "event {event}, {old} to {new}, shifted by {shift}");
                    }
                }
            }
        }
    }
}
