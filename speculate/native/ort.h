/* The part of ONNX Runtime's C interface that we use. Its wheels carry the library but no headers; the
 * interface is a table of functions to which releases only append, so a part of it can be declared here, each
 * member at its place. The names are ONNX Runtime's own. */
#ifndef DRAFTSMITH_ORT_H
#define DRAFTSMITH_ORT_H

#include <stddef.h>
#include <stdint.h>

typedef struct OrtStatus OrtStatus; /* NULL: fine */
typedef struct OrtEnv OrtEnv;
typedef struct OrtSession OrtSession;
typedef struct OrtSessionOptions OrtSessionOptions;
typedef struct OrtRunOptions OrtRunOptions;
typedef struct OrtMemoryInfo OrtMemoryInfo;
typedef struct OrtAllocator OrtAllocator;
typedef struct OrtValue OrtValue;
typedef struct OrtTypeInfo OrtTypeInfo;
typedef struct OrtTensorTypeAndShapeInfo OrtTensorInfo;
typedef struct OrtKernelInfo OrtKernelInfo;
typedef struct OrtKernelContext OrtKernelContext;
typedef struct OrtCustomOpDomain OrtCustomOpDomain;
typedef struct OrtCustomOp OrtCustomOp;

enum { ORT_FAIL = 1, ORT_INVALID_ARGUMENT = 2 };
enum { ORT_LOG_FATAL = 4 };
enum { ORT_ARENA_ALLOCATOR = 1, ORT_MEMORY_DEFAULT = 0 };
typedef enum {
  ORT_ANY = 0,
  ORT_FLOAT = 1,
  ORT_UINT8 = 2,
  ORT_INT32 = 6,
  ORT_INT64 = 7,
  ORT_BOOL = 9,
  ORT_BFLOAT16 = 16
} OrtElementType;
typedef enum { ORT_REQUIRED = 0, ORT_OPTIONAL = 1 } OrtCharacteristic;

typedef struct OrtApi {
  OrtStatus *(*CreateStatus)(int code, const char *message);
  void *unused_1[1];
  const char *(*GetErrorMessage)(const OrtStatus *);
  OrtStatus *(*CreateEnv)(int log_level, const char *id, OrtEnv **);
  void *unused_4[3];
  OrtStatus *(*CreateSession)(const OrtEnv *, const char *path, const OrtSessionOptions *, OrtSession **);
  void *unused_8[1];
  OrtStatus *(*Run)(OrtSession *, const OrtRunOptions *, const char *const *input_names,
                    const OrtValue *const *inputs, size_t n_inputs, const char *const *output_names,
                    size_t n_outputs, OrtValue **outputs);
  OrtStatus *(*CreateSessionOptions)(OrtSessionOptions **);
  void *unused_11[13];
  OrtStatus *(*SetIntraOpNumThreads)(OrtSessionOptions *, int);
  OrtStatus *(*SetInterOpNumThreads)(OrtSessionOptions *, int);
  OrtStatus *(*CreateCustomOpDomain)(const char *domain, OrtCustomOpDomain **);
  OrtStatus *(*CustomOpDomain_Add)(OrtCustomOpDomain *, const OrtCustomOp *);
  OrtStatus *(*AddCustomOpDomain)(OrtSessionOptions *, OrtCustomOpDomain *);
  void *unused_29[1];
  OrtStatus *(*SessionGetInputCount)(const OrtSession *, size_t *);
  OrtStatus *(*SessionGetOutputCount)(const OrtSession *, size_t *);
  void *unused_32[1];
  OrtStatus *(*SessionGetInputTypeInfo)(const OrtSession *, size_t, OrtTypeInfo **);
  OrtStatus *(*SessionGetOutputTypeInfo)(const OrtSession *, size_t, OrtTypeInfo **);
  void *unused_35[1];
  OrtStatus *(*SessionGetInputName)(const OrtSession *, size_t, OrtAllocator *, char **);
  OrtStatus *(*SessionGetOutputName)(const OrtSession *, size_t, OrtAllocator *, char **);
  void *unused_38[11];
  OrtStatus *(*CreateTensorWithDataAsOrtValue)(const OrtMemoryInfo *, void *data, size_t n_bytes,
                                               const int64_t *shape, size_t n_dims, OrtElementType,
                                               OrtValue **);
  void *unused_50[1];
  OrtStatus *(*GetTensorMutableData)(OrtValue *, void **);
  void *unused_52[3];
  OrtStatus *(*CastTypeInfoToTensorInfo)(const OrtTypeInfo *, const OrtTensorInfo **); /* not owned */
  void *unused_56[4];
  OrtStatus *(*GetTensorElementType)(const OrtTensorInfo *, OrtElementType *);
  OrtStatus *(*GetDimensionsCount)(const OrtTensorInfo *, size_t *);
  OrtStatus *(*GetDimensions)(const OrtTensorInfo *, int64_t *, size_t n_dims); /* -1: not known */
  void *unused_63[1];
  OrtStatus *(*GetTensorShapeElementCount)(const OrtTensorInfo *, size_t *);
  OrtStatus *(*GetTensorTypeAndShape)(const OrtValue *, OrtTensorInfo **);
  void *unused_66[3];
  OrtStatus *(*CreateCpuMemoryInfo)(int allocator, int memory, OrtMemoryInfo **);
  void *unused_70[6];
  OrtStatus *(*AllocatorFree)(OrtAllocator *, void *);
  void *unused_77[1];
  OrtStatus *(*GetAllocatorWithDefaultOptions)(OrtAllocator **);
  void *unused_79[6];
  OrtStatus *(*KernelInfoGetAttribute_float)(const OrtKernelInfo *, const char *name, float *);
  OrtStatus *(*KernelInfoGetAttribute_int64)(const OrtKernelInfo *, const char *name, int64_t *);
  void *unused_87[3];
  OrtStatus *(*KernelContext_GetInput)(const OrtKernelContext *, size_t, const OrtValue **);
  OrtStatus *(*KernelContext_GetOutput)(OrtKernelContext *, size_t, const int64_t *shape, size_t n_dims,
                                        OrtValue **);
  void (*ReleaseEnv)(OrtEnv *);
  void (*ReleaseStatus)(OrtStatus *);
  void (*ReleaseMemoryInfo)(OrtMemoryInfo *);
  void (*ReleaseSession)(OrtSession *);
  void (*ReleaseValue)(OrtValue *);
  void *unused_97[1];
  void (*ReleaseTypeInfo)(OrtTypeInfo *);
  void (*ReleaseTensorTypeAndShapeInfo)(OrtTensorInfo *);
  void (*ReleaseSessionOptions)(OrtSessionOptions *);
  void (*ReleaseCustomOpDomain)(OrtCustomOpDomain *);
  void *unused_102[28];
  OrtStatus *(*AddSessionConfigEntry)(OrtSessionOptions *, const char *key, const char *value);
} OrtApi;

