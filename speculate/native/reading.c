/* Calls of the levels' engines, and the laws that their logits give. */
#define _POSIX_C_SOURCE 200809L /* clock_gettime */
#include "decoder.h"
#include "error.h"
#include "laws.h"

#include <stddef.h>
#include <string.h>
#include <time.h>

double ds_now_ms(void) {
  struct timespec t;
  clock_gettime(CLOCK_MONOTONIC, &t);
  return (double)t.tv_sec * 1e3 + (double)t.tv_nsec * 1e-6;
}

int32_t ds_shared_vocab(const ds_decoder *d, const level *l) {
  return l->engine->vocab < d->vocab ? l->engine->vocab : d->vocab;
}

int32_t ds_read_rows(ds_decoder *d, level *l, ds_rows rows, int32_t n_logits, const float **logits) {
  if (l->engine->vocab < d->vocab) {
    /* An id of the target's padding may be unknown to a drafter with less of it; any other will do there. */
    for (int32_t i = 0; i < rows.n; ++i)
      d->shown[i] = rows.ids[i] < l->engine->vocab ? rows.ids[i] : l->engine->vocab - 1;
    rows.ids = d->shown;
  }
  if (logits) *logits = NULL;
  l->engine->wants_leaders = ds_is_greedy(d) && ds_shared_vocab(d, l) == l->engine->vocab;
  int32_t status = l->engine->forward(l->engine, rows.n, rows.ids, rows.start, rows.positions, rows.mask,
                                      n_logits, logits);
  l->engine->wants_leaders = 0;
  if (status < 0) return status;
  if (logits && !*logits) return ds_fail(DS_ERROR_ENGINE, "an engine gave no logits");
  l->stats.calls += 1;
  l->stats.rows += rows.n;
  return DS_OK;
}

/* `length`: where the proposal begins, if these rows reach it; its nodes then are the last rows. */
static int32_t read_on(ds_decoder *d, level *l, int32_t n_rows, int32_t length, int32_t n_logits,
                       const float **logits) {
  ds_rows rows = {n_rows, l->kept, d->ids + l->kept, NULL, NULL};
  if (l->kept + n_rows > length && !d->tree.is_chain) {
    ds_tree_lay_out(&d->tree, l->kept, length, d->positions, d->mask);
    rows.positions = d->positions;
    rows.mask = d->mask;
  }
  int32_t status = ds_read_rows(d, l, rows, n_logits, logits);
  if (status == DS_OK) l->kept += n_rows;
  return status;
}

int32_t ds_read_proposal(ds_decoder *d, level *l, int32_t length, const float **logits) {
  double began = ds_now_ms();
  int first = l->kept == 0;
  int32_t status = DS_OK, end = length + d->tree.n_nodes, n_logits = d->tree.n_nodes + 1;
  while (status == DS_OK && end - l->kept >= DS_PREFILL_ROWS + n_logits)
    status = read_on(d, l, DS_PREFILL_ROWS, length, 1, logits);
  if (status == DS_OK) status = read_on(d, l, end - l->kept, length, n_logits, logits);
  *(first ? &l->stats.prefill_ms : &l->stats.forward_ms) += ds_now_ms() - began;
  return status;
}

int32_t ds_write_laws_of(ds_decoder *d, const level *l, const float *logits, int32_t n_rows, double *laws) {
  const ds_sampling *s = &d->sampling;
  int32_t known = ds_shared_vocab(d, l), status = DS_OK;
  for (int32_t r = 0; r < n_rows && status == DS_OK; ++r) {
    double *law = laws + (size_t)r * (size_t)d->vocab;
    const float *row = logits + (size_t)r * (size_t)l->engine->vocab;
    status = ds_is_greedy(d)
                 ? ds_write_laws(row, 1, known, 1, 0, 1, d->scratch, law)
                 : ds_write_laws(row, 1, known, s->temperature, s->top_k, s->top_p, d->scratch, law);
    memset(law + known, 0, (size_t)(d->vocab - known) * sizeof *law);
  }
  return status;
}
