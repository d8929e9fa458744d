/* Writing a datastore in bounded memory: tokens go to the file as they come; then the places of one chunk
 * of tokens after the other are sorted in memory and kept in a second file; then the chunks are merged.
 *
 * Texts repeat themselves, so a place is compared by DS_DATASTORE_MAX_MATCH tokens and no further: then no
 * text, however monotonous, makes sorting slow. Within that depth the sort is Bentley and Sedgewick's
 * multikey quicksort (1997), which compares one token at a time, behind one pass that deals the places into
 * buckets by the last token. The tokens are mapped: memory that the system may take back.
 *
 * Threads share a chunk by buckets, and the merge by places that divide it; the file is the same for any number.
 */
#define _POSIX_C_SOURCE 200809L /* mmap, fileno, pwrite */
#include "datastore_file.h"
#include "error.h"

#include <errno.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

enum { CHUNK_TOKENS = 1 << 24, BUFFER = 1 << 16, SMALL = 12, TOLD_EVERY = 1 << 20 };
enum { MAX_BUCKETS = 1 << 20, MAX_THREADS = 8, LEAST_SHARE = 1 << 16 /* places of a thread */ };

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

static void swap(uint32_t *a, uint32_t *b) {
  uint32_t kept = *a;
  *a = *b;
  *b = kept;
}

/* By the places themselves, from `bit` down: radix exchange, which takes no memory, as many a qsort does, and is slow
 * for no order. */
static void sort_equal(uint32_t *places, size_t n, uint32_t bit) {
  for (; n > 1 && bit; bit >>= 1) {
    size_t low = 0, high = n;
    while (low < high)
      if (!(places[low] & bit))
        ++low;
      else if (places[high - 1] & bit)
        --high;
      else
        swap(&places[low++], &places[--high]);
    sort_equal(places + low, n - low, bit >> 1);
    n = low;
  }
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
    sort_equal(places, n, 1U << 31);
}

/* ---- Threads ------------------------------------------------------------------------------------------- */

static int n_threads_for(uint64_t n_places) {
  long n = sysconf(_SC_NPROCESSORS_ONLN);
  uint64_t most = n_places / LEAST_SHARE + 1;
  if (n > MAX_THREADS) n = MAX_THREADS;
  if ((uint64_t)n > most) n = (long)most;
  return n < 1 ? 1 : (int)n;
}

/* Do parts [n] of `size` bytes each; those for which no thread is to be had, here. */
static void do_parts(void *(*work)(void *), void *parts, size_t size, int n) {
  pthread_t threads[MAX_THREADS];
  int begun[MAX_THREADS] = {0};
  for (int i = 1; i < n; ++i)
    begun[i] = pthread_create(&threads[i], NULL, work, (char *)parts + (size_t)i * size) == 0;
  for (int i = 0; i < n; ++i) {
    if (begun[i])
      pthread_join(threads[i], NULL);
    else
      work((char *)parts + (size_t)i * size);
  }
}

/* ---- Sorting one chunk, by buckets --------------------------------------------------------------------- */

/* Buckets are in the order of their tokens, each of 2^shift of them. */
static uint32_t bucket_of(const int32_t *tokens, uint64_t place, int shift) {
  return (uint32_t)tokens[place - 1] >> shift;
}

typedef struct {
  const int32_t *tokens;
  uint32_t *places;
  const uint32_t *ends; /* of the buckets, in places */
  uint32_t first, past; /* buckets */
  int32_t depth;        /* to which those of a bucket are known to be equal */
} share;

static void *sort_buckets(void *part) {
  const share *s = part;
  for (uint32_t b = s->first; b < s->past; ++b) {
    uint32_t from = b ? s->ends[b - 1] : 0;
    sort_places(s->tokens, s->places + from, s->ends[b] - from, s->depth);
  }
  return NULL;
}

