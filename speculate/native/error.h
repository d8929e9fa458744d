/* How a function of this library reports failure. */
#ifndef DRAFTSMITH_ERROR_H
#define DRAFTSMITH_ERROR_H

#include <stdint.h>

/* Keep the message for ds_error_message and return `status`. */
__attribute__((format(printf, 2, 3))) int32_t ds_fail(int32_t status, const char *format, ...);

#endif
