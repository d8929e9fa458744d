/* Writing a datastore in bounded memory: tokens go to the file as they come; then the places of one chunk
 * of tokens after the other are sorted in memory and kept in a second file; then the chunks are merged.
 *
 * Texts repeat themselves, so a place is compared by DS_DATASTORE_MAX_MATCH tokens and no further: then no
 * text, however monotonous, makes sorting slow. Within that depth the sort is Bentley and Sedgewick's
 * multikey quicksort (1997), which compares one token at a time. The tokens are mapped: memory that the
 * system may take back.
 */
#define _POSIX_C_SOURCE 200809L /* mmap, fileno */
#include "datastore_file.h"
#include "error.h"

#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

enum { CHUNK_TOKENS = 1 << 24, BUFFER = 1 << 16, SMALL = 12, TOLD_EVERY = 1 << 20 };

struct ds_datastore_writer {
  FILE *file, *runs; /* runs: the sorted chunks, in a file that has no name any more */
  uint64_t n_tokens, n_places;
  uint32_t vocab;
  int32_t chunk_tokens;
  int finished;
  uint8_t tokenizer[DS_TOKENIZER_BYTES];
};

static int32_t fail_to_write(void) {
  return ds_fail(DS_ERROR_ARGUMENT, "the datastore cannot be written: %s", strerror(errno));
}

/* ---- Tokens -------------------------------------------------------------------------------------------- */

static int32_t write_header(ds_datastore_writer *w) {
  ds_datastore_header h = {
      .byte_order = 1, .vocab = w->vocab, .n_tokens = w->n_tokens, .n_places = w->n_places};
  memcpy(h.magic, DS_DATASTORE_MAGIC, sizeof h.magic);
  memcpy(h.tokenizer, w->tokenizer, sizeof h.tokenizer);
  return fwrite(&h, sizeof h, 1, w->file) == 1 ? DS_OK : fail_to_write();
}

/* The datastore and, beside it where there must be room, the file for the sorted chunks. */
static int32_t open_files(ds_datastore_writer *w, const char *path) {
  static const char ending[] = ".runs";
  size_t length = strlen(path);
  char *runs = malloc(length + sizeof ending);
  if (!runs) return ds_fail(DS_ERROR_MEMORY, "no memory to write a datastore");
  memcpy(runs, path, length);
  memcpy(runs + length, ending, sizeof ending);
  w->file = fopen(path, "w+b");
  w->runs = w->file ? fopen(runs, "w+b") : NULL;
  int reason = errno;
  if (w->runs) remove(runs); /* it lives as long as it is open */
  free(runs);
  return w->runs ? DS_OK : ds_fail(DS_ERROR_ARGUMENT, "%s cannot be written: %s", path, strerror(reason));
}

ds_datastore_writer *ds_datastore_writer_create(const char *path, const uint8_t *tokenizer,
                                                int32_t chunk_tokens) {
  if (!path || !tokenizer || chunk_tokens < 0) {
    ds_fail(DS_ERROR_ARGUMENT,
            "a path, a tokenizer's hash and chunks of %d tokens, not fewer than 0, are wanted", chunk_tokens);
    return NULL;
  }
  ds_datastore_writer *w = calloc(1, sizeof *w);
  if (!w) {
    ds_fail(DS_ERROR_MEMORY, "no memory to write a datastore");
    return NULL;
  }
  w->chunk_tokens = chunk_tokens ? chunk_tokens : CHUNK_TOKENS;
  memcpy(w->tokenizer, tokenizer, sizeof w->tokenizer);
  if (open_files(w, path) == DS_OK && write_header(w) == DS_OK) return w;
  ds_datastore_writer_free(w);
  return NULL;
}

void ds_datastore_writer_free(ds_datastore_writer *w) {
  if (!w) return;
  if (w->file) fclose(w->file);
  if (w->runs) fclose(w->runs);
  free(w);
}

int32_t ds_datastore_writer_append(ds_datastore_writer *w, const int32_t *tokens, int32_t n_tokens) {
  if (!w || w->finished || n_tokens < 0 || (n_tokens > 0 && !tokens))
    return ds_fail(DS_ERROR_ARGUMENT, "append wants a datastore that is being written and %d tokens",
                   n_tokens);
  if (w->n_tokens + (uint64_t)n_tokens > DS_DATASTORE_MOST)
    return ds_fail(DS_ERROR_ARGUMENT, "a datastore holds at most %llu tokens",
                   (unsigned long long)DS_DATASTORE_MOST);
  uint32_t vocab = w->vocab;
  for (int32_t i = 0; i < n_tokens; ++i) {
    if (tokens[i] < 0) return ds_fail(DS_ERROR_ARGUMENT, "token %d is %d, not a token id", i, tokens[i]);
    if (tokens[i] != DS_END_OF_REFERENCE && (uint32_t)tokens[i] >= vocab) vocab = (uint32_t)tokens[i] + 1;
  }
  if (fwrite(tokens, sizeof *tokens, (size_t)n_tokens, w->file) != (size_t)n_tokens) return fail_to_write();
  w->n_tokens += (uint64_t)n_tokens;
  w->vocab = vocab;
  return DS_OK;
}

