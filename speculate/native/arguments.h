/* Checks that the verdicts share. */
#ifndef DRAFTSMITH_ARGUMENTS_H
#define DRAFTSMITH_ARGUMENTS_H

#include "draftsmith.h"
#include "error.h"

/* `name`: what the caller knows them as. */
static inline int32_t ds_check_tokens(const char *name, int32_t n, const int32_t *tokens, int32_t vocab) {
  for (int32_t i = 0; i < n; ++i)
    if (tokens[i] < 0 || tokens[i] >= vocab)
      return ds_fail(DS_ERROR_ARGUMENT, "%s[%d] is %d, outside the vocabulary of %d", name, i, tokens[i],
                     vocab);
  return DS_OK;
}

static inline int32_t ds_check_uniforms(int32_t n, const double *uniforms) {
  for (int32_t i = 0; i < n; ++i)
    if (!(uniforms[i] >= 0 && uniforms[i] < 1))
      return ds_fail(DS_ERROR_ARGUMENT, "uniforms[%d] is %.17g, outside [0, 1)", i, uniforms[i]);
  return DS_OK;
}

#endif
