/*
 * libiotlb: the worker's side of iotlbd, for C.
 *
 * A worker attaches to one device of a running daemon, makes a reader for each of its threads, and then, for each burst
 * of work, pins, translates, copies and unpins. Nothing of that is a system call.
 *
 *     iotlb_attachment *device;
 *     iotlb_reader *reader;
 *     if (iotlb_attach("/run/iotlbd/control.sock", NULL, &device) != IOTLB_OK
 *         || iotlb_reader_new(device, &reader) != IOTLB_OK)
 *         errx(1, "%s", iotlb_last_error());
 *     for (;;) {
 *         iotlb_fault fault;
 *         iotlb_status status = iotlb_pin(reader);
 *         if (status == IOTLB_OK) {
 *             status = iotlb_copy_from(reader, iova, buffer, length, &fault);
 *             iotlb_unpin(reader);
 *         }
 *         // Only now may this thread wait.
 *         if (status == IOTLB_MISS)
 *             status = iotlb_resolve(reader, fault.iova, 1, fault.access, 1000);
 *         else if (status == IOTLB_REMAPPING)
 *             status = iotlb_wait_mapped(reader, 1000);
 *         else
 *             break;
 *         if (status != IOTLB_OK)
 *             break;
 *     }
 *
 * Rules a worker keeps:
 *
 * - Never wait for anything while pinned: the guest's processors may stand still until the pin is gone. Who is pinned for
 *   too long is revoked: guest memory goes, and who touches it still, under the old pin, gets a SIGSEGV.
 * - An address that a translation yields is void when the pin ends.
 * - On guest memory only plain copying; no system call that lives longer than the pin (O_DIRECT, AIO, io_uring,
 *   MSG_ZEROCOPY, vmsplice): bounce instead.
 * - The guest changes its memory at any moment: copy first, check the copy.
 * - Pins are not async-signal-safe: never pin in a signal handler.
 * - A reader, and a request, is used by one thread at a time, and a pin ends in the thread that began it. Attachments and
 *   queues may be used by several threads at once, but not while one of them releases them.
 * - Never fork while the thread is pinned. A child leaves alone what it inherited; it may release it.
 *
 * Handles are made by the library and given back to it once, in any order: the attachment behind them lives until the
 * last of them is gone. NULL in place of a handle is IOTLB_INVALID, or nothing happens. A pointer that is not said to
 * be optional must be good for what it is for, of arrays for all of their length; what is only written need not be
 * initialized.
 *
 * A program goes with the release that it was compiled for, and so does a worker with its daemon.
 */

#ifndef IOTLB_H
#define IOTLB_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

// Of this header: 10,000 times the major number, 100 times the minor one, and the patch.
#define IOTLB_VERSION 100

// The device reads guest memory.
#define IOTLB_READ 1

// The device writes guest memory. Both: IOTLB_READ | IOTLB_WRITE.
#define IOTLB_WRITE 2

// What a call came to.
typedef enum iotlb_status {
  // It was done.
  IOTLB_OK = 0,
  // The table has no such translation: unpin, then iotlb_resolve or iotlb_request_new.
  IOTLB_MISS = 1,
  // The guest's memory map is changing: unpin, then iotlb_wait_mapped.
  IOTLB_REMAPPING = 2,
  // An argument makes no sense: a range that is empty, wraps, is too long, or lies in memory that could not be
  // mapped; an access of unknown bits, or of none; a null pointer; text that is not UTF-8.
  IOTLB_INVALID = 3,
  // The front-end has no such translation, or none that allows the access.
  IOTLB_DENIED = 4,
  // It did not happen in time.
  IOTLB_TIMED_OUT = 5,
  // The device is not running: no front-end, all rings stopped, or the session ended.
  IOTLB_STOPPED = 6,
  // There is no answer yet, or was none in the time that was given: it may still come.
  IOTLB_PENDING = 7,
  // There is no room: in the array that was given, for another reader, request or pin of this worker, or for another
  // worker of the daemon.
  IOTLB_FULL = 8,
  // The calling thread holds a pin, on this device or another, and must not wait.
  IOTLB_PINNED = 9,
  // The reader is not pinned.
  IOTLB_NOT_PINNED = 10,
  // The daemon died: release everything and attach anew.
  IOTLB_DAEMON_DEAD = 11,
  // The daemon took this worker's access away: release everything and attach anew.
  IOTLB_REVOKED = 12,
  // The daemon, this process or the control socket's mode says no: iotlb_last_error has the reason.
  IOTLB_REFUSED = 13,
  // The system failed, or the daemon does not fit: iotlb_last_error has the reason.
  IOTLB_FAILED = 14,
  // Nobody listens at the control socket, or not yet: iotlb_last_error has the reason.
  IOTLB_NO_DAEMON = 15,
  // The descriptor that stops an attach is readable.
  IOTLB_INTERRUPTED = 16,
} iotlb_status;

