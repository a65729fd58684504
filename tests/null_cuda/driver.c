/* The driver of the null device: what torch, Triton and inductor ask of libcuda and of NVML.
 *
 * Nothing runs; kernels are reported to runtime.c by their names. The types are left out, as all
 * are handles, numbers or addresses of them.
 */
#define _GNU_SOURCE
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

#define PUBLIC __attribute__((visibility("default")))
#define QUIET(name) PUBLIC int name() { return 0; }
#define MIB ((size_t)1 << 20)
#define GRANULARITY (2 * MIB)
enum { DEVICE = 2, OUT_OF_MEMORY = 2, NOT_SUPPORTED = 3 };

/* Of runtime.c, which is preloaded. */
extern void null_cuda_launched(const char *) __attribute__((weak));
extern void null_cuda_hold(void *, size_t, int) __attribute__((weak));
extern size_t null_cuda_let_go(void *) __attribute__((weak));
extern int null_cuda_use(long) __attribute__((weak));

static void *const CONTEXT = (void *)64;

PUBLIC int cuDriverGetVersion(int *version) { return *version = 13000, 0; }
PUBLIC int cuDeviceGet(int *device, int ordinal) { return *device = 0; }
PUBLIC int cuDeviceGetCount(int *count) { return *count = 1, 0; }
PUBLIC int cuCtxGetCurrent(void **context) { return *context = CONTEXT, 0; }
PUBLIC int cuStreamGetCtx(void *stream, void **context) { return *context = CONTEXT, 0; }
PUBLIC int cuCtxGetDevice(int *device) { return *device = 0; }
PUBLIC int cuCtxGetLimit(size_t *value, int limit) { return *value = 0, 0; }
PUBLIC int cuDevicePrimaryCtxRetain(void **context, int device) { return *context = CONTEXT, 0; }
PUBLIC int cuDevicePrimaryCtxGetState(int device, unsigned *flags, int *active) {
    return *flags = 0, *active = 1, 0;
}
PUBLIC int cuDeviceGetAttribute(int *value, int attribute, int device) {
    static const int values[][2] = {
        {75, 9},       /* compute capability, major */
        {76, 0},       /* minor */
        {16, 132},     /* multiprocessors */
        {97, 232448},  /* shared memory of a block, opted in */
        {8, 49152},    /* shared memory of a block */
        {10, 32},      /* threads of a warp */
        {12, 65536},   /* registers of a block */
        {82, 65536},   /* registers of a multiprocessor */
        {36, 2619000}, /* memory's clock, kHz */
        {13, 1980000}, /* clock, kHz */
        {37, 5120},    /* memory's bus, bits */
    };
    *value = 1;
    for (size_t i = 0; i < sizeof values / sizeof *values; i++)
        if (values[i][0] == attribute) *value = values[i][1];
    return 0;
}
PUBLIC int cuGetErrorString(int error, const char **text) { return *text = "null device", 0; }
PUBLIC int cuGetErrorName(int error, const char **text) { return *text = "null device", 0; }
QUIET(cuInit)
QUIET(cuLogsRegisterCallback)
QUIET(cuLogsUnregisterCallback)
QUIET(cuDevicePrimaryCtxRelease)
QUIET(cuCtxSetCurrent)
QUIET(cuCtxSetLimit)
QUIET(cuCtxPushCurrent)
QUIET(cuCtxPopCurrent)
QUIET(cuStreamSynchronize)

/* ---- Kernels: a function is a copy of its name ---- */

