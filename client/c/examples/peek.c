/*
 * Writes guest memory to the standard output: peek CONTROL_SOCKET IOVA LENGTH.
 *
 *     cargo build --release -p iotlb-client-c
 *     cc -o peek client/c/examples/peek.c -Iclient/c/include -Ltarget/release -liotlb -Wl,-rpath,$PWD/target/release
 *
 * The smallest whole worker: it attaches, pins, copies, unpins, and asks the daemon for what is missing.
 */
#include <errno.h>
#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>

#include "iotlb.h"

/* Copied under one pin: a pin is for a burst. */
#define CHUNK 4096u
/* Longest wait for one translation, in milliseconds. */
#define TIMEOUT_MS 1000u

static void complain(void *context, iotlb_log_level level, const char *line)
{
	(void)level;
	fprintf(stderr, "%s: %s\n", (const char *)context, line);
}

/* Copies from guest memory; returns what it came to in the end. */
static iotlb_status fetch(iotlb_reader *reader, uint64_t iova, void *buffer, size_t length)
{
	for (;;) {
		iotlb_fault fault;
		iotlb_status status = iotlb_pin(reader);

		if (status == IOTLB_OK) {
			status = iotlb_copy_from(reader, iova, buffer, length, &fault);
			iotlb_unpin(reader);
		}
		/* Only now may this thread wait. */
		if (status == IOTLB_MISS)
			status = iotlb_resolve(reader, fault.iova, 1, fault.access, TIMEOUT_MS);
		else if (status == IOTLB_REMAPPING)
			status = iotlb_wait_mapped(reader, TIMEOUT_MS);
		else
			return status;
		if (status != IOTLB_OK)
			return status;
	}
}

static uint64_t number(const char *text)
{
	char *end;

	errno = 0;
	uint64_t value = strtoull(text, &end, 0);

	if (errno != 0 || end == text || *end != '\0') {
		fprintf(stderr, "%s is no number\n", text);
		exit(2);
	}
	return value;
}

int main(int argc, char **argv)
{
	if (argc != 4) {
		fprintf(stderr, "usage: %s CONTROL_SOCKET IOVA LENGTH\n", argv[0]);
		return 2;
	}
	uint64_t iova = number(argv[2]), left = number(argv[3]);
	iotlb_attach_options options = { .label = "peek" };
	iotlb_attachment *device;
	iotlb_reader *reader = NULL;
	iotlb_status status = iotlb_set_log(complain, argv[0], IOTLB_LOG_WARN);

	if (status == IOTLB_OK)
		status = iotlb_attach(argv[1], &options, &device);
	if (status == IOTLB_OK)
		status = iotlb_reader_new(device, &reader);
	if (status != IOTLB_OK) {
		fprintf(stderr, "%s: %s\n", argv[0], iotlb_last_error());
		return 1;
	}
	/* Before a driver is there the device has nothing to translate with: the first copy asks, and waits. */
	while (left > 0) {
		static char chunk[CHUNK];
		size_t length = left < CHUNK ? (size_t)left : CHUNK;

		status = fetch(reader, iova, chunk, length);
		if (status != IOTLB_OK) {
			fprintf(stderr, "%s: %#" PRIx64 ": %s\n", argv[0], iova, iotlb_status_text(status));
			return 1;
		}
		if (fwrite(chunk, 1, length, stdout) != length) {
			perror("stdout");
			return 1;
		}
		iova += length;
		left -= length;
	}
	iotlb_reader_free(reader);
	iotlb_detach(device);
	return 0;
}
