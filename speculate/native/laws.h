/* Laws from logits in three steps, for a loop that checks once and must not allocate. */
#ifndef DRAFTSMITH_LAWS_H
#define DRAFTSMITH_LAWS_H

#include <stddef.h>
#include <stdint.h>

/* Refuse settings that are out of range. */
int32_t ds_check_processors(double temperature, int32_t top_k, double top_p);

/* Bytes of memory, aligned for a double, that ds_write_laws works in. */
size_t ds_laws_scratch_size(int32_t vocab);

/* ds_laws_from_logits, of arguments that are known to be good. */
int32_t ds_write_laws(const float *logits, int32_t n_rows, int32_t vocab, double temperature, int32_t top_k,
                      double top_p, void *memory, double *laws);

#endif