PUBLIC int cuModuleLoadData(void **module, const void *image) { return *module = CONTEXT, 0; }
PUBLIC int cuModuleLoadDataEx(void **module, const void *image) { return *module = CONTEXT, 0; }
PUBLIC int cuModuleLoad(void **module, const char *path) { return *module = CONTEXT, 0; }
PUBLIC int cuModuleGetFunction(void **function, void *module, const char *name) {
    return *function = strdup(name), 0;
}
PUBLIC int cuFuncGetModule(void **module, void *function) { return *module = CONTEXT, 0; }
PUBLIC int cuFuncGetAttribute(int *value, int attribute, void *function) {
    enum { THREADS = 0, REGISTERS = 4 };
    *value = attribute == THREADS ? 1024 : attribute == REGISTERS ? 32 : 0;
    return 0;
}
static int launched(const char *name) {
    if (null_cuda_launched) null_cuda_launched(name);
    return 0;
}
PUBLIC int cuLaunchKernel(void *function) { return launched(function); }
PUBLIC int cuLaunchCooperativeKernel(void *function) { return launched(function); }
PUBLIC int cuLaunchKernelEx(const void *configuration, void *function) {
    return launched(function);
}
PUBLIC int cuOccupancyMaxActiveClusters(int *count, void *function, const void *configuration) {
    return *count = 16, 0;
}
PUBLIC int cuOccupancyMaxActiveBlocksPerMultiprocessor(int *count, void *function, int threads,
                                                       size_t shared) {
    return *count = 2, 0;
}
QUIET(cuModuleUnload)
QUIET(cuFuncSetAttribute)
QUIET(cuFuncSetCacheConfig)
QUIET(cuTensorMapEncodeTiled)
QUIET(cuTensorMapEncodeIm2col)

/* ---- Memory: what expandable segments of torch's allocator are made of ---- */

PUBLIC int cuPointerGetAttribute(void *value, int attribute, uintptr_t address) {
    enum { DEVICE_POINTER = 3 };
    if (attribute == DEVICE_POINTER) *(uintptr_t *)value = address;
    else *(int *)value = 0;
    return 0;
}
PUBLIC int cuMemGetAllocationGranularity(size_t *bytes, const void *of, int option) {
    return *bytes = GRANULARITY, 0;
}
PUBLIC int cuMemAddressReserve(uintptr_t *address, size_t bytes, size_t alignment, uintptr_t at,
                               unsigned long long flags) {
    void *found = mmap(NULL, bytes + GRANULARITY, PROT_READ | PROT_WRITE,
                       MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (found == MAP_FAILED) return OUT_OF_MEMORY;
    *address = ((uintptr_t)found + GRANULARITY - 1) & ~(GRANULARITY - 1);
    null_cuda_hold((void *)*address, bytes, DEVICE);
    return 0;
}
/* The handle of an allocation is its size. */
PUBLIC int cuMemCreate(unsigned long long *made, size_t bytes, const void *of,
                       unsigned long long flags) {
    return *made = bytes, null_cuda_use(bytes) ? 0 : OUT_OF_MEMORY;
}
PUBLIC int cuMemRelease(unsigned long long made) { return null_cuda_use(-(long)made), 0; }
PUBLIC int cuMemGetAddressRange_v2(uintptr_t *base, size_t *bytes, uintptr_t address) {
    return *base = address, *bytes = 0, 0;
}
PUBLIC int cuMemAddressFree(uintptr_t address, size_t bytes) {
    return null_cuda_let_go((void *)address), munmap((void *)address, bytes);
}
QUIET(cuMemMap)
QUIET(cuMemUnmap)
QUIET(cuMemSetAccess)

/* ---- NVML: what those segments ask, whether memory may be shared between nodes ---- */

PUBLIC int nvmlDeviceGetCount_v2(unsigned *count) { return *count = 1, 0; }
PUBLIC int nvmlDeviceGetHandleByPciBusId_v2(const char *id, void **device) {
    return *device = CONTEXT, 0;
}
PUBLIC int nvmlDeviceGetGpuFabricInfoV(void *device, void *found) { return NOT_SUPPORTED; }
PUBLIC int nvmlDeviceGetComputeRunningProcesses(void) { return NOT_SUPPORTED; }
QUIET(nvmlInit)
QUIET(nvmlInit_v2)
