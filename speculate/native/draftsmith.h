#ifndef DRAFTSMITH_H
#define DRAFTSMITH_H
#include <stdint.h>
#ifdef __cplusplus
extern "C" {
#endif
#define DS_API __attribute__((visibility("default")))
DS_API const char* ds_version(void);
#ifdef __cplusplus
}
#endif
#endif