/* ---- Sorting one chunk --------------------------------------------------------------------------------- */

/* Whether place a comes before b; the first `depth` tokens are known to be equal. */
static int is_before(const int32_t *tokens, uint32_t a, uint32_t b, int32_t depth) {
  for (; depth < DS_DATASTORE_MAX_MATCH; ++depth) {
    int32_t x = ds_token_before(tokens, a, depth), y = ds_token_before(tokens, b, depth);
    if (x != y) return x < y;
  }
  return a < b;
}

static void sort_few(const int32_t *tokens, uint32_t *places, size_t n, int32_t depth) {
  for (size_t i = 1; i < n; ++i) {
    uint32_t place = places[i];
    size_t k = i;
    for (; k > 0 && is_before(tokens, place, places[k - 1], depth); --k) places[k] = places[k - 1];
    places[k] = place;
  }
}

static int compare_places(const void *a, const void *b) {
  uint32_t x = *(const uint32_t *)a, y = *(const uint32_t *)b;
  return (x > y) - (x < y);
}

static void swap(uint32_t *a, uint32_t *b) {
  uint32_t kept = *a;
  *a = *b;
  *b = kept;
}

static int32_t middle_of(int32_t a, int32_t b, int32_t c) {
  if (a > b) return c > a ? a : c > b ? c : b;
  return c > b ? b : c > a ? c : a;
}

/* Calls itself for the smaller parts and goes on with the largest, so it is never nested deep. */
static void sort_places(const int32_t *tokens, uint32_t *places, size_t n, int32_t depth) {
  while (n > SMALL && depth < DS_DATASTORE_MAX_MATCH) {
    int32_t pivot =
        middle_of(ds_token_before(tokens, places[0], depth), ds_token_before(tokens, places[n / 2], depth),
                  ds_token_before(tokens, places[n - 1], depth));
    size_t less = 0, same = 0, more = n; /* [0, less) < pivot, [less, same) are it, [more, n) > pivot */
    while (same < more) {
      int32_t token = ds_token_before(tokens, places[same], depth);
      if (token < pivot)
        swap(&places[less++], &places[same++]);
      else if (token > pivot)
        swap(&places[same], &places[--more]);
      else
        ++same;
    }
    struct {
      uint32_t *places;
      size_t n;
      int32_t depth;
    } part[3] = {
        {places, less, depth}, {places + less, more - less, depth + 1}, {places + more, n - more, depth}};
    int largest = 0;
    for (int i = 1; i < 3; ++i)
      if (part[i].n > part[largest].n) largest = i;
    for (int i = 0; i < 3; ++i)
      if (i != largest) sort_places(tokens, part[i].places, part[i].n, part[i].depth);
    places = part[largest].places;
    n = part[largest].n;
    depth = part[largest].depth;
  }
  if (n <= SMALL)
    sort_few(tokens, places, n, depth);
  else
    qsort(places, n, sizeof *places, compare_places); /* equal as far as is compared: in order of place */
}

/* ---- Merging ------------------------------------------------------------------------------------------- */

/* A sorted chunk: what is left of it. */
typedef struct {
  const uint32_t *next, *end;
} run;

/* Let heap[i], whose run has moved on, sink to where it belongs. The first run has the first place. */
static void sink(const int32_t *tokens, run *heap, size_t n, size_t i) {
  for (size_t child; (child = 2 * i + 1) < n; i = child) {
    if (child + 1 < n && is_before(tokens, *heap[child + 1].next, *heap[child].next, 0)) ++child;
    if (!is_before(tokens, *heap[child].next, *heap[i].next, 0)) return;
    run kept = heap[i];
    heap[i] = heap[child];
    heap[child] = kept;
  }
}

typedef void tell(int64_t done, int64_t total);