// How grave a line is.
typedef enum iotlb_log_level {
  // Something does not work.
  IOTLB_LOG_ERROR = 1,
  // Something is amiss.
  IOTLB_LOG_WARN = 2,
  // What an operator may want to know.
  IOTLB_LOG_INFO = 3,
  // What helps to find a fault.
  IOTLB_LOG_DEBUG = 4,
} iotlb_log_level;

// A worker's connection to one device. When the daemon dies, or this worker's access is revoked, it is over for good:
// release everything that came of it, and attach anew.
typedef struct iotlb_attachment iotlb_attachment;

// A queue that this worker serves, until it is released, the daemon takes it back, or the attachment is over.
typedef struct iotlb_queue iotlb_queue;

// One thread's right to pin. May move between threads while it is not pinned.
typedef struct iotlb_reader iotlb_reader;

// A request for translations that may be under way.
typedef struct iotlb_request iotlb_request;

// How to attach. What is zero has its default.
typedef struct iotlb_attach_options {
  // Device to attach to, at most 64 bytes of UTF-8; NULL or empty: the only one.
  const char *device;
  // Free text for the daemon's log, at most 64 bytes of UTF-8; NULL: none.
  const char *label;
  // Longest that connecting and the handshake may take together, in milliseconds; 0: 5,000.
  uint32_t timeout_ms;
} iotlb_attach_options;

// Takes one line, without a newline, that is gone when the call returns. Called by any thread of the library or of the
// caller, several at once. It must return, and not by an exception, a jump or the end of its thread; it must not call
// this library; and it should not wait: others may wait for whoever logs.
typedef void (*iotlb_log_function)(void *context, enum iotlb_log_level level, const char *line);

// A range of I/O virtual addresses.
typedef struct iotlb_range {
  // The first.
  uint64_t iova;
  // How many.
  uint64_t length;
} iotlb_range;

// A piece of guest memory: good until the pin ends.
typedef struct iotlb_segment {
  // Address of the first byte in this process.
  void *address;
  // Bytes; not 0.
  size_t length;
} iotlb_segment;

// What an IOTLB_MISS lacks.
typedef struct iotlb_fault {
  // First address that is missing.
  uint64_t iova;
  // The access that was wanted: IOTLB_READ, IOTLB_WRITE or both.
  uint32_t access;
} iotlb_fault;

// A ring as the front-end set it up. Its addresses are I/O virtual ones: translate them under the pin.
typedef struct iotlb_queue_record {
  // I/O virtual address of the descriptor table.
  uint64_t desc;
  // Of the available ring.
  uint64_t avail;
  // Of the used ring.
  uint64_t used;
  // Session that the record belongs to: see iotlb_session_generation.
  uint64_t session_generation;
  // Number of descriptors.
  uint16_t size;
  // Available index to start from when the used ring's own index cannot be read.
  uint16_t base;
  // The ring may be touched.
  bool started;
  // The ring is enabled: a started ring that is not discards what the guest sends and takes nothing to receive.
  bool enabled;
} iotlb_queue_record;

