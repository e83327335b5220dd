/*
 * Writes guest memory to the standard output: peek CONTROL_SOCKET IOVA LENGTH.
 *
 *     cargo rustc --release -p iotlb-client-c --lib --crate-type cdylib,staticlib
 *     cc -o peek client/c/examples/peek.c -Iclient/c/include -Ltarget/release -liotlb -Wl,-rpath,$PWD/target/release
 *
 * The smallest whole worker: it attaches, pins, copies, unpins, and asks the daemon for what is missing.
 */
#include <errno.h>
#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

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

/* Copies all of it to the standard output; returns the program's exit status. */
static int copy_out(iotlb_reader *reader, uint64_t iova, uint64_t left)
{
	static char chunk[CHUNK];

	for (; left > 0;) {
		size_t length = left < CHUNK ? (size_t)left : CHUNK;
		iotlb_status status = fetch(reader, iova, chunk, length);

		if (status != IOTLB_OK) {
			fprintf(stderr, "%#" PRIx64 ": %s\n", iova, iotlb_status_text(status));
			return 1;
		}
		if (fwrite(chunk, 1, length, stdout) != length)
			break;
		iova += length;
		left -= length;
	}
	if (left > 0 || fflush(stdout) != 0) {
		perror("stdout");
		return 1;
	}
	return 0;
}

static uint64_t number(const char *text)
{
	char *end;

	errno = 0;
	uint64_t value = strtoull(text, &end, 0);

	if (errno != 0 || end == text || *end != '\0' || strchr(text, '-') != NULL) {
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
	uint64_t iova = number(argv[2]), length = number(argv[3]);
	iotlb_attach_options options = { .label = "peek" };
	iotlb_attachment *device = NULL;
	iotlb_reader *reader = NULL;
	int exit_status = 1;
	iotlb_status status = iotlb_set_log(complain, argv[0], IOTLB_LOG_WARN);

	if (status == IOTLB_OK)
		status = iotlb_attach(argv[1], &options, &device);
	if (status == IOTLB_OK)
		status = iotlb_reader_new(device, &reader);
	if (status == IOTLB_OK)
		exit_status = copy_out(reader, iova, length);
	else
		fprintf(stderr, "%s: %s\n", argv[0], iotlb_last_error());
	iotlb_reader_free(reader);
	iotlb_detach(device);
	return exit_status;
}
