/* Reading a datastore: open, search, draft. */
#define _POSIX_C_SOURCE 200809L /* mmap, O_CLOEXEC */
#include "datastore_file.h"
#include "error.h"

#include <errno.h>
#include <fcntl.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

enum { MIN_MATCH = 2, MAX_SAMPLE = 64 };

struct ds_datastore {
  void *map;
  size_t size;
  uint64_t n_tokens, n_places;
  uint32_t vocab;
  const int32_t *tokens;
  const uint32_t *places;
};

/* ---- Opening ------------------------------------------------------------------------------------------- */

static int32_t check_header(const char *path, const ds_datastore_header *h, uint64_t size, int32_t vocab,
                            const uint8_t *tokenizer) {
  if (memcmp(h->magic, DS_DATASTORE_MAGIC, sizeof h->magic) || h->byte_order != 1)
    return ds_fail(
        DS_ERROR_ARGUMENT,
        "%s is no datastore of this version and byte order: build it again with `draftsmith datastore`",
        path);
  if (h->n_tokens > DS_DATASTORE_MOST || h->n_places > h->n_tokens ||
      size != sizeof *h + 4 * (h->n_tokens + h->n_places))
    return ds_fail(
        DS_ERROR_ARGUMENT,
        "%s has %llu bytes where its %llu tokens want others: it was cut short or damaged; copy or "
        "build it again",
        path, (unsigned long long)size, (unsigned long long)h->n_tokens);
  if (memcmp(h->tokenizer, tokenizer, sizeof h->tokenizer))
    return ds_fail(
        DS_ERROR_ARGUMENT,
        "%s was built with another tokenizer: build it again with `draftsmith datastore --bundle` and "
        "this bundle",
        path);
  if (h->vocab > (uint32_t)vocab)
    return ds_fail(DS_ERROR_ARGUMENT,
                   "%s holds token ids up to %u, outside the vocabulary of %d: build it again for this model",
                   path, h->vocab - 1, vocab);
  return DS_OK;
}

static int32_t map_file(ds_datastore *d, const char *path, int32_t vocab, const uint8_t *tokenizer) {
  int file = open(path, O_RDONLY | O_CLOEXEC);
  struct stat about;
  if (file < 0 || fstat(file, &about) != 0) {
    int reason = errno;
    if (file >= 0) close(file);
    return ds_fail(DS_ERROR_ARGUMENT, "%s cannot be opened: %s", path, strerror(reason));
  }
  d->size = (size_t)about.st_size;
  d->map = MAP_FAILED;
  if (d->size >= sizeof(ds_datastore_header)) d->map = mmap(NULL, d->size, PROT_READ, MAP_SHARED, file, 0);
  close(file);
  if (d->map == MAP_FAILED)
    return ds_fail(DS_ERROR_ARGUMENT, "%s is no datastore: %zu bytes, or no file that can be mapped", path,
                   d->size);
  const ds_datastore_header *h = d->map;
  int32_t status = check_header(path, h, d->size, vocab, tokenizer);
  if (status != DS_OK) return status;
  d->n_tokens = h->n_tokens;
  d->n_places = h->n_places;
  d->vocab = h->vocab;
  d->tokens = (const int32_t *)(h + 1);
  d->places = (const uint32_t *)(d->tokens + d->n_tokens);
  posix_madvise(d->map, d->size, POSIX_MADV_RANDOM); /* advice only */
  return DS_OK;
}

ds_datastore *ds_datastore_open(const char *path, int32_t vocab, const uint8_t *tokenizer) {
  if (!path || !tokenizer || vocab < 1) {
    ds_fail(DS_ERROR_ARGUMENT, "a path, a vocabulary (%d) and a tokenizer's hash are wanted", vocab);
    return NULL;
  }
  ds_datastore *d = calloc(1, sizeof *d);
  if (!d) {
    ds_fail(DS_ERROR_MEMORY, "no memory for a datastore");
    return NULL;
  }
  d->map = MAP_FAILED;
  if (map_file(d, path, vocab, tokenizer) == DS_OK) return d;
  ds_datastore_free(d);
  return NULL;
}