/* Sort the places of tokens [from, to) into `places`; how many. ends: room for n_buckets. */
static size_t sort_chunk(const ds_datastore_writer *w, const int32_t *tokens, uint64_t from, uint64_t to,
                         uint32_t *places, uint32_t *ends, uint32_t n_buckets, int shift) {
  memset(ends, 0, n_buckets * sizeof *ends);
  for (uint64_t i = from; i < to; ++i)
    if (ds_is_place(tokens, i, w->n_tokens)) ++ends[bucket_of(tokens, i, shift)];
  uint32_t n = 0;
  for (uint32_t b = 0; b < n_buckets; ++b) { /* for now where each begins */
    uint32_t count = ends[b];
    ends[b] = n;
    n += count;
  }
  for (uint64_t i = from; i < to; ++i)
    if (ds_is_place(tokens, i, w->n_tokens)) places[ends[bucket_of(tokens, i, shift)]++] = (uint32_t)i;
  share parts[MAX_THREADS];
  int n_parts = n_threads_for(n);
  uint32_t bucket = 0;
  for (int p = 0; p < n_parts; ++p) {
    uint32_t first = bucket;
    uint64_t wanted = (uint64_t)n * ((uint64_t)p + 1) / (uint64_t)n_parts;
    while (bucket < n_buckets && (p == n_parts - 1 || ends[bucket] <= wanted)) ++bucket;
    parts[p] = (share){tokens, places, ends, first, bucket, shift ? 0 : 1};
  }
  do_parts(sort_buckets, parts, sizeof *parts, n_parts);
  return n;
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

/* Some of the places of every run, and where in the file they belong. */
typedef struct {
  const ds_datastore_writer *writer;
  const int32_t *tokens;
  run *heap;
  size_t n_runs;
  uint64_t first;
  tell *progress; /* of one piece alone, that of the calling thread */
  int n_pieces;
  int error; /* errno, or 0 */
  uint32_t buffer[BUFFER];
} piece;

static int write_at(int file, const void *data, size_t size, off_t at) {
  for (ssize_t n; size > 0; data = (const char *)data + n, size -= (size_t)n, at += n)
    if ((n = pwrite(file, data, size, at)) <= 0) return n < 0 ? errno : EIO;
  return 0;
}

static void *merge(void *part) {
  piece *m = part;
  const ds_datastore_writer *w = m->writer;
  off_t at =
      (off_t)(sizeof(ds_datastore_header) + w->n_tokens * sizeof(int32_t) + m->first * sizeof(uint32_t));
  size_t n = 0, n_runs = 0;
  for (size_t i = 0; i < m->n_runs; ++i)
    if (m->heap[i].next < m->heap[i].end) m->heap[n_runs++] = m->heap[i];
  for (size_t i = n_runs; i-- > 0;) sink(m->tokens, m->heap, n_runs, i);
  for (uint64_t done = 0; n_runs > 0 && !m->error; ++done) {
    m->buffer[n++] = *m->heap->next++;
    if (m->heap->next == m->heap->end) *m->heap = m->heap[--n_runs];
    sink(m->tokens, m->heap, n_runs, 0);
    if (n == BUFFER || n_runs == 0) {
      m->error = write_at(fileno(w->file), m->buffer, n * sizeof *m->buffer, at);
      at += (off_t)(n * sizeof *m->buffer);
      n = 0;
    }
    if (m->progress && done % TOLD_EVERY == 0) {
      uint64_t all = done * (uint64_t)m->n_pieces;
      if (all > w->n_places) all = w->n_places;
      m->progress((int64_t)(w->n_tokens + all), (int64_t)(w->n_tokens + w->n_places));
    }
  }
  return NULL;
}

/* The first of a run that is not before `place`. */
static const uint32_t *find_in_run(const int32_t *tokens, run r, uint32_t place) {
  while (r.next < r.end) {
    const uint32_t *middle = r.next + (r.end - r.next) / 2;
    if (is_before(tokens, *middle, place, 0))
      r.next = middle + 1;
    else
      r.end = middle;
  }
  return r.next;
}

/* Merge runs [n_runs], none empty: pieces end before evenly spaced places of the first run. */
static int32_t merge_pieces(ds_datastore_writer *w, const int32_t *tokens, run *runs, size_t n_runs,
                            tell *progress) {
  int n = n_threads_for(w->n_places), error = 0;
  piece *pieces = calloc((size_t)n, sizeof *pieces);
  run *heaps = malloc((size_t)n * n_runs * sizeof *heaps), first = runs[0];
  if (!pieces || !heaps) {
    free(pieces);
    free(heaps);
    return ds_fail(DS_ERROR_MEMORY, "no memory to merge %zu chunks", n_runs);
  }
  uint64_t done = 0;
  for (int p = 0; p < n; ++p) {
    piece *m = &pieces[p];
    m->writer = w;
    m->tokens = tokens;
    m->heap = heaps + (size_t)p * n_runs;
    m->n_runs = n_runs;
    m->first = done;
    m->progress = p == 0 ? progress : NULL;
    m->n_pieces = n;
    for (size_t i = 0; i < n_runs; ++i) {
      const uint32_t *end = runs[i].end;
      if (p < n - 1) end = find_in_run(tokens, runs[i], first.next[(first.end - first.next) * (p + 1) / n]);
      m->heap[i] = (run){runs[i].next, end};
      done += (uint64_t)(end - runs[i].next);
      runs[i].next = end;
    }
  }
  do_parts(merge, pieces, sizeof *pieces, n);
  for (int p = 0; p < n; ++p)
    if (pieces[p].error) error = pieces[p].error;
  free(pieces);
  free(heaps);
  errno = error;
  return error ? fail_to_write() : DS_OK;
}

/* ---- All together -------------------------------------------------------------------------------------- */

/* Sort the places of each chunk into `runs`; counts [chunk]. */
static int32_t write_runs(ds_datastore_writer *w, const int32_t *tokens, uint32_t *places, size_t *counts,
                          tell *progress) {
  uint64_t chunk = (uint64_t)w->chunk_tokens;
  int shift = 0;
  while (w->vocab >> shift >= MAX_BUCKETS) ++shift;
  uint32_t n_buckets = (w->vocab >> shift) + 1;
  uint32_t *ends = malloc(n_buckets * sizeof *ends);
  int32_t status = ends ? DS_OK : ds_fail(DS_ERROR_MEMORY, "no memory for %u kinds of token", n_buckets);
  for (uint64_t from = 0; from < w->n_tokens && status == DS_OK; from += chunk) {
    uint64_t to = w->n_tokens - from < chunk ? w->n_tokens : from + chunk;
    size_t n = sort_chunk(w, tokens, from, to, places, ends, n_buckets, shift);
    if (fwrite(places, sizeof *places, n, w->runs) != n) status = fail_to_write();
    *counts++ = n;
    w->n_places += n;
    if (progress) progress((int64_t)to, (int64_t)(2 * w->n_tokens));
  }
  free(ends);
  if (status != DS_OK) return status;
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
  int32_t status = merge_pieces(w, tokens, heap, n_runs, progress);
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
