/*
 * Every function of the header, against the daemon of tests/c_worker.rs, which knows what comes next: whole SOCKET.
 * Ends with status 1 at the first thing that is not as it should be, and says where.
 */
#include <fcntl.h>
#include <poll.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <sys/wait.h>
#include <unistd.h>

#include "iotlb.h"

#define PATIENCE_MS 60000u
#define PAGE 4096u

#define CHECK(what)                                                                            \
	do {                                                                                   \
		if (!(what)) {                                                                 \
			fprintf(stderr, "line %d: %s (%s)\n", __LINE__, #what, iotlb_last_error()); \
			exit(1);                                                               \
		}                                                                              \
	} while (0)
#define IS(status, call) CHECK((call) == (status))

static atomic_int lines;

static void count_lines(void *context, iotlb_log_level level, const char *line)
{
	CHECK(strcmp(context, "context") == 0 && level <= IOTLB_LOG_WARN && line[0] != '\0');
	atomic_fetch_add(&lines, 1);
}

static bool readable(int fd, int timeout_ms)
{
	struct pollfd entry = { .fd = fd, .events = POLLIN };

	return poll(&entry, 1, timeout_ms) == 1;
}

/* A worker that comes over a socket of the program's own, with more readers than there are, and goes. */
static void by_hand(const char *path)
{
	struct sockaddr_un address = { .sun_family = AF_UNIX };
	iotlb_attach_options options = { .label = "by hand" };
	iotlb_attachment *device;
	iotlb_reader *readers[65];
	int ends[2];

	/* Whoever asked to be stopped is not attached. */
	CHECK(pipe(ends) == 0 && write(ends[1], "x", 1) == 1);
	IS(IOTLB_INTERRUPTED, iotlb_attach_unless(ends[0], path, &options, &device));
	CHECK(device == NULL);
	close(ends[0]);
	close(ends[1]);

	int socket_fd = socket(AF_UNIX, SOCK_SEQPACKET, 0);
	strncpy(address.sun_path, path, sizeof(address.sun_path) - 1);
	CHECK(socket_fd >= 0 && connect(socket_fd, (struct sockaddr *)&address, sizeof(address)) == 0);
	IS(IOTLB_OK, iotlb_attach_socket(socket_fd, &options, &device));
	for (int n = 0; n < 64; n++)
		IS(IOTLB_OK, iotlb_reader_new(device, &readers[n]));
	IS(IOTLB_FULL, iotlb_reader_new(device, &readers[64]));
	CHECK(readers[64] == NULL && strcmp(iotlb_device(device), "net0") == 0);
	/* A pin of one reader keeps the thread from waiting by another, and from being held up by a claim. */
	iotlb_queue *queue;
	const uint16_t zero = 0;
	IS(IOTLB_OK, iotlb_pin(readers[0]));
	IS(IOTLB_PINNED, iotlb_resolve(readers[1], 0x1000, 1, IOTLB_READ, 0));
	IS(IOTLB_PINNED, iotlb_wait_mapped(readers[1], 0));
	IS(IOTLB_PINNED, iotlb_claim_queues(device, &zero, 1, PATIENCE_MS, &queue));
	iotlb_unpin(readers[0]);
	iotlb_detach(device);
	for (int n = 0; n < 64; n++) {
		iotlb_flush_counters(readers[n]);
		iotlb_reader_free(readers[n]);
	}
}

/* A child may release what its parent has, even what another thread had pinned; it does not end the parent's. */
static void *released_by_a_child(void *argument)
{
	iotlb_reader *reader = argument;
	int status;
	pid_t child = fork();

	if (child == 0) {
		iotlb_reader_free(reader);
		_exit(0);
	}
	CHECK(child > 0 && waitpid(child, &status, 0) == child && WIFEXITED(status) && WEXITSTATUS(status) == 0);
	return NULL;
}

static void children(iotlb_reader *reader)
{
	pthread_t thread;

	IS(IOTLB_OK, iotlb_pin(reader));
	CHECK(pthread_create(&thread, NULL, released_by_a_child, reader) == 0 && pthread_join(thread, NULL) == 0);
	CHECK(iotlb_translate_one(reader, 0x10000, 1, IOTLB_READ) != NULL);
	iotlb_unpin(reader);
}

/* What is no socket of a daemon's: whoever cleans up finds nothing to detach, and nothing to close. */
static void socket_is_taken(int fd, iotlb_status expected)
{
	iotlb_attachment *device = (iotlb_attachment *)&lines;

	IS(expected, iotlb_attach_socket(fd, NULL, &device));
	CHECK(device == NULL && fcntl(fd, F_GETFD) == -1);
	iotlb_detach(device);
}

/* Where somebody listens who is no daemon, waiting for one is in vain; where somebody did, it is not. */
static void other_listener(const char *path)
{
	struct sockaddr_un address = { .sun_family = AF_UNIX };
	iotlb_attachment *device;
	int listener = socket(AF_UNIX, SOCK_STREAM, 0);

	CHECK(snprintf(address.sun_path, sizeof(address.sun_path), "%s.s", path) < (int)sizeof(address.sun_path));
	CHECK(listener >= 0 && bind(listener, (struct sockaddr *)&address, sizeof(address)) == 0);
	CHECK(listen(listener, 1) == 0);
	IS(IOTLB_FAILED, iotlb_attach(address.sun_path, NULL, &device));
	CHECK(device == NULL && strstr(iotlb_last_error(), address.sun_path) != NULL);
	close(listener);
	IS(IOTLB_NO_DAEMON, iotlb_attach(address.sun_path, NULL, &device));
}

/* What must do nothing, and say so. */
static void nothing_is_refused(void)
{
	iotlb_attachment *device = (iotlb_attachment *)&lines;
	iotlb_reader *reader = (iotlb_reader *)&lines;
	iotlb_queue *queue = (iotlb_queue *)&lines;
	iotlb_request *request = (iotlb_request *)&lines;
	iotlb_queue_record record;
	uint16_t zero = 0;
	size_t count = 7;
	void *address = &lines;
	iotlb_range range = { 0, 1 };
	int ends[2];

	IS(IOTLB_INVALID, iotlb_attach(NULL, NULL, &device));
	CHECK(device == NULL && strstr(iotlb_last_error(), "NULL") != NULL);
	IS(IOTLB_INVALID, iotlb_attach("/nowhere", NULL, NULL));
	socket_is_taken(-1, IOTLB_INVALID);
	socket_is_taken(100000, IOTLB_INVALID);
	CHECK(pipe(ends) == 0);
	socket_is_taken(ends[0], IOTLB_FAILED);
	IS(IOTLB_INVALID, iotlb_attach_socket(ends[1], NULL, NULL));
	CHECK(fcntl(ends[1], F_GETFD) == -1);
	IS(IOTLB_NO_DAEMON, iotlb_attach("/nowhere", NULL, &device));
	CHECK(strstr(iotlb_last_error(), "/nowhere") != NULL);
	IS(IOTLB_INVALID, iotlb_attach("", NULL, &device));
	IS(IOTLB_INVALID, iotlb_attach_unless(-1, "/nowhere", NULL, &device));
	IS(IOTLB_INVALID, iotlb_attach("/nowhere", &(iotlb_attach_options){ .label = "\xff" }, &device));
	IS(IOTLB_INVALID, iotlb_attach("/nowhere", &(iotlb_attach_options){ .label = "a\nb" }, &device));
	IS(IOTLB_INVALID, iotlb_reader_new(NULL, &reader));
	CHECK(reader == NULL);
	IS(IOTLB_INVALID, iotlb_claim_queues(NULL, &zero, 1, 0, &queue));
	CHECK(queue == NULL);
	IS(IOTLB_INVALID, iotlb_pin(NULL));
	iotlb_unpin(NULL);
	IS(IOTLB_INVALID, iotlb_translate(NULL, 0, 1, IOTLB_READ, NULL, 0, &count, NULL));
	CHECK(count == 0);
	CHECK(iotlb_translate_one(NULL, 0, 1, IOTLB_READ) == NULL);
	CHECK(iotlb_translate_burst(NULL, &range, 1, IOTLB_READ, &address) == 0 && address == NULL);
	IS(IOTLB_INVALID, iotlb_copy_from(NULL, 0, &count, 1, NULL));
	IS(IOTLB_INVALID, iotlb_copy_to(NULL, 0, &count, 1, NULL));
	IS(IOTLB_INVALID, iotlb_resolve(NULL, 0, 1, IOTLB_READ, 0));
	IS(IOTLB_INVALID, iotlb_wait_mapped(NULL, 0));
	IS(IOTLB_INVALID, iotlb_request_new(NULL, 0, 1, IOTLB_READ, &request));
	CHECK(request == NULL);
	count = 7;
	IS(IOTLB_INVALID, iotlb_request_all(NULL, &range, 1, IOTLB_READ, &request, &count));
	CHECK(count == 0);
	IS(IOTLB_INVALID, iotlb_request_poll(NULL, NULL));
	IS(IOTLB_INVALID, iotlb_request_wait(NULL, NULL, 0));
	IS(IOTLB_INVALID, iotlb_get_queue_record(NULL, 0, &record));
	CHECK(!iotlb_alive(NULL) && iotlb_events_fd(NULL) == -1 && iotlb_queue_count(NULL) == 0);
	CHECK(iotlb_worker_id(NULL) == 0 && !iotlb_running(NULL) && iotlb_acked_features(NULL) == 0);
	CHECK(!iotlb_queue_signal_call(NULL) && !iotlb_queue_held(NULL) && iotlb_device(NULL)[0] == '\0');
	int kick = 7;
	IS(IOTLB_INVALID, iotlb_queue_kick_fd(NULL, &kick));
	CHECK(kick == -1);
	IS(IOTLB_INVALID, iotlb_queue_kick_fd(NULL, NULL));
	CHECK(iotlb_queue_index(NULL) == 0 && iotlb_queue_descriptors_generation(NULL) == 0);
	iotlb_queue_signal_error(NULL, NULL);
	iotlb_queue_set_progress(NULL, 0);
	iotlb_clear_events(NULL);
	iotlb_flush_counters(NULL);
	iotlb_queue_release(NULL);
	iotlb_request_free(NULL);
	iotlb_reader_free(NULL);
	iotlb_detach(NULL);
	IS(IOTLB_INVALID, iotlb_set_log(NULL, NULL, IOTLB_LOG_WARN));
	IS(IOTLB_INVALID, iotlb_set_log(count_lines, "context", 9));
}

/* Pages 0x10000 and 0x11000 lie apart in memory, 0x20000 may be read only. */
static void translations(iotlb_reader *reader)
{
	iotlb_segment segments[2];
	iotlb_fault fault = { 0, 0 };
	size_t count;
	char bytes[8] = "", page[PAGE];

	IS(IOTLB_NOT_PINNED, iotlb_translate(reader, 0x10000, 8, IOTLB_READ, segments, 2, &count, NULL));
	IS(IOTLB_NOT_PINNED, iotlb_copy_from(reader, 0x10000, bytes, 8, NULL));
	IS(IOTLB_NOT_PINNED, iotlb_copy_to(reader, 0x10000, bytes, 8, NULL));
	CHECK(iotlb_translate_one(reader, 0x10000, 8, IOTLB_READ) == NULL);

	IS(IOTLB_OK, iotlb_pin(reader));
	IS(IOTLB_OK, iotlb_translate(reader, 0x10ffc, 8, IOTLB_READ, segments, 2, &count, NULL));
	CHECK(count == 2 && segments[0].length == 4 && segments[1].length == 4);
	CHECK(memcmp(segments[0].address, "left", 4) == 0 && memcmp(segments[1].address, "back", 4) == 0);
	IS(IOTLB_FULL, iotlb_translate(reader, 0x10ffc, 8, IOTLB_READ, segments, 1, &count, NULL));
	CHECK(count == 2);
	IS(IOTLB_FULL, iotlb_translate(reader, 0x10ffc, 8, IOTLB_READ, NULL, 0, &count, NULL));
	IS(IOTLB_MISS, iotlb_translate(reader, 0x11ff8, 16, IOTLB_READ, segments, 2, &count, &fault));
	CHECK(count == 0 && fault.iova == 0x12000 && fault.access == IOTLB_READ);
	IS(IOTLB_MISS, iotlb_translate(reader, 0x20000, 1, IOTLB_READ | IOTLB_WRITE, segments, 2, &count, &fault));
	CHECK(fault.iova == 0x20000 && fault.access == (IOTLB_READ | IOTLB_WRITE));
	IS(IOTLB_INVALID, iotlb_translate(reader, 0x10000, 0, IOTLB_READ, segments, 2, &count, &fault));
	IS(IOTLB_INVALID, iotlb_translate(reader, 0x10000, 1, 4, segments, 2, &count, &fault));
	IS(IOTLB_INVALID, iotlb_translate(reader, 0x10000, 1, IOTLB_READ, segments, 2, NULL, &fault));

	CHECK(iotlb_translate_one(reader, 0x10ffc, 4, IOTLB_READ) == segments[0].address);
	CHECK(iotlb_translate_one(reader, 0x10ffc, 8, IOTLB_READ) == NULL);
	CHECK(iotlb_translate_one(reader, 0x20000, 4, IOTLB_WRITE) == NULL);
	CHECK(iotlb_translate_one(reader, 0x20000, 4, IOTLB_READ | 8) == NULL);

	/* More than are fetched in one go, each third of them missing. */
	iotlb_range ranges[100];
	void *addresses[100];
	for (unsigned n = 0; n < 100; n++)
		ranges[n] = (iotlb_range){ 0x10000 + n % 3 * PAGE, 16 };
	CHECK(iotlb_translate_burst(reader, ranges, 100, IOTLB_READ, addresses) == 67);
	for (unsigned n = 0; n < 100; n++)
		CHECK(addresses[n] == iotlb_translate_one(reader, ranges[n].iova, 16, IOTLB_READ));
	CHECK(iotlb_translate_burst(reader, ranges, 0, IOTLB_READ, NULL) == 0);

	IS(IOTLB_OK, iotlb_copy_from(reader, 0x10ffc, bytes, 8, NULL));
	CHECK(memcmp(bytes, "leftback", 8) == 0);
	IS(IOTLB_OK, iotlb_copy_to(reader, 0x10ffe, "LYHA", 4, NULL));
	IS(IOTLB_OK, iotlb_copy_from(reader, 0x10ffc, bytes, 8, NULL));
	CHECK(memcmp(bytes, "leLYHAck", 8) == 0);
	IS(IOTLB_MISS, iotlb_copy_to(reader, 0x20000, "x", 1, &fault));
	IS(IOTLB_MISS, iotlb_copy_from(reader, 0x11008, page, PAGE, &fault));
	CHECK(fault.iova == 0x12000);
	IS(IOTLB_OK, iotlb_copy_from(reader, 0x10000, NULL, 0, NULL));
	IS(IOTLB_INVALID, iotlb_copy_from(reader, 0x10000, NULL, 1, NULL));

	/* What waits does not, while pinned; and pins nest. */
	IS(IOTLB_PINNED, iotlb_resolve(reader, 0x10000, 1, IOTLB_READ, 0));
	IS(IOTLB_PINNED, iotlb_wait_mapped(reader, 0));
	iotlb_request *request;
	IS(IOTLB_PINNED, iotlb_request_new(reader, 0x10000, 1, IOTLB_READ, &request));
	IS(IOTLB_OK, iotlb_pin(reader));
	iotlb_unpin(reader);
	IS(IOTLB_OK, iotlb_translate(reader, 0x10000, 8, IOTLB_READ, segments, 2, &count, NULL));
	iotlb_unpin(reader);
	IS(IOTLB_NOT_PINNED, iotlb_translate(reader, 0x10000, 8, IOTLB_READ, segments, 2, &count, NULL));
	iotlb_unpin(reader);
	IS(IOTLB_NOT_PINNED, iotlb_translate(reader, 0x10000, 8, IOTLB_READ, segments, 2, &count, NULL));
}

/* The daemon maps 0x30000 and 0x31000 when it is asked for them, says nothing of 0x33000, and denies 0x32000. */
static void misses(iotlb_reader *reader)
{
	iotlb_request *request, *both[2];
	size_t posted;

	IS(IOTLB_INVALID, iotlb_resolve(reader, 0x30000, 1, 0, PATIENCE_MS));
	IS(IOTLB_OK, iotlb_resolve(reader, 0x30000, 8, IOTLB_READ, PATIENCE_MS));
	IS(IOTLB_INVALID, iotlb_request_new(reader, 0x31000, 1, 8, &request));
	CHECK(request == NULL);
	IS(IOTLB_OK, iotlb_request_new(reader, 0x31000, 8, IOTLB_READ, &request));
	IS(IOTLB_OK, iotlb_request_wait(reader, request, PATIENCE_MS));
	IS(IOTLB_OK, iotlb_request_poll(reader, request));
	iotlb_request_free(request);
	/* A wait that ends is not the request's end. */
	IS(IOTLB_OK, iotlb_request_new(reader, 0x33000, 8, IOTLB_READ, &request));
	IS(IOTLB_PENDING, iotlb_request_wait(reader, request, 1));
	IS(IOTLB_PENDING, iotlb_request_poll(reader, request));
	iotlb_request_free(request);
	const iotlb_range ranges[2] = { { 0x30000, PAGE }, { 0x32000, 8 } }, wrong[2] = { { 0x30000, PAGE }, { 0, 0 } };
	IS(IOTLB_INVALID, iotlb_request_all(reader, wrong, 2, IOTLB_READ, both, &posted));
	CHECK(posted == 0 && both[0] == NULL && both[1] == NULL);
	IS(IOTLB_OK, iotlb_request_all(reader, ranges, 2, IOTLB_READ, both, &posted));
	CHECK(posted == 2);
	IS(IOTLB_OK, iotlb_request_wait(reader, both[0], PATIENCE_MS));
	iotlb_status status = IOTLB_PENDING;
	for (unsigned waited_ms = 0; status == IOTLB_PENDING && waited_ms < PATIENCE_MS; waited_ms++) {
		status = iotlb_request_poll(reader, both[1]);
		usleep(1000);
	}
	CHECK(status == IOTLB_DENIED);
	iotlb_request_free(both[1]);
	iotlb_request_free(both[0]);
	IS(IOTLB_OK, iotlb_pin(reader));
	CHECK(iotlb_translate_one(reader, 0x30ff8, 8, IOTLB_READ) != NULL);
	CHECK(iotlb_translate_one(reader, 0x31000, 8, IOTLB_READ) != NULL);
	CHECK(iotlb_translate_one(reader, 0x32000, 8, IOTLB_READ) == NULL);
	iotlb_unpin(reader);
}

/* The daemon has published ring 1, leases 1 and 0, and refuses 2. */
static void queues(iotlb_attachment *device, iotlb_reader *reader)
{
	const uint16_t wanted[2] = { 1, 0 }, other = 2;
	iotlb_queue *queue[2], *none;
	iotlb_queue_record record;

	IS(IOTLB_NOT_PINNED, iotlb_get_queue_record(reader, 1, &record));
	IS(IOTLB_OK, iotlb_pin(reader));
	IS(IOTLB_OK, iotlb_get_queue_record(reader, 1, &record));
	CHECK(record.desc == 0x10000 && record.avail == 0x10800 && record.used == 0x11000);
	CHECK(record.size == 64 && record.base == 9 && record.started && !record.enabled);
	IS(IOTLB_INVALID, iotlb_get_queue_record(reader, 65535, &record));
	CHECK(iotlb_removal_generation(reader) > 0 && iotlb_queue_generation(reader) > 0);
	CHECK(iotlb_session_generation(reader) == record.session_generation);
	CHECK(iotlb_acked_features(reader) == 0 && !iotlb_running(reader));
	iotlb_unpin(reader);
	CHECK(iotlb_removal_generation(reader) == 0 && iotlb_queue_generation(reader) == 0);

	IS(IOTLB_INVALID, iotlb_claim_queues(device, NULL, 1, PATIENCE_MS, &none));
	IS(IOTLB_REFUSED, iotlb_claim_queues(device, &other, 1, PATIENCE_MS, &none));
	CHECK(none == NULL && strstr(iotlb_last_error(), "somebody else's") != NULL);
	IS(IOTLB_OK, iotlb_claim_queues(device, wanted, 2, PATIENCE_MS, queue));
	CHECK(iotlb_queue_index(queue[0]) == 1 && iotlb_queue_index(queue[1]) == 0);
	CHECK(iotlb_queue_held(queue[0]) && iotlb_queue_descriptors_generation(queue[0]) > 0);
	int kick;
	IS(IOTLB_OK, iotlb_queue_kick_fd(queue[0], &kick));
	CHECK(kick >= 0 && readable(kick, PATIENCE_MS));
	close(kick);
	/* Queue 0 has no kick: it is to be polled. */
	IS(IOTLB_OK, iotlb_queue_kick_fd(queue[1], &kick));
	CHECK(kick == -1);
	CHECK(iotlb_queue_signal_call(queue[0]) && !iotlb_queue_signal_call(queue[1]));
	iotlb_queue_set_progress(queue[0], 0x8001);
	iotlb_queue_signal_error(queue[0], "broken \xff");
	iotlb_queue_release(queue[1]);
	iotlb_queue_release(queue[0]);
}

int main(int argc, char **argv)
{
	iotlb_attachment *device;
	iotlb_reader *reader, *late;

	CHECK(argc == 2 && iotlb_version() == IOTLB_VERSION);
	nothing_is_refused();
	other_listener(argv[1]);
	IS(IOTLB_OK, iotlb_set_log(count_lines, "context", IOTLB_LOG_WARN));
	IS(IOTLB_REFUSED, iotlb_set_log(count_lines, "context", IOTLB_LOG_WARN));
	CHECK(strcmp(iotlb_status_text(IOTLB_OK), "done") == 0 && iotlb_status_text(-1)[0] != '\0');

	by_hand(argv[1]);
	IS(IOTLB_OK, iotlb_attach(argv[1], &(iotlb_attach_options){ .label = "whole" }, &device));
	CHECK(iotlb_alive(device) && iotlb_queue_count(device) == 4 && iotlb_worker_id(device) == 7);
	IS(IOTLB_OK, iotlb_reader_new(device, &reader));
	/* Memory comes after the handshake; the last page of it says that all is mapped. */
	for (bool mapped = false; !mapped; usleep(1000)) {
		IS(IOTLB_OK, iotlb_wait_mapped(reader, PATIENCE_MS));
		IS(IOTLB_OK, iotlb_pin(reader));
		mapped = iotlb_translate_one(reader, 0x20000, 1, IOTLB_READ) != NULL;
		iotlb_unpin(reader);
	}
	translations(reader);
	children(reader);
	misses(reader);
	queues(device, reader);

	/* The daemon takes everything away now, and answers nothing any more. */
	iotlb_request *pending;
	IS(IOTLB_OK, iotlb_request_new(reader, 0x33000, 8, IOTLB_READ, &pending));
	int events = iotlb_events_fd(device);
	iotlb_status status;
	iotlb_clear_events(device);
	iotlb_queue *none;
	const uint16_t last = 3;
	CHECK(iotlb_claim_queues(device, &last, 1, PATIENCE_MS, &none) == IOTLB_REVOKED);
	CHECK(readable(events, PATIENCE_MS) && !iotlb_alive(device));
	/* Which is also said, by a thread of the library. */
	for (unsigned waited_ms = 0; atomic_load(&lines) == 0; waited_ms++) {
		CHECK(waited_ms < PATIENCE_MS);
		usleep(1000);
	}
	CHECK((status = iotlb_pin(reader)) == IOTLB_REVOKED && iotlb_status_text(status)[0] != '\0');
	IS(IOTLB_REVOKED, iotlb_reader_new(device, &late));
	IS(IOTLB_REVOKED, iotlb_wait_mapped(reader, 1));
	iotlb_request *none_left;
	IS(IOTLB_REVOKED, iotlb_request_new(reader, 0x33000, 8, IOTLB_READ, &none_left));
	IS(IOTLB_REVOKED, iotlb_request_poll(reader, pending));
	iotlb_request_free(pending);
	IS(IOTLB_REVOKED, iotlb_resolve(reader, 0x10000, 1, IOTLB_READ, PATIENCE_MS));
	/* In whatever order. */
	iotlb_detach(device);
	iotlb_reader_free(reader);
	return 0;
}