_Static_assert(offsetof(OrtApi, Run) == 9 * sizeof(void *), "Run is member 9");
_Static_assert(offsetof(OrtApi, GetTensorTypeAndShape) == 65 * sizeof(void *), "it is member 65");
_Static_assert(offsetof(OrtApi, ReleaseTensorTypeAndShapeInfo) == 99 * sizeof(void *), "it is member 99");
_Static_assert(offsetof(OrtApi, AddSessionConfigEntry) == 130 * sizeof(void *), "it is member 130");

typedef struct {
  const OrtApi *(*GetApi)(uint32_t version);
  const char *(*GetVersionString)(void);
} OrtApiBase;

/* The version of OrtApi that the members above are all in, and that of OrtCustomOp as declared below. */
enum { ORT_API_VERSION = 17 };

struct OrtCustomOp {
  uint32_t version;
  void *(*CreateKernel)(const OrtCustomOp *, const OrtApi *, const OrtKernelInfo *);
  const char *(*GetName)(const OrtCustomOp *);
  const char *(*GetExecutionProviderType)(const OrtCustomOp *);
  OrtElementType (*GetInputType)(const OrtCustomOp *, size_t);
  size_t (*GetInputTypeCount)(const OrtCustomOp *);
  OrtElementType (*GetOutputType)(const OrtCustomOp *, size_t);
  size_t (*GetOutputTypeCount)(const OrtCustomOp *);
  void (*KernelCompute)(void *kernel, OrtKernelContext *);
  void (*KernelDestroy)(void *kernel);
  OrtCharacteristic (*GetInputCharacteristic)(const OrtCustomOp *, size_t);
  OrtCharacteristic (*GetOutputCharacteristic)(const OrtCustomOp *, size_t);
  int (*GetInputMemoryType)(const OrtCustomOp *, size_t);
  int (*GetVariadicInputMinArity)(const OrtCustomOp *);
  int (*GetVariadicInputHomogeneity)(const OrtCustomOp *);
  int (*GetVariadicOutputMinArity)(const OrtCustomOp *);
  int (*GetVariadicOutputHomogeneity)(const OrtCustomOp *);
  OrtStatus *(*CreateKernelV2)(const OrtCustomOp *, const OrtApi *, const OrtKernelInfo *, void **kernel);
  OrtStatus *(*KernelComputeV2)(void *kernel, OrtKernelContext *);
  OrtStatus *(*InferOutputShape)(const OrtCustomOp *, void *context);
  int (*GetStartVersion)(const OrtCustomOp *);
  int (*GetEndVersion)(const OrtCustomOp *);
};

#endif