void ds_datastore_free(ds_datastore *d) {
  if (!d) return;
  if (d->map != MAP_FAILED) munmap(d->map, d->size);
  free(d);
}

int64_t ds_datastore_n_tokens(const ds_datastore *d) { return d ? (int64_t)d->n_tokens : 0; }

/* ---- Searching ----------------------------------------------------------------------------------------- */

/* A context: its `length` last tokens count. */
typedef struct {
  const int32_t *end;
  int32_t length;
} context;

/* The i-th place, or one without text before it where the file is damaged. */
static uint32_t place_at(const ds_datastore *d, uint64_t i) {
  return d->places[i] < d->n_tokens ? d->places[i] : 0;
}

/* How many tokens a place has in common with the context, and how it is ordered behind them: negative if
 * it comes before the context. */
static int32_t match(const ds_datastore *d, uint32_t place, context c, int *order) {
  for (int32_t i = 0; i < c.length; ++i) {
    int32_t token = ds_token_before(d->tokens, place, i), wanted = c.end[-1 - i];
    if (token != wanted) {
      *order = token < wanted ? -1 : 1;
      return i;
    }
  }
  *order = 0;
  return c.length;
}

/* The first place from `low` on that is not before the context; or, `past` it, the first that is behind. */
static uint64_t find_place(const ds_datastore *d, context c, uint64_t low, int past) {
  uint64_t high = d->n_places;
  while (low < high) {
    uint64_t middle = low + (high - low) / 2;
    int order;
    match(d, place_at(d, middle), c, &order);
    if (order < past)
      low = middle + 1;
    else
      high = middle;
  }
  return low;
}

/* ---- Drafting ------------------------------------------------------------------------------------------ */

/* The token that most places go on with behind `offset` drafted ones, and to how many that cut them down:
 * those stay, in order. Of equals the one that comes first. */
static int32_t follow_most(const ds_datastore *d, uint32_t *places, int32_t *n_places, int32_t offset) {
  int32_t tokens[MAX_SAMPLE], best = DS_END_OF_REFERENCE, most = 0;
  for (int32_t i = 0; i < *n_places; ++i) {
    uint64_t at = (uint64_t)places[i] + (uint64_t)offset;
    tokens[i] = at < d->n_tokens ? d->tokens[at] : DS_END_OF_REFERENCE;
    if ((uint32_t)tokens[i] >= d->vocab) tokens[i] = DS_END_OF_REFERENCE;
  }
  for (int32_t i = 0; i < *n_places; ++i) {
    int32_t count = 0;
    for (int32_t k = i; k < *n_places; ++k) count += tokens[k] == tokens[i];
    if (count > most && tokens[i] != DS_END_OF_REFERENCE) {
      most = count;
      best = tokens[i];
    }
  }
  int32_t kept = 0;
  for (int32_t i = 0; i < *n_places; ++i)
    if (tokens[i] == best) places[kept++] = places[i];
  *n_places = most;
  return best;
}

