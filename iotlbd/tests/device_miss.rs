//! The device and what is missing: who is asked, who hears of it, and what becomes of a refusal.

mod harness;

use harness::{AVAIL, Bench, DESC, MIB, ROOMY, RW, USED, USER, bench, channel, memfd, region, started, table_of};
use iotlb_proto::access::Access;
use iotlb_proto::vhost_user::features::{protocol, virtio};
use iotlb_proto::vhost_user::{IotlbKind, IotlbMessage, Request};
use iotlb_proto::worker::Answer;
use iotlbd::device::{DeviceConfig, Event, WorkerId};

#[test]
fn misses_for_one_page_share_a_message_and_an_update_answers_all() {
    let (mut bench, _fd) = started();
    for worker in 0..3 {
        bench.miss(worker, 0, 1, 0x9000 + u64::from(worker) * 16, 16, Access::READ);
    }
    assert_eq!(bench.messages().len(), 1);
    assert_eq!(bench.update(0x9000, 4096, USER, RW), 0);
    let all = [(0, 0, 1, Answer::Resolved), (1, 0, 1, Answer::Resolved), (2, 0, 1, Answer::Resolved)];
    assert_eq!(bench.answers(), all);
    bench.event(Event::MissReply { value: 0 });
    assert_eq!((bench.answers(), bench.messages()), (vec![], vec![]));
}

#[test]
fn a_range_is_asked_for_page_by_page_without_waiting() {
    let (mut bench, _fd) = started();
    bench.miss(0, 0, 1, 0x9ff0, 0x1020, RW);
    let pages: Vec<u64> = bench.messages().iter().map(|(m, _)| m.iova).collect();
    assert_eq!(pages, [0x9000, 0xa000, 0xb000]);
    assert_eq!(bench.update(0xb000, 4096, USER, RW), 0);
    assert_eq!(bench.update(0x9000, 4096, USER, RW), 0);
    assert_eq!(bench.answers(), []);
    assert_eq!(bench.update(0xa000, 4096, USER, RW), 0);
    assert_eq!(bench.answers(), [(0, 0, 1, Answer::Resolved)]);
}

#[test]
fn a_page_lost_meanwhile_is_left_to_the_worker() {
    let (mut bench, _fd) = started();
    bench.miss(0, 0, 1, 0x9000, 0x2000, RW);
    assert_eq!(bench.messages().len(), 2);
    assert_eq!(bench.update(0x9000, 4096, USER, RW), 0);
    assert_eq!(bench.invalidate(0x9000, 4096), 0);
    assert_eq!(bench.update(0xa000, 4096, USER, RW), 0);
    assert_eq!(bench.answers(), [(0, 0, 1, Answer::Resolved)], "it looks again, and asks for what it still needs");
    assert_eq!(bench.messages(), [], "the guest may have unmapped the page: a miss would be a fault in its log");
}

#[test]
fn a_denial_is_confirmed_by_one_more_miss() {
    let (mut bench, _fd) = started();
    bench.miss(0, 0, 1, 0x9000, 16, RW);
    assert_eq!(bench.messages().len(), 1);
    bench.event(Event::MissReply { value: 1 });
    assert_eq!((bench.answers(), bench.messages().len()), (vec![], 1));
    bench.event(Event::MissReply { value: 1 });
    assert_eq!((bench.answers(), bench.messages().len()), (vec![(0, 0, 1, Answer::Denied)], 0));
}

#[test]
fn a_refusal_of_writing_does_not_deny_reading() {
    let (mut bench, _fd) = started();
    let wanted = |bench: &mut Bench| bench.messages().iter().map(|(m, _)| m.access).collect::<Vec<_>>();
    bench.miss(0, 0, 1, 0x9000, 16, Access::READ);
    bench.miss(1, 0, 1, 0x9000, 16, Access::WRITE);
    assert_eq!(wanted(&mut bench), [Access::READ]);
    bench.event(Event::MissReply { value: 1 });
    // Asked together they are refused, which says nothing about either.
    assert_eq!(wanted(&mut bench), [RW]);
    bench.event(Event::MissReply { value: 1 });
    assert_eq!(wanted(&mut bench), [Access::READ]);
    assert_eq!(bench.update(0x9000, 4096, USER, Access::READ), 0);
    assert_eq!(bench.answers(), [(0, 0, 1, Answer::Resolved)]);
    bench.event(Event::MissReply { value: 0 });
    for _ in 0..2 {
        assert_eq!(bench.answers(), []);
        assert_eq!(wanted(&mut bench), [Access::WRITE]);
        bench.event(Event::MissReply { value: 1 });
    }
    assert_eq!(bench.answers(), [(1, 0, 1, Answer::Denied)]);
}

