//! Random drivers: one that keeps the rules, and one that writes anything anywhere.

use proptest::prelude::*;

use super::*;

/// What happens between two tries of the device.
#[derive(Clone, Debug)]
enum Step {
    Post { buffers: Vec<(u64, u32, bool)>, indirect: bool },
    Serve { chains: usize, resolve: bool },
    Invalidate { page: u64 },
    InvalidateAll,
    OtherQueue,
    Successor,
}

fn step() -> impl Strategy<Value = Step> {
    let buffer = (0..DATA_PAGES * PAGE_SIZE - 9000, 1..9000_u32, any::<bool>());
    prop_oneof![
        4 => (prop::collection::vec(buffer, 1..5), any::<bool>())
            .prop_map(|(buffers, indirect)| Step::Post { buffers, indirect }),
        6 => (1..6_usize, any::<bool>()).prop_map(|(chains, resolve)| Step::Serve { chains, resolve }),
        2 => (0..DATA_PAGES).prop_map(|page| Step::Invalidate { page: DATA + page * PAGE_SIZE }),
        1 => prop::sample::select(vec![DESC, AVAIL, USED]).prop_map(|page| Step::Invalidate { page }),
        1 => Just(Step::InvalidateAll),
        1 => Just(Step::OtherQueue),
        1 => Just(Step::Successor),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 200, ..ProptestConfig::default() })]

    /// No chain is lost, served twice or out of order, whatever is invalidated between the tries, and each has the
    /// bytes that the driver gave it.
    #[test]
    fn every_chain_is_served_once_and_whole(start in any::<u16>(), steps in prop::collection::vec(step(), 1..60)) {
        let memory = memory(1);
        // Indirect tables live on pages of their own, here the last one before the data limit.
        let table_at = |n: u64| DATA + (DATA_PAGES - 2) * PAGE_SIZE + (n % 16) * 256;
        let pattern: Vec<u8> = (0..DATA_PAGES * PAGE_SIZE).map(|at| (at * 31 % 251) as u8).collect();
        memory.driver_write(DATA, &pattern);
        let mut driver = Driver::new(&memory, 16, DESC, AVAIL, USED, start);
        let mut ring = Vring::default();
        let mut expected = std::collections::VecDeque::new();
        let mut given_back = Vec::new();
        let mut posted = 0_u64;
        let drain = std::iter::repeat_n(Step::Serve { chains: 6, resolve: true }, 60);
        for step in steps.into_iter().chain(drain) {
            match step {
                Step::Post { buffers, indirect } => {
                    // Data of readable buffers is compared, so nobody writes there: written bytes are those that
                    // were there.
                    let mut list: Vec<_> = buffers
                        .iter()
                        .map(|&(at, len, writable)| {
                            Buffer { iova: DATA + at.min(12 * PAGE_SIZE - 9000), len, writable }
                        })
                        .collect();
                    list.sort_by_key(|buffer| buffer.writable);
                    let head = if indirect {
                        driver.post_indirect(table_at(posted), &list)
                    } else {
                        driver.post(&list)
                    };
                    if let Some(head) = head {
                        posted += 1;
                        expected.push_back((head, list));
                    }
                }
                Step::Invalidate { page } => memory.invalidate(page),
                Step::InvalidateAll => memory.invalidate_all(),
                Step::OtherQueue => memory.bump_queue(),
                Step::Successor => ring = Vring::default(),
                Step::Serve { chains, resolve } => {
                    let fault = (|| {
                        let mut burst = ring.begin(&memory, &driver.record, FEATURES)?;
                        for _ in 0..chains {
                            let Some(chain) = burst.next_chain()? else { break };
                            let (head, list) = expected.pop_front().expect("served before it was posted");
                            assert_eq!(chain.head(), head);
                            let bytes_of = |writable| -> Vec<u8> {
                                list.iter().filter(|buffer| buffer.writable == writable).flat_map(|buffer| {
                                    let from = usize::try_from(buffer.iova - DATA).expect("inside");
                                    pattern[from..from + buffer.len as usize].to_vec()
                                }).collect()
                            };
                            let readable = bytes_of(false);
                            let mut got = vec![0; readable.len() + 1];
                            assert_eq!(chain.read(0, &mut got), readable.len());
                            assert_eq!(&got[..readable.len()], &readable[..]);
                            let same = bytes_of(true);
                            assert_eq!(chain.write(0, &same), same.len());
                            assert_eq!(chain.writable_len(), same.len());
                            given_back.push((head, u32::try_from(same.len()).expect("bounded")));
                            burst.complete(chain, same.len());
                        }
                        Ok(())
                    })();
                    match fault {
                        Ok(()) => {}
                        Err(RingFault::Miss(set)) => {
                            prop_assert!(set.required > 0 && set.required <= set.misses.len());
                            if resolve {
                                prop_assert!(memory.resolve(&set));
                            }
                        }
                        Err(other) => panic!("an honest driver broke the ring: {other}"),
                    }
                    for done in driver.collect() {
                        prop_assert_eq!(Some(done), given_back.first().copied());
                        given_back.remove(0);
                    }
                }
            }
        }
        prop_assert!(expected.is_empty(), "chains were lost: {:?}", expected);
        prop_assert!(given_back.is_empty());
        prop_assert_eq!(&memory.driver_read(DATA, 12 * 4096)[..], &pattern[..12 * 4096]);
        prop_assert!(memory.guard_page_is_intact());
    }

    /// Rings full of nonsense: no panic, no endless walk, and nothing outside what the front-end gave is touched.
    #[test]
    fn nonsense_never_gets_out_of_bounds(
        size in prop_oneof![4 => prop::sample::select(vec![1_u16, 2, 4, 16, 256]), 1 => any::<u16>()],
        moves in (0..64_u64, 0..64_u64, 0..64_u64),
        features in any::<u64>(),
        descriptors in prop::collection::vec(
            (prop_oneof![
                4 => 0..DATA_PAGES * PAGE_SIZE,
                1 => any::<u64>()
            ], prop_oneof![4 => 0..5000_u32, 1 => any::<u32>()], 0..8_u16, 0..20_u16), 0..64),
        heads in prop::collection::vec(prop_oneof![4 => 0..16_u16, 1 => any::<u16>()], 0..16),
        jump in prop_oneof![3 => Just(0_u16), 1 => any::<u16>()],
        used in any::<u16>(),
        holes in prop::collection::vec(0..DATA_PAGES, 0..6),
    ) {
        let memory = memory(1);
        memory.resolve_everything();
        let mut driver = driver(&memory, 16);
        for (index, &(at, len, flags, next)) in (0..).zip(&descriptors) {
            // The same entries serve as the descriptor table and as an indirect table.
            driver.write_descriptor(index, DATA.wrapping_add(at), len, flags, next);
            driver.write_descriptor_at(DATA, index, DATA.wrapping_add(at), len, flags, next);
        }
        for head in heads {
            driver.post_head(head);
        }
        driver.set_avail_idx(driver.avail_idx.wrapping_add(jump).wrapping_add(used));
        memory.driver_write(USED + 2, &used.to_le_bytes());
        for page in holes {
            memory.invalidate(DATA + page * PAGE_SIZE);
        }
        let record = QueueRecord {
            size,
            desc: DESC + (moves.0 / 32) * 16,
            avail: AVAIL + moves.1 / 16,
            used: USED + (moves.2 / 16) * 2,
            ..driver.record
        };
        let mut ring = Vring::default();
        // Each round either serves a chain, or asks for pages once, or ends it: twice the ring size is plenty.
        for _ in 0..2 * 256 + 10 {
            let outcome = ring.begin(&memory, &record, features).and_then(|mut burst| {
                let Some(chain) = burst.next_chain()? else { return Ok(false) };
                let mut bounce = vec![0; 300 * 1024];
                let read = chain.read(0, &mut bounce);
                assert_eq!(read, chain.readable_len());
                assert_eq!(chain.write(0, &bounce), chain.writable_len());
                burst.complete(chain, usize::MAX);
                let _ = burst.publish();
                burst.enable_kick()
            });
            match outcome {
                Ok(_) => {}
                Err(RingFault::Miss(set)) => {
                    if !memory.resolve(&set) {
                        let rejected = ring.begin(&memory, &record, features).and_then(|mut b| b.reject_next());
                        if rejected.is_err() {
                            break;
                        }
                    }
                }
                Err(RingFault::Broken(_)) => break,
                Err(other) => panic!("{other}"),
            }
        }
        prop_assert!(memory.guard_page_is_intact());
    }
}