int32_t ds_datastore_draft(const ds_datastore *d, const int32_t *tokens, int32_t n_context, int32_t max_draft,
                           int32_t *draft, int32_t *support) {
  if (!d || n_context < 0 || (n_context > 0 && !tokens) || max_draft < 0 ||
      (max_draft > 0 && (!draft || !support)))
    return ds_fail(DS_ERROR_ARGUMENT,
                   "a datastore, %d tokens of context and room for %d drafted ones are wanted", n_context,
                   max_draft);
  context c = {tokens + n_context, n_context < DS_DATASTORE_MAX_MATCH ? n_context : DS_DATASTORE_MAX_MATCH};
  if (c.length < MIN_MATCH) return 0;
  uint64_t here = find_place(d, c, 0, 0);
  int32_t longest = 0;
  for (uint64_t i = here ? here - 1 : 0; i <= here && i < d->n_places;
       ++i) { /* the neighbours of the context */
    int order;
    int32_t length = match(d, place_at(d, i), c, &order);
    if (length > longest) longest = length;
  }
  if (longest < MIN_MATCH) return 0;

  c.length = longest;
  uint64_t first = find_place(d, c, 0, 0), count = find_place(d, c, first, 1) - first;
  uint32_t places[MAX_SAMPLE];
  int32_t sampled = count < MAX_SAMPLE ? (int32_t)count : MAX_SAMPLE, live = sampled, drafted = 0;
  for (int32_t i = 0; i < sampled; ++i)
    places[i] = place_at(d, first + (uint64_t)i * count / (uint64_t)sampled);
  if (max_draft > DS_DATASTORE_MAX_DRAFT) max_draft = DS_DATASTORE_MAX_DRAFT;
  while (drafted < max_draft) {
    int32_t token = follow_most(d, places, &live, drafted);
    if (!live) break;
    int32_t rests_on = (longest + drafted) * live / sampled;
    draft[drafted] = token;
    support[drafted++] = rests_on > 0 ? rests_on : 1;
  }
  return drafted;
}

/* ---- As a drafter -------------------------------------------------------------------------------------- */

typedef struct {
  ds_drafter drafter;
  const ds_datastore *datastore;
  int32_t recent[DS_DATASTORE_MAX_MATCH]; /* the latest tokens that stand */
  int32_t n_recent;
} datastore_drafter;

static int32_t begin(ds_drafter *drafter, int32_t n_tokens) {
  (void)n_tokens;
  ((datastore_drafter *)drafter)->n_recent = 0;
  return DS_OK;
}

/* Behind recent [n_recent], the last tokens of an addition; returns how many there are then. */
static int32_t extend(int32_t *recent, int32_t n_recent, const int32_t *tokens, int32_t n_tokens) {
  int32_t added = n_tokens < DS_DATASTORE_MAX_MATCH ? n_tokens : DS_DATASTORE_MAX_MATCH;
  int32_t kept = n_recent + added < DS_DATASTORE_MAX_MATCH ? n_recent : DS_DATASTORE_MAX_MATCH - added;
  memmove(recent, recent + (n_recent - kept), (size_t)kept * sizeof *recent);
  if (added) memcpy(recent + kept, tokens + (n_tokens - added), (size_t)added * sizeof *recent);
  return kept + added;
}

static int32_t append(ds_drafter *drafter, const int32_t *tokens, int32_t n_tokens) {
  datastore_drafter *s = (datastore_drafter *)drafter;
  s->n_recent = extend(s->recent, s->n_recent, tokens, n_tokens);
  return DS_OK;
}

static int32_t draft(ds_drafter *drafter, const int32_t *tail, int32_t n_tail, int32_t max_draft,
                     int32_t *tokens, int32_t *support) {
  const datastore_drafter *s = (datastore_drafter *)drafter;
  int32_t text[DS_DATASTORE_MAX_MATCH];
  memcpy(text, s->recent, sizeof text);
  int32_t length = extend(text, s->n_recent, tail, n_tail);
  return ds_datastore_draft(s->datastore, text, length, max_draft, tokens, support);
}

static void close_drafter(ds_drafter *drafter) { free(drafter); }

ds_drafter *ds_datastore_drafter_create(const ds_datastore *datastore) {
  if (!datastore) {
    ds_fail(DS_ERROR_ARGUMENT, "a drafter wants a datastore");
    return NULL;
  }
  datastore_drafter *s = calloc(1, sizeof *s);
  if (!s) {
    ds_fail(DS_ERROR_MEMORY, "no memory for a datastore's drafter");
    return NULL;
  }
  s->drafter = (ds_drafter){.begin = begin, .append = append, .draft = draft, .close = close_drafter};
  s->datastore = datastore;
  return &s->drafter;
}