static int32_t merge(ds_datastore_writer *w, const int32_t *tokens, run *heap, size_t n_runs,
                     tell *progress) {
  uint32_t buffer[BUFFER];
  size_t n = 0;
  for (size_t i = n_runs; i-- > 0;) sink(tokens, heap, n_runs, i);
  for (uint64_t done = 0; n_runs > 0; ++done) {
    buffer[n++] = *heap->next++;
    if (heap->next == heap->end) *heap = heap[--n_runs];
    sink(tokens, heap, n_runs, 0);
    if (n == BUFFER || n_runs == 0) {
      if (fwrite(buffer, sizeof *buffer, n, w->file) != n) return fail_to_write();
      n = 0;
    }
    if (progress && done % TOLD_EVERY == 0)
      progress((int64_t)(w->n_tokens + done), (int64_t)(w->n_tokens + w->n_places));
  }
  return DS_OK;
}

/* ---- All together -------------------------------------------------------------------------------------- */

/* Sort the places of each chunk into `runs`; counts [chunk]. */
static int32_t write_runs(ds_datastore_writer *w, const int32_t *tokens, uint32_t *places, size_t *counts,
                          tell *progress) {
  uint64_t chunk = (uint64_t)w->chunk_tokens;
  for (uint64_t from = 0; from < w->n_tokens; from += chunk) {
    uint64_t to = w->n_tokens - from < chunk ? w->n_tokens : from + chunk;
    size_t n = 0;
    for (uint64_t i = from; i < to; ++i)
      if (ds_is_place(tokens, i, w->n_tokens)) places[n++] = (uint32_t)i;
    sort_places(tokens, places, n, 0);
    if (fwrite(places, sizeof *places, n, w->runs) != n) return fail_to_write();
    *counts++ = n;
    w->n_places += n;
    if (progress) progress((int64_t)to, (int64_t)(2 * w->n_tokens));
  }
  return fflush(w->runs) == 0 ? DS_OK : fail_to_write();
}

static int32_t merge_runs(ds_datastore_writer *w, const int32_t *tokens, const size_t *counts, run *heap,
                          size_t n_chunks, tell *progress) {
  if (w->n_places == 0) return DS_OK;
  size_t size = (size_t)w->n_places * sizeof(uint32_t), n_runs = 0;
  void *map = mmap(NULL, size, PROT_READ, MAP_SHARED, fileno(w->runs), 0);
  if (map == MAP_FAILED) return fail_to_write();
  const uint32_t *next = map;
  for (size_t i = 0; i < n_chunks; ++i) {
    if (counts[i]) heap[n_runs++] = (run){next, next + counts[i]};
    next += counts[i];
  }
  int32_t status = merge(w, tokens, heap, n_runs, progress);
  munmap(map, size);
  return status;
}

static int32_t index_tokens(ds_datastore_writer *w, const int32_t *tokens, tell *progress) {
  size_t n_chunks = (size_t)((w->n_tokens + (uint64_t)w->chunk_tokens - 1) / (uint64_t)w->chunk_tokens);
  size_t room = w->n_tokens < (uint64_t)w->chunk_tokens ? (size_t)w->n_tokens : (size_t)w->chunk_tokens;
  uint32_t *places = malloc(room * sizeof *places);
  size_t *counts = malloc(n_chunks * sizeof *counts);
  run *heap = malloc(n_chunks * sizeof *heap);
  int32_t status =
      places && counts && heap ? DS_OK : ds_fail(DS_ERROR_MEMORY, "no memory to sort %zu tokens", room);
  if (status == DS_OK) status = write_runs(w, tokens, places, counts, progress);
  free(places);
  if (status == DS_OK) status = merge_runs(w, tokens, counts, heap, n_chunks, progress);
  free(counts);
  free(heap);
  return status;
}

int32_t ds_datastore_writer_finish(ds_datastore_writer *w, tell *progress) {
  if (!w || w->finished) return ds_fail(DS_ERROR_ARGUMENT, "finish wants a datastore that is being written");
  if (w->n_tokens == 0) return ds_fail(DS_ERROR_ARGUMENT, "a datastore of no tokens; some text is wanted");
  w->finished = 1;
  if (fflush(w->file) != 0) return fail_to_write();
  size_t size = sizeof(ds_datastore_header) + (size_t)w->n_tokens * sizeof(int32_t);
  void *map = mmap(NULL, size, PROT_READ, MAP_SHARED, fileno(w->file), 0);
  if (map == MAP_FAILED) return fail_to_write();
  int32_t status = index_tokens(w, (const int32_t *)((const ds_datastore_header *)map + 1), progress);
  munmap(map, size);
  if (status != DS_OK) return status;
  if (fseek(w->file, 0, SEEK_SET) != 0) return fail_to_write();
  status = write_header(w);
  if (status == DS_OK && fflush(w->file) != 0) status = fail_to_write();
  return status;
}