#ifdef __cplusplus
extern "C" {
#endif // __cplusplus

// [`IOTLB_VERSION`] of the library that is there. Before 1.0 a program goes with the release that it was compiled for.
uint32_t iotlb_version(void);

// Connects to the daemon's control socket and attaches. `options` may be NULL. The attachment, or NULL, is in
// `*attachment` then; give it back with iotlb_detach.
//
// The library starts a thread for each attachment, in which all signals are blocked.
//
// IOTLB_OK, IOTLB_INVALID, IOTLB_NO_DAEMON, IOTLB_TIMED_OUT, IOTLB_FULL, IOTLB_REFUSED or IOTLB_FAILED;
// iotlb_last_error has the reason.
enum iotlb_status iotlb_attach(const char *control_socket,
                               const struct iotlb_attach_options *options,
                               struct iotlb_attachment **attachment);

// As iotlb_attach, but gives up with IOTLB_INTERRUPTED as soon as `stop` is readable: a descriptor of signals, say. It
// is only polled.
enum iotlb_status iotlb_attach_unless(int stop,
                                      const char *control_socket,
                                      const struct iotlb_attach_options *options,
                                      struct iotlb_attachment **attachment);

// As iotlb_attach, over a SOCK_SEQPACKET socket that is connected already: one that was inherited, say. The socket
// belongs to the library from then on, whatever comes of it.
enum iotlb_status iotlb_attach_socket(int socket,
                                      const struct iotlb_attach_options *options,
                                      struct iotlb_attachment **attachment);

// Releases an attachment. The device is left when its last reader, request and queue are released as well; whoever
// releases the last of all these may wait for a moment, so not while pinned.
void iotlb_detach(struct iotlb_attachment *attachment);

// Whether the daemon lives and has not revoked this worker's access. No system call.
bool iotlb_alive(const struct iotlb_attachment *attachment);

// A descriptor to be polled, and nothing else: readable, until iotlb_clear_events, once a leased queue got other
// descriptors or the attachment's state changed. It belongs to the attachment. -1 for NULL.
int iotlb_events_fd(const struct iotlb_attachment *attachment);

// Makes that descriptor unreadable until the next change. Clear first, then look at what changed.
void iotlb_clear_events(const struct iotlb_attachment *attachment);

// How many rings the device has; 0 for NULL.
uint16_t iotlb_queue_count(const struct iotlb_attachment *attachment);

// What the daemon calls this worker in its log; 0 for NULL.
uint32_t iotlb_worker_id(const struct iotlb_attachment *attachment);

// The device's name, which is there until the attachment is released; empty for NULL.
const char *iotlb_device(const struct iotlb_attachment *attachment);

// Has lines of `least` and graver ones handed to `log`, with `context`, until the program ends. Before that nothing is
// logged. Once only: log and context must stay good.
//
// IOTLB_OK, IOTLB_INVALID, or IOTLB_REFUSED when lines go somewhere already; iotlb_last_error has the reason.
enum iotlb_status iotlb_set_log(iotlb_log_function log,
                                void *context,
                                uint32_t least);

// Makes sure that `length` bytes from `iova` are in the table with `access`, by asking the daemon for what is missing.
// Blocks: spins for a moment while that pays, then sleeps. Any length; asks for all that is missing at once.
//
// That all is there when this returns does not mean that it still is at the next pin: translate, and resolve again on
// an IOTLB_MISS.
//
// IOTLB_OK, IOTLB_INVALID, IOTLB_DENIED, IOTLB_TIMED_OUT, IOTLB_STOPPED, IOTLB_DAEMON_DEAD, IOTLB_REVOKED;
// IOTLB_PINNED when the calling thread holds a pin on any device: what it waits for might wait for the pin.
enum iotlb_status iotlb_resolve(struct iotlb_reader *reader,
                                uint64_t iova,
                                uint64_t length,
                                uint32_t access,
                                uint32_t timeout_ms);

// Waits until this process has mapped all memory that the table may point into: what to do after IOTLB_REMAPPING.
//
// IOTLB_OK, IOTLB_INVALID, IOTLB_PINNED, IOTLB_TIMED_OUT, IOTLB_DAEMON_DEAD or IOTLB_REVOKED.
enum iotlb_status iotlb_wait_mapped(struct iotlb_reader *reader,
                                    uint32_t timeout_ms);

// Asks for `length` bytes from `iova`, at most 17 pages, without waiting: `*request`, or NULL there. Give it back with
// iotlb_request_free. Not while the thread is pinned.
//
// IOTLB_OK, IOTLB_INVALID, IOTLB_FULL, IOTLB_PINNED, IOTLB_DAEMON_DEAD or IOTLB_REVOKED.
enum iotlb_status iotlb_request_new(struct iotlb_reader *reader,
                                    uint64_t iova,
                                    uint64_t length,
                                    uint32_t access,
                                    struct iotlb_request **request);

// As iotlb_request_new for `count` ranges, with at most one wake-up of the daemon for all of them: it takes them up
// together, so they go out in one batch. The first `*posted` of `requests` are good then, the others NULL: fewer than
// `count` when there is no room for more, none when one of them makes no sense (IOTLB_INVALID).
enum iotlb_status iotlb_request_all(struct iotlb_reader *reader,
                                    const struct iotlb_range *ranges,
                                    size_t count,
                                    uint32_t access,
                                    struct iotlb_request **requests,
                                    size_t *posted);

// What became of a request; the same again when asked again. Never blocks.
//
// IOTLB_PENDING; IOTLB_OK: translate again, the table held the translation when the answer was given; IOTLB_DENIED,
// IOTLB_TIMED_OUT, IOTLB_STOPPED, IOTLB_INVALID, IOTLB_PINNED, IOTLB_DAEMON_DEAD or IOTLB_REVOKED.
//
// The request must have come of this reader's attachment.
enum iotlb_status iotlb_request_poll(struct iotlb_reader *reader,
                                     struct iotlb_request *request);

// Sleeps until a request is answered, or `timeout_ms` have passed: then it is IOTLB_PENDING.
//
// As iotlb_request_poll.
enum iotlb_status iotlb_request_wait(struct iotlb_reader *reader,
                                     struct iotlb_request *request,
                                     uint32_t timeout_ms);

// Releases a request, answered or not. May wait as iotlb_detach does.
void iotlb_request_free(struct iotlb_request *request);

// Leases `count` queues, all of them or none: `claimed` has room for so many, in the order of `queues`. Give each back
// with iotlb_queue_release. `timeout_ms` is for all of it, whatever the daemon does; after an IOTLB_TIMED_OUT the
// queues may be claimed anew at once.
//
// IOTLB_OK, IOTLB_INVALID, IOTLB_PINNED, IOTLB_REFUSED, IOTLB_TIMED_OUT, IOTLB_DAEMON_DEAD, IOTLB_REVOKED or
// IOTLB_FAILED; iotlb_last_error has the reason.
enum iotlb_status iotlb_claim_queues(const struct iotlb_attachment *attachment,
                                     const uint16_t *queues,
                                     size_t count,
                                     uint32_t timeout_ms,
                                     struct iotlb_queue **claimed);

// Gives a queue back. The caller has stopped touching the ring. Does not wait for the daemon to read that; but may
// wait as iotlb_detach does, so not while pinned.
void iotlb_queue_release(struct iotlb_queue *queue);

// The ring's index; 0 for NULL.
uint16_t iotlb_queue_index(const struct iotlb_queue *queue);

// A duplicate, the caller's to close, of the descriptor that becomes readable when the driver made buffers available,
// to `*kick`; -1 there when there is none: the ring is not set up yet, or is to be polled. Ask again when
// iotlb_queue_descriptors_generation has grown.
//
// IOTLB_OK, IOTLB_INVALID, or IOTLB_FAILED when this process has no descriptor left; iotlb_last_error has the reason.
enum iotlb_status iotlb_queue_kick_fd(const struct iotlb_queue *queue,
                                      int *kick);

// Grows whenever the queue's descriptors were replaced; 0 for NULL.
uint64_t iotlb_queue_descriptors_generation(const struct iotlb_queue *queue);

// Interrupts the driver. Call it inside the pin under which the used ring was written: a stopped ring must not
// interrupt. False when there is no call descriptor (the driver polls) or it is broken.
//
// Does not wait for who reads the descriptor, unless somebody means it to: whoever else has it, the front-end or a
// worker that had the queue before, can make it block and fill its counter, and then this sleeps until the counter is
// read. A pin that lasts so long has this worker revoked, as any other.
bool iotlb_queue_signal_call(const struct iotlb_queue *queue);

// Reports that the ring is broken, or names an address that was denied. The daemon logs the reason and signals the
// ring's error descriptor. Not while pinned.
void iotlb_queue_signal_error(const struct iotlb_queue *queue,
                              const char *reason);

// Notes how far the available ring was completely processed, for a successor that cannot read the used ring.
void iotlb_queue_set_progress(const struct iotlb_queue *queue,
                              uint16_t avail_index);

// Whether the queue still belongs to this worker. False after the daemon took it back, or died.
bool iotlb_queue_held(const struct iotlb_queue *queue);

// Makes a reader of an attachment, for one thread: `*reader`, or NULL there. Give it back with iotlb_reader_free.
//
// IOTLB_OK, IOTLB_INVALID, IOTLB_FULL when all 64 of this worker are taken, IOTLB_DAEMON_DEAD or IOTLB_REVOKED;
// iotlb_last_error has the reason.
enum iotlb_status iotlb_reader_new(const struct iotlb_attachment *attachment,
                                   struct iotlb_reader **reader);

// Releases a reader, in the thread that pinned it last. Its pin ends. May wait as iotlb_detach does.
void iotlb_reader_free(struct iotlb_reader *reader);

// Pins: until iotlb_unpin, everything a translation yields stays what it was. No system call, no lock. Pins nest, and
// the outermost counts. Pin for a burst, not for a program.
//
// IOTLB_OK; IOTLB_INVALID, IOTLB_DAEMON_DEAD, IOTLB_REVOKED, or IOTLB_FULL after four billion of them: then there is
// nothing more to unpin than before, and nothing more of the guest may be touched.
enum iotlb_status iotlb_pin(struct iotlb_reader *reader);

// Ends a pin, in the thread that began it. Where there is none, nothing happens.
void iotlb_unpin(struct iotlb_reader *reader);

// Adds what this reader counted to the worker's figures now, instead of every thousand lookups or so. Before a thread
// goes idle, say.
void iotlb_flush_counters(struct iotlb_reader *reader);

// What a status means, in a few words. The text is there for as long as the library is.
//
// The argument is an integer, so that one that is no status can be asked about too.
const char *iotlb_status_text(int32_t status);

// Why the last call of this thread failed that is documented to say so: what, where, and what to do. Empty when none
// did. The text is there until the next one fails.
const char *iotlb_last_error(void);

// Where `length` bytes from `iova` are, if the device may access them like that: all of them, or none. Contiguous
// addresses need not be contiguous memory, so there can be several pieces. The first `capacity` of them go to
// `segments`, and how many there are to `*count`, which is 0 when there is a fault. With access 0: whether and where
// there is any translation.
//
// IOTLB_OK; IOTLB_FULL when there are more pieces than `capacity`; IOTLB_MISS, with what is missing in `*fault` unless
// that is NULL; IOTLB_REMAPPING; IOTLB_INVALID; IOTLB_NOT_PINNED.
enum iotlb_status iotlb_translate(const struct iotlb_reader *reader,
                                  uint64_t iova,
                                  uint64_t length,
                                  uint32_t access,
                                  struct iotlb_segment *segments,
                                  size_t capacity,
                                  size_t *count,
                                  struct iotlb_fault *fault);

// Where `length` bytes from `iova` are, when they are one piece and the device may access them like that. NULL says
// nothing but that, or that the reader is not pinned: iotlb_translate tells which.
void *iotlb_translate_one(const struct iotlb_reader *reader,
                          uint64_t iova,
                          uint64_t length,
                          uint32_t access);

// The same for `count` ranges, whose translations are fetched from memory at the same time: faster than one by one in
// a table that is not in the cache. What iotlb_translate_one returns for each goes to `addresses`, in order. Returns
// how many are not NULL.
size_t iotlb_translate_burst(const struct iotlb_reader *reader,
                             const struct iotlb_range *ranges,
                             size_t count,
                             uint32_t access,
                             void **addresses);

// Copies `length` bytes from `iova` on to `buffer`. Nothing is copied when there is a fault; see iotlb_translate. The
// guest may write meanwhile, so its bytes can be a mixture.
enum iotlb_status iotlb_copy_from(const struct iotlb_reader *reader,
                                  uint64_t iova,
                                  void *buffer,
                                  size_t length,
                                  struct iotlb_fault *fault);

// Copies `length` bytes from `buffer` to `iova` and on. Nothing is copied when there is a fault; see iotlb_translate.
enum iotlb_status iotlb_copy_to(const struct iotlb_reader *reader,
                                uint64_t iova,
                                const void *buffer,
                                size_t length,
                                struct iotlb_fault *fault);

// Grows with every translation that was taken away. An address that is kept across pins is void when it changed, and
// with its attachment. Ask *before* the translation that yields the address, and the same reader. 0 when the reader is
// not pinned.
uint64_t iotlb_removal_generation(const struct iotlb_reader *reader);

// Grows with every front-end session and device reset. 0 when the reader is not pinned.
uint64_t iotlb_session_generation(const struct iotlb_reader *reader);

// Grows whenever a queue record changed. 0 when the reader is not pinned.
uint64_t iotlb_queue_generation(const struct iotlb_reader *reader);

// Virtio feature bits that the driver acknowledged; 0 before it did, or when the reader is not pinned.
uint64_t iotlb_acked_features(const struct iotlb_reader *reader);

// Whether the device runs; false when the reader is not pinned.
bool iotlb_running(const struct iotlb_reader *reader);

// A ring as the front-end set it up, to `*record`. It counts for this pin.
//
// IOTLB_OK, IOTLB_INVALID for an index no device has, IOTLB_NOT_PINNED.
enum iotlb_status iotlb_get_queue_record(const struct iotlb_reader *reader,
                                         uint16_t queue,
                                         struct iotlb_queue_record *record);

#ifdef __cplusplus
}  // extern "C"
#endif  // __cplusplus

#endif  /* IOTLB_H */
