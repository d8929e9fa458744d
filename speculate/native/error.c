/* The calling thread's last error, in words; and the version. */
#include "error.h"
#include "draftsmith.h"

#include <stdarg.h>
#include <stdio.h>

#ifndef DS_VERSION
#define DS_VERSION "unknown"
#endif

static _Thread_local char message[512];

int32_t ds_fail(int32_t status, const char *format, ...) {
  va_list arguments;
  va_start(arguments, format);
  vsnprintf(message, sizeof message, format, arguments);
  va_end(arguments);
  for (char *c = message; *c; ++c) /* others' words may come in several lines; the promise is one */
    if (*c == '\n' || *c == '\r') *c = ' ';
  return status;
}

void ds_set_error(const char *words) { ds_fail(DS_OK, "%s", words ? words : ""); }

const char *ds_error_message(void) { return message; }

const char *ds_version(void) { return DS_VERSION; }