#[test]
fn done_without_a_translation_is_a_denial_after_a_few_tries() {
    let (mut bench, _fd) = started();
    bench.miss(0, 0, 1, 0x9000, 16, RW);
    // The guest maps the page between two tries: then it is there with the next.
    bench.miss(0, 1, 2, 0xb000, 16, RW);
    let mut sent = Vec::new();
    loop {
        let messages = bench.messages();
        if messages.is_empty() {
            break;
        }
        for (message, need_reply) in messages {
            if message.iova == 0xb000 && sent.iter().filter(|iova| **iova == 0xb000).count() == 3 {
                assert_eq!(bench.update(0xb000, 4096, USER, RW), 0);
            }
            sent.push(message.iova);
            if need_reply {
                bench.event(Event::MissReply { value: 0 });
            }
        }
    }
    let tries = |page| sent.iter().filter(|iova| **iova == page).count();
    assert_eq!((tries(0x9000), tries(0xb000)), (4, 4));
    let mut answers = bench.answers();
    answers.sort_by_key(|(_, cell, ..)| *cell);
    assert_eq!(answers, [(0, 0, 1, Answer::Denied), (0, 1, 2, Answer::Resolved)]);
}

#[test]
fn nobody_is_denied_what_another_one_was_asked_for() {
    let (mut bench, _fd) = started();
    // Parts of one page, of which the front-end has the last. The first is on its way when the others come.
    bench.miss(0, 0, 1, 0x9100, 16, RW);
    bench.miss(0, 1, 2, 0x9300, 16, RW);
    bench.miss(1, 0, 3, 0x9800, 16, RW);
    let mut answers = Vec::new();
    loop {
        let messages = bench.messages();
        if messages.is_empty() {
            break;
        }
        for (message, need_reply) in messages {
            if message.iova == 0x9800 {
                assert_eq!(bench.update(0x9800, 16, USER + 0x800, RW), 0);
            }
            if need_reply {
                bench.event(Event::MissReply { value: 0 });
            }
        }
        answers.extend(bench.answers());
    }
    assert_eq!(answers, [(0, 0, 1, Answer::Denied), (0, 1, 2, Answer::Denied), (1, 0, 3, Answer::Resolved)]);
}

#[test]
fn a_permission_that_stays_missing_is_reported_and_denied() {
    let (mut bench, _fd) = started();
    assert_eq!(bench.update(0x9000, 4096, USER, Access::READ), 0);
    bench.miss(0, 0, 1, 0x9010, 16, RW);
    let mut failures = Vec::new();
    for _ in 0..4 {
        failures = bench.messages();
        bench.event(Event::MissReply { value: 0 });
    }
    assert!(failures.iter().all(|(m, _)| m.kind == IotlbKind::Miss));
    let last = bench.messages();
    assert_eq!(last.iter().map(|(m, need)| (m.kind, *need)).collect::<Vec<_>>(), [(IotlbKind::AccessFail, false)]);
    assert_eq!(bench.answers(), [(0, 0, 1, Answer::Denied)]);
}

#[test]
fn a_wider_want_upgrades_the_page() {
    let (mut bench, _fd) = started();
    bench.miss(0, 0, 1, 0x9000, 16, Access::READ);
    bench.miss(1, 0, 1, 0x9000, 16, RW);
    assert_eq!(bench.messages().len(), 1);
    assert_eq!(bench.update(0x9000, 4096, USER, Access::READ), 0);
    assert_eq!(bench.answers(), [(0, 0, 1, Answer::Resolved)]);
    bench.event(Event::MissReply { value: 0 });
    let upgraded = bench.messages();
    assert_eq!(upgraded.iter().map(|(m, _)| m.access).collect::<Vec<_>>(), [RW]);
    assert_eq!(bench.update(0x9000, 4096, USER, RW), 0);
    assert_eq!(bench.answers(), [(1, 0, 1, Answer::Resolved)]);
}

