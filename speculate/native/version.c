#include "draftsmith.h"
const char* ds_version(void) { return "0.1.0"; }
