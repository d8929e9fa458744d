/* The suffix index as a drafter: what followed the last occurrence of the latest tokens. */
#include "drafter.h"
#include "error.h"

#include <stddef.h>
#include <stdlib.h>
#include <string.h>

enum { MIN_MATCH = 2, MAX_MATCH = 32 };

typedef struct {
  ds_drafter drafter;
  ds_suffix *index;
  int32_t n_references;
  int32_t references[];
} suffix_drafter;

static int32_t begin(ds_drafter *drafter, int32_t n_tokens) {
  suffix_drafter *s = (suffix_drafter *)drafter;
  if (n_tokens < 0 || n_tokens > DS_SUFFIX_MAX_TOKENS - s->n_references)
    return ds_fail(DS_ERROR_ARGUMENT, "%d tokens behind %d of references; a suffix index holds at most %d",
                   n_tokens, s->n_references, DS_SUFFIX_MAX_TOKENS);
  ds_suffix_free(s->index);
  s->index = ds_suffix_create();
  if (!s->index) return DS_ERROR_MEMORY;
  int32_t status = ds_suffix_reserve(s->index, s->n_references + n_tokens);
  return status == DS_OK ? ds_suffix_append(s->index, s->references, s->n_references) : status;
}

static int32_t append(ds_drafter *drafter, const int32_t *tokens, int32_t n_tokens) {
  return ds_suffix_append(((suffix_drafter *)drafter)->index, tokens, n_tokens);
}

static int32_t draft(ds_drafter *drafter, const int32_t *tail, int32_t n_tail, int32_t max_draft,
                     int32_t *tokens, int32_t *support) {
  int32_t matched, count = ds_suffix_draft(((suffix_drafter *)drafter)->index, tail, n_tail, MIN_MATCH,
                                           MAX_MATCH, max_draft, tokens, &matched);
  for (int32_t i = 0; i < count; ++i) {
    if (tokens[i] == DS_END_OF_REFERENCE) return i;
    support[i] = matched + i;
  }
  return count;
}

static int32_t draft_tree(ds_drafter *drafter, const int32_t *tail, int32_t n_tail, int32_t max_nodes,
                          int32_t max_depth, int32_t *tokens, int32_t *parents, double *chances) {
  return ds_suffix_draft_tree(((suffix_drafter *)drafter)->index, tail, n_tail, MIN_MATCH, MAX_MATCH,
                              max_nodes, max_depth, tokens, parents, chances);
}

static void close(ds_drafter *drafter) {
  ds_suffix_free(((suffix_drafter *)drafter)->index);
  free(drafter);
}

ds_drafter *ds_suffix_drafter_create(const int32_t *references, int32_t n_references) {
  if (n_references < 0 || n_references > DS_SUFFIX_MAX_TOKENS || (n_references > 0 && !references)) {
    ds_fail(DS_ERROR_ARGUMENT, "%d tokens of references; 0 to %d are wanted", n_references,
            DS_SUFFIX_MAX_TOKENS);
    return NULL;
  }
  for (int32_t i = 0; i < n_references; ++i)
    if (references[i] < 0) {
      ds_fail(DS_ERROR_ARGUMENT, "references: token %d is %d, not a token id", i, references[i]);
      return NULL;
    }
  size_t size = (size_t)n_references * sizeof *references;
  suffix_drafter *s = malloc(offsetof(suffix_drafter, references) + size);
  if (!s) {
    ds_fail(DS_ERROR_MEMORY, "no memory for a drafter with %d tokens of references", n_references);
    return NULL;
  }
  s->drafter = (ds_drafter){
      .begin = begin, .append = append, .draft = draft, .close = close, .draft_tree = draft_tree};
  s->index = NULL;
  s->n_references = n_references;
  if (n_references) memcpy(s->references, references, size);
  return &s->drafter;
}

void ds_drafter_close(ds_drafter *drafter) {
  if (drafter) drafter->close(drafter);
}