#[test]
fn time_runs_out_but_the_reply_keeps_its_place() {
    let (mut bench, _fd) = started();
    bench.miss(0, 0, 1, 0x9000, 16, RW);
    bench.miss(0, 1, 2, 0xa000, 16, RW);
    bench.messages();
    bench.now_ns = bench.device.next_deadline_ns().expect("a deadline");
    bench.event(Event::Tick);
    assert_eq!(bench.answers(), [(0, 0, 1, Answer::TimedOut), (0, 1, 2, Answer::TimedOut)]);
    assert_eq!(bench.device.next_deadline_ns(), None);
    bench.miss(0, 0, 3, 0xb000, 16, RW);
    assert_eq!(bench.messages().len(), 1);
    // Two late replies, which are not about the third page.
    bench.event(Event::MissReply { value: 1 });
    bench.event(Event::MissReply { value: 1 });
    assert_eq!((bench.answers(), bench.messages()), (vec![], vec![]));
    bench.event(Event::MissReply { value: 1 });
    assert_eq!(bench.messages().len(), 1);
}

#[test]
fn messages_in_flight_are_bounded_and_workers_take_turns() {
    let (mut bench, _fd) = started();
    for cell in 0..100 {
        bench.miss(0, cell, 1, 0x100_0000 + u64::from(cell) * 0x1_0000, 16, RW);
    }
    bench.miss(1, 0, 1, 0x5000_0000, 16, RW);
    assert_eq!(bench.messages().len(), 64);
    // The second worker is not behind the rest of the first.
    bench.event(Event::MissReply { value: 1 });
    bench.event(Event::MissReply { value: 1 });
    assert!(bench.messages().iter().any(|(m, _)| m.iova == 0x5000_0000));
}

#[test]
fn a_cell_posted_again_drops_what_it_held() {
    let (mut bench, _fd) = started();
    for ticket in 0..10_000 {
        bench.miss(0, 0, ticket, 0x100_0000 + u64::from(ticket) * 0x1_0000, 16 * 4096, RW);
    }
    assert_eq!(bench.device.misses_waiting(), 1);
    assert_eq!(bench.answers(), []);
    bench.miss(0, 256, 1, 0x9000, 16, RW);
    bench.miss(0, 1, 1, 0x9000, 18 * 4096, RW);
    bench.miss(0, 2, 1, 0x9000, 16, Access::NONE);
    assert!(bench.answers().iter().all(|(_, _, _, answer)| *answer == Answer::Invalid));
}

#[test]
fn nothing_is_sent_while_nothing_runs() {
    let (mut bench, _fd) = bench();
    bench.miss(0, 0, 1, 0x9000, 16, RW);
    assert_eq!(bench.answers(), [(0, 0, 1, Answer::Stopped)]);
    bench.start_ring(0, DESC, AVAIL, USED);
    bench.miss(0, 0, 2, 0x9000, 16, RW);
    bench.messages();
    bench.request(Request::GetVringBase { index: 0 }, false);
    assert_eq!(bench.answers(), [(0, 0, 2, Answer::Stopped)]);
    assert_eq!(bench.messages(), []);
}

#[test]
fn a_lost_back_end_channel_stops_misses_until_there_is_another() {
    let (mut bench, _fd) = started();
    bench.miss(0, 0, 1, 0x9000, 16, RW);
    bench.messages();
    bench.event(Event::BackEndLost);
    assert_eq!(bench.answers(), [(0, 0, 1, Answer::Stopped)]);
    bench.miss(0, 0, 2, 0x9000, 16, RW);
    bench.miss(0, 1, 3, DESC, 16, RW);
    assert_eq!(bench.answers(), [(0, 0, 2, Answer::Stopped), (0, 1, 3, Answer::Resolved)]);
    bench.ack(Request::SetBackendReqFd(channel()));
    bench.miss(0, 0, 4, 0x9000, 16, RW);
    assert_eq!(bench.messages().len(), 1);
}

#[test]
fn a_worker_that_is_gone_is_forgotten() {
    let (mut bench, _fd) = started();
    bench.miss(0, 0, 1, 0x9000, 16, RW);
    bench.miss(1, 0, 1, 0x9000, 16, RW);
    bench.event(Event::WorkerGone { worker: WorkerId(0) });
    assert_eq!(bench.update(0x9000, 4096, USER, RW), 0);
    assert_eq!(bench.answers(), [(1, 0, 1, Answer::Resolved)]);
}

#[test]
fn rings_are_asked_for_at_their_start_and_after_a_flush_and_only_then() {
    let (mut bench, _fd) = bench();
    bench.start_ring(0, DESC, AVAIL, USED);
    let pages = |bench: &mut Bench| bench.messages().iter().map(|(m, _)| m.iova).collect::<Vec<_>>();
    assert_eq!(pages(&mut bench), [DESC, AVAIL]);
    assert_eq!(bench.update(DESC, 4096, USER + 0x1000, RW), 0);
    assert_eq!(bench.update(AVAIL, 4096, USER + 0x2000, RW), 0);
    bench.event(Event::MissReply { value: 0 });
    bench.event(Event::MissReply { value: 0 });
    assert_eq!(bench.invalidate(0x9000, 4096), 0);
    assert_eq!(pages(&mut bench), [0; 0]);
    assert_eq!(bench.invalidate(0xfef0_0000, 0xffff_ffff_0110_0000), 0);
    assert_eq!(pages(&mut bench), [DESC, AVAIL]);
    // The same flush again, once a queue pair: nothing is asked twice.
    assert_eq!(bench.invalidate(0xfef0_0000, 0xffff_ffff_0110_0000), 0);
    assert_eq!(pages(&mut bench), [0; 0]);
}

#[test]
fn a_ring_that_stops_is_not_asked_for_any_more_but_for_what_another_one_needs() {
    // The first ring's page, from which on the second one's available ring lies beside it.
    const BESIDE: u64 = AVAIL + 0xb00;
    const OTHER: u64 = 0xfffe_e000;
    let (mut bench, _fd) = bench();
    bench.start_ring(0, DESC, AVAIL, USED);
    // All that may be in flight is, so of what comes now nothing is sent.
    for cell in 0..100 {
        bench.miss(0, cell, 1, 0x100_0000 + u64::from(cell) * 0x1_0000, 16, RW);
    }
    assert_eq!(bench.messages().len(), 64);
    bench.start_ring(1, OTHER, BESIDE, OTHER + 0x1000);
    assert_eq!(bench.device.misses_waiting(), 100 + 2 + 2);
    assert_eq!(bench.request(Request::GetVringBase { index: 1 }, false).len(), 1);
    assert_eq!(bench.device.misses_waiting(), 100 + 2);
    let mut asked = Vec::new();
    for _ in 0..1_000 {
        bench.event(Event::MissReply { value: 1 });
        asked.extend(bench.messages().iter().map(|(message, _)| message.iova));
    }
    assert_eq!(bench.device.misses_waiting(), 0, "all were refused");
    assert!(asked.contains(&AVAIL), "the first ring still needs it");
    assert!(!asked.iter().any(|iova| (OTHER..DESC).contains(iova)), "{asked:x?}");
}

#[test]
fn rings_that_features_end_or_move_are_not_asked_for_where_they_were() {
    let (mut bench, _fd) = bench();
    // By user addresses, which the first one's are not, the second one lies elsewhere.
    bench.start_ring(0, DESC, AVAIL, USED);
    bench.start_ring(1, USER, USER + 0x1000, USER + 0x1240);
    assert_eq!(bench.device.misses_waiting(), 4);
    let features = bench.device.config().features;
    bench.silent(Request::SetFeatures(features & !virtio::ACCESS_PLATFORM));
    assert!(bench.device.is_running());
    assert_eq!(bench.device.misses_waiting(), 0);
}

#[test]
fn a_miss_is_not_resolved_by_what_a_waiting_take_removed() {
    let (mut bench, _fd) = started();
    assert_eq!(bench.update(0x9000, 4096, USER, RW), 0);
    bench.instant_grace = false;
    assert_eq!(bench.request(Request::Iotlb(IotlbMessage::invalidate(0x9000, 4096)), true), []);
    bench.miss(0, 0, 1, 0x9000, 16, RW);
    assert_eq!(bench.answers(), []);
    assert_eq!(bench.messages().len(), 1);
}

#[test]
fn a_front_end_without_replies_is_still_asked() {
    let fd = memfd(MIB);
    let mut bench = Bench::new(DeviceConfig::net(1, 100, 1 << 40), ROOMY);
    let features = bench.device.config().features;
    bench.event(Event::FrontEndConnected);
    bench.silent(Request::SetProtocolFeatures(protocol::BACKEND_REQ));
    bench.silent(Request::SetBackendReqFd(channel()));
    bench.silent(Request::SetFeatures(features));
    bench.silent(table_of(&[(region(0, MIB, USER), &fd)]));
    bench.start_ring(0, DESC, AVAIL, USED);
    bench.messages();
    bench.miss(0, 0, 1, 0x9000, 16, RW);
    assert_eq!(bench.messages().iter().map(|(_, need)| *need).collect::<Vec<_>>(), [false]);
    bench.silent(Request::Iotlb(IotlbMessage::update(0x9000, 4096, USER, RW)));
    assert_eq!(bench.answers(), [(0, 0, 1, Answer::Resolved)]);
}
