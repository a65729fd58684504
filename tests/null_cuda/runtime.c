/* A CUDA runtime, cuBLAS and NCCL without a device, to be preloaded.
 *
 * The host works as with a GPU: it dispatches, checks, allocates, copies, launches and waits. Device
 * memory is address space of the host, so that copies copy; kernels, matrix products and collectives
 * are counted and compute nothing. The other ranks of a communicator hold what this one holds. While
 * a stream is captured, what cannot be part of a graph fails as it does on a device.
 *
 * What torch asks for and is not defined here is filled in by device.py: it ends the program.
 */
#define _GNU_SOURCE
/* Half precision is C++, which is not needed, and so are headers of another package. */
#define __CUDA_FP16_H__
#define __CUDA_BF16_H__
#include <cublasLt.h>
#include <cublas_v2.h>
#include <cuda_runtime_api.h>
#include <dlfcn.h>
#include <nccl.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

#undef cudaStreamGetCaptureInfo
#define PUBLIC __attribute__((visibility("default")))
/* A call under another name, so that the headers' declarations need not be repeated. */
#define CALL(name, body) \
    PUBLIC int own_##name(void) __asm__(#name); \
    int own_##name(void) { body return 0; }
#define QUIET(name) CALL(name, )
#define MIB ((size_t)1 << 20)
/* What the driver of an H100 with 80 GB reports. */
#define DEVICE_BYTES (81559 * MIB)
/* Copies on the device and between ranks move no more than the host may want to read. */
#define LARGEST_COPY MIB

/* ---- What happened ---- */

enum event {
    LAUNCH, GRAPH_LAUNCH, GEMM, H2D_PAGEABLE, H2D_PINNED, D2H_PAGEABLE, D2H_PINNED, D2D, MEMSET,
    WAIT, COLLECTIVE, COLLECTIVE_OF_HOST_MEMORY, MALLOC, EVENTS
};
static const char *const event_names[EVENTS] = {
    "launch", "graph launch", "gemm", "pageable copy to device", "pinned copy to device",
    "pageable copy to host", "pinned copy to host", "copy on device", "memset",
    "wait", "collective", "collective of host memory", "malloc",
};
/* What follows is read and written under the lock: autograd and NCCL have threads of their own. */
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static long counts[EVENTS];
static FILE *trace;
static struct CUgraph_st { long launches; } *captured;
static cudaStream_t captured_stream;

PUBLIC const char *null_cuda_name(int event) { return event < EVENTS ? event_names[event] : NULL; }
PUBLIC long null_cuda_count(int event) { return counts[event]; }

/* Write what happens to `path`, a line for each event; NULL ends it. */
PUBLIC void null_cuda_trace(const char *path) {
    pthread_mutex_lock(&lock);
    if (trace) fclose(trace);
    trace = path ? fopen(path, "w") : NULL;
    pthread_mutex_unlock(&lock);
}

static void note(enum event event, const char *what, size_t bytes) {
    pthread_mutex_lock(&lock);
    if (captured) captured->launches++;
    else counts[event]++;
    if (trace) fprintf(trace, "%s\t%s\t%zu\n", event_names[event], what, bytes);
    pthread_mutex_unlock(&lock);
}

/* Of torch or NVIDIA's libraries, a call that is not known here. */
PUBLIC void null_cuda_missing(const char *name) {
    fprintf(stderr, "null CUDA device: %s is missing; write it in tests/null_cuda.\n", name);
    abort();
}

/* ---- Memory ---- */

enum place { PAGEABLE, PINNED, DEVICE };
static struct { char *first; size_t bytes; enum place place; } ranges[1 << 14];
static int range_count;
static size_t device_bytes;

/* Also called by the driver, for memory that torch maps itself. */
PUBLIC void null_cuda_hold(void *first, size_t bytes, int place) {
    pthread_mutex_lock(&lock);
    int i = 0;
    while (i < range_count && ranges[i].first) i++;
    if (i == range_count && range_count++ == sizeof ranges / sizeof *ranges) abort();
    ranges[i].first = first, ranges[i].bytes = bytes, ranges[i].place = place;
    pthread_mutex_unlock(&lock);
}

PUBLIC size_t null_cuda_let_go(void *first) {
    size_t bytes = 0;
    pthread_mutex_lock(&lock);
    for (int i = 0; i < range_count; i++)
        if (ranges[i].first == first) ranges[i].first = NULL, bytes = ranges[i].bytes;
    pthread_mutex_unlock(&lock);
    return bytes;
}

static enum place place_of(const void *address) {
    enum place found = PAGEABLE;
    pthread_mutex_lock(&lock);
    for (int i = 0; i < range_count && found == PAGEABLE; i++) {
        char *first = ranges[i].first;
        if (first && (char *)address >= first && (char *)address < first + ranges[i].bytes)
            found = ranges[i].place;
    }
    pthread_mutex_unlock(&lock);
    return found;
}

/* Take up or give back memory of the device; 0 if there is not so much. */
PUBLIC int null_cuda_use(long bytes) {
    pthread_mutex_lock(&lock);
    int fits = device_bytes + bytes <= DEVICE_BYTES;
    if (fits) device_bytes += bytes;
    pthread_mutex_unlock(&lock);
    if (fits && bytes > 0) note(MALLOC, __func__, bytes);
    return fits;
}

PUBLIC cudaError_t cudaMalloc(void **address, size_t bytes) {
    if (!null_cuda_use(bytes)) return cudaErrorMemoryAllocation;
    /* Pages come into being when they are touched, and hardly any are. */
    *address = mmap(NULL, bytes + 1, PROT_READ | PROT_WRITE,
                    MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (*address == MAP_FAILED) return cudaErrorMemoryAllocation;
    null_cuda_hold(*address, bytes, DEVICE);
    return cudaSuccess;
}
PUBLIC cudaError_t cudaFree(void *address) {
    size_t bytes = null_cuda_let_go(address);
    if (bytes) munmap(address, bytes + 1), null_cuda_use(-(long)bytes);
    return cudaSuccess;
}
PUBLIC cudaError_t cudaHostAlloc(void **address, size_t bytes, unsigned flags) {
    *address = calloc(1, bytes + 1);
    null_cuda_hold(*address, bytes, PINNED);
    return cudaSuccess;
}
PUBLIC cudaError_t cudaFreeHost(void *address) {
    return null_cuda_let_go(address), free(address), cudaSuccess;
}
PUBLIC cudaError_t cudaHostRegister(void *address, size_t bytes, unsigned flags) {
    return null_cuda_hold(address, bytes, PINNED), cudaSuccess;
}
PUBLIC cudaError_t cudaHostUnregister(void *address) {
    return null_cuda_let_go(address), cudaSuccess;
}
PUBLIC cudaError_t cudaMemGetInfo(size_t *free_bytes, size_t *total) {
    *total = DEVICE_BYTES, *free_bytes = DEVICE_BYTES - device_bytes;
    return cudaSuccess;
}
PUBLIC cudaError_t cudaPointerGetAttributes(struct cudaPointerAttributes *found, const void *at) {
    enum place place = place_of(at);
    memset(found, 0, sizeof *found);
    found->type = place == DEVICE   ? cudaMemoryTypeDevice
                  : place == PINNED ? cudaMemoryTypeHost
                                    : cudaMemoryTypeUnregistered;
    found->devicePointer = place == PAGEABLE ? NULL : (void *)at;
    found->hostPointer = place == PINNED ? (void *)at : NULL;
    return cudaSuccess;
}

static cudaError_t copy(void *to, const void *from, size_t bytes, const char *call) {
    enum place target = place_of(to), source = place_of(from);
    enum event event = target == DEVICE && source == DEVICE   ? D2D
                       : target == DEVICE && source == PINNED ? H2D_PINNED
                       : target == DEVICE                     ? H2D_PAGEABLE
                       : target == PINNED                     ? D2H_PINNED
                                                              : D2H_PAGEABLE;
    if (captured && (event == H2D_PAGEABLE || event == D2H_PAGEABLE))
        return cudaErrorStreamCaptureUnsupported;
    note(event, call, bytes);
    if (event != D2D || bytes <= LARGEST_COPY) memmove(to, from, bytes);
    return cudaSuccess;
}
static cudaError_t waited(const char *call) {
    if (captured) return cudaErrorStreamCaptureUnsupported;
    note(WAIT, call, 0);
    return cudaSuccess;
}
PUBLIC cudaError_t cudaMemcpyAsync(void *to, const void *from, size_t bytes,
                                   enum cudaMemcpyKind kind, cudaStream_t stream) {
    return copy(to, from, bytes, __func__);
}
PUBLIC cudaError_t cudaMemcpyPeerAsync(void *to, int to_device, const void *from, int from_device,
                                       size_t bytes, cudaStream_t stream) {
    return copy(to, from, bytes, __func__);
}
PUBLIC cudaError_t cudaMemcpy(void *to, const void *from, size_t bytes, enum cudaMemcpyKind kind) {
    cudaError_t error = copy(to, from, bytes, __func__);
    return error ? error : waited(__func__);
}
PUBLIC cudaError_t cudaMemsetAsync(void *to, int value, size_t bytes, cudaStream_t stream) {
    note(MEMSET, __func__, bytes);
    if (bytes <= LARGEST_COPY) memset(to, value, bytes);
    return cudaSuccess;
}
PUBLIC cudaError_t cudaMemset(void *to, int value, size_t bytes) {
    return cudaMemsetAsync(to, value, bytes, NULL);
}

/* ---- Kernels ---- */

static struct { const void *function; const char *name; } *kernels;
static int kernel_count;

PUBLIC void **__cudaRegisterFatBinary(void *binary) { return calloc(1, sizeof(void *)); }
PUBLIC void __cudaRegisterFatBinaryEnd(void **handle) {}
PUBLIC void __cudaUnregisterFatBinary(void **handle) {}
PUBLIC void __cudaRegisterVar(void **handle, char *own, char *address, const char *name, int outer,
                              size_t bytes, int constant, int global) {}
PUBLIC char __cudaInitModule(void **handle) { return 1; }
PUBLIC void __cudaRegisterFunction(void **handle, const char *function, char *device_function,
                                   const char *name, int limit, void *thread, void *block,
                                   void *block_dim, void *grid_dim, int *warp) {
    pthread_mutex_lock(&lock);
    if (kernel_count % 65536 == 0)
        kernels = realloc(kernels, (kernel_count + 65536) * sizeof *kernels);
    kernels[kernel_count].function = function, kernels[kernel_count++].name = name;
    pthread_mutex_unlock(&lock);
}
static __thread struct { dim3 grid, block; size_t shared; void *stream; } launch;
PUBLIC unsigned __cudaPushCallConfiguration(dim3 grid, dim3 block, size_t shared, void *stream) {
    launch.grid = grid, launch.block = block, launch.shared = shared, launch.stream = stream;
    return 0;
}
PUBLIC cudaError_t __cudaPopCallConfiguration(dim3 *grid, dim3 *block, size_t *shared, void *to) {
    *grid = launch.grid, *block = launch.block, *shared = launch.shared;
    *(void **)to = launch.stream;
    return cudaSuccess;
}
PUBLIC cudaError_t __cudaGetKernel(cudaKernel_t *kernel, const void *function) {
    *kernel = (cudaKernel_t)function;
    return cudaSuccess;
}
static cudaError_t launched(const void *function) {
    const char *name = "?";
    pthread_mutex_lock(&lock);
    for (int i = 0; trace && i < kernel_count; i++)
        if (kernels[i].function == function) name = kernels[i].name;
    pthread_mutex_unlock(&lock);
    note(LAUNCH, name, 0);
    return cudaSuccess;
}
/* Called by the driver: Triton's kernels and inductor's. */
PUBLIC void null_cuda_launched(const char *name) { note(LAUNCH, name, 0); }
PUBLIC cudaError_t cudaLaunchKernel(const void *function, dim3 grid, dim3 block, void **arguments,
                                    size_t shared, cudaStream_t stream) {
    return launched(function);
}
PUBLIC cudaError_t __cudaLaunchKernel(cudaKernel_t kernel, dim3 grid, dim3 block, void **arguments,
                                      size_t shared, cudaStream_t stream) {
    return launched(kernel);
}
PUBLIC cudaError_t cudaLaunchKernelExC(const cudaLaunchConfig_t *configuration,
                                       const void *function, void **arguments) {
    return launched(function);
}
PUBLIC cudaError_t cudaLaunchHostFunc(cudaStream_t stream, cudaHostFn_t call, void *with) {
    return call(with), cudaSuccess;
}
PUBLIC cudaError_t cudaStreamAddCallback(cudaStream_t stream, cudaStreamCallback_t call, void *with,
                                         unsigned flags) {
    return call(stream, cudaSuccess, with), cudaSuccess;
}
PUBLIC cudaError_t cudaFuncGetAttributes(struct cudaFuncAttributes *found, const void *function) {
    memset(found, 0, sizeof *found);
    found->binaryVersion = found->ptxVersion = 90;
    found->maxThreadsPerBlock = 1024, found->numRegs = 32;
    found->maxDynamicSharedSizeBytes = 49152;
    return cudaSuccess;
}
PUBLIC cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(
    int *blocks, const void *function, int threads, size_t shared, unsigned flags) {
    *blocks = 2;
    return cudaSuccess;
}
PUBLIC cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int *blocks, const void *function,
                                                                 int threads, size_t shared) {
    *blocks = 2;
    return cudaSuccess;
}
PUBLIC cudaError_t cudaGetSymbolAddress(void **address, const void *symbol) {
    return cudaMalloc(address, MIB);
}
QUIET(cudaFuncSetAttribute)
QUIET(cudaKernelSetAttributeForDevice)

/* ---- The device, streams and events ---- */

PUBLIC cudaError_t cudaGetDevice(int *device) { return *device = 0, cudaSuccess; }
PUBLIC cudaError_t cudaGetDeviceCount(int *count) { return *count = 1, cudaSuccess; }
PUBLIC cudaError_t cudaDriverGetVersion(int *version) { return *version = CUDART_VERSION, 0; }
PUBLIC cudaError_t cudaRuntimeGetVersion(int *version) { return *version = CUDART_VERSION, 0; }
PUBLIC cudaError_t cudaGetDeviceProperties(struct cudaDeviceProp *of, int device) {
    memset(of, 0, sizeof *of);
    strcpy(of->name, "NVIDIA H100 80GB HBM3 (null device)");
    of->major = 9, of->minor = 0, of->multiProcessorCount = 132, of->totalGlobalMem = DEVICE_BYTES;
    of->maxThreadsPerMultiProcessor = 2048, of->maxBlocksPerMultiProcessor = 32;
    of->regsPerMultiprocessor = of->regsPerBlock = 65536, of->warpSize = 32;
    of->sharedMemPerBlock = 49152, of->sharedMemPerBlockOptin = 232448;
    of->sharedMemPerMultiprocessor = 233472, of->l2CacheSize = 50 * MIB;
    of->maxThreadsPerBlock = of->maxThreadsDim[0] = of->maxThreadsDim[1] = 1024;
    of->maxThreadsDim[2] = 64, of->maxGridSize[0] = 2147483647;
    of->maxGridSize[1] = of->maxGridSize[2] = 65535, of->textureAlignment = 512;
    of->canMapHostMemory = of->unifiedAddressing = of->managedMemory = 1;
    of->concurrentManagedAccess = of->cooperativeLaunch = 1;
    return cudaSuccess;
}
PUBLIC cudaError_t cudaDeviceGetAttribute(int *value, enum cudaDeviceAttr attribute, int device) {
    switch ((int)attribute) {
    case cudaDevAttrComputeCapabilityMajor: *value = 9; break;
    case cudaDevAttrComputeCapabilityMinor: *value = 0; break;
    case cudaDevAttrMultiProcessorCount: *value = 132; break;
    case cudaDevAttrMaxSharedMemoryPerBlock: *value = 49152; break;
    case cudaDevAttrMaxSharedMemoryPerBlockOptin: *value = 232448; break;
    case cudaDevAttrMaxThreadsPerMultiProcessor: *value = 2048; break;
    case cudaDevAttrMaxGridDimX: *value = 2147483647; break;
    case cudaDevAttrWarpSize: *value = 32; break;
    default: *value = 1;
    }
    return cudaSuccess;
}
PUBLIC cudaError_t cudaDeviceGetPCIBusId(char *id, int bytes, int device) {
    return snprintf(id, bytes, "0000:00:00.0"), cudaSuccess;
}
PUBLIC cudaError_t cudaDeviceCanAccessPeer(int *can, int device, int peer) { return *can = 0, 0; }
PUBLIC cudaError_t cudaDeviceGetDefaultMemPool(cudaMemPool_t *pool, int device) {
    return *pool = (cudaMemPool_t)16, cudaSuccess;
}
PUBLIC cudaError_t cudaDeviceGetStreamPriorityRange(int *least, int *greatest) {
    return *least = 0, *greatest = -5, cudaSuccess;
}
QUIET(cudaSetDevice)
QUIET(cudaDeviceEnablePeerAccess)
QUIET(cudaMemPoolSetAttribute)
QUIET(cudaMemPoolSetAccess)
QUIET(cudaMemPoolTrimTo)
QUIET(cudaProfilerStart)
QUIET(cudaProfilerStop)
QUIET(cudaGetLastError)
QUIET(cudaPeekAtLastError)
PUBLIC const char *cudaGetErrorName(cudaError_t error) {
    return error == cudaErrorMemoryAllocation          ? "cudaErrorMemoryAllocation"
           : error == cudaErrorStreamCaptureUnsupported ? "cudaErrorStreamCaptureUnsupported"
                                                        : "an error of the null device";
}
PUBLIC const char *cudaGetErrorString(cudaError_t error) {
    return error == cudaErrorMemoryAllocation          ? "out of memory"
           : error == cudaErrorStreamCaptureUnsupported ? "operation not permitted when stream is "
                                                          "capturing"
                                                        : "an error of the null device";
}

static void *handle(void) {
    static long made = 64;
    return (void *)__atomic_add_fetch(&made, 16, __ATOMIC_RELAXED);
}
PUBLIC cudaError_t cudaStreamCreateWithPriority(cudaStream_t *stream, unsigned flags, int priority) {
    return *stream = handle(), cudaSuccess;
}
PUBLIC cudaError_t cudaStreamCreateWithFlags(cudaStream_t *stream, unsigned flags) {
    return *stream = handle(), cudaSuccess;
}
PUBLIC cudaError_t cudaStreamCreate(cudaStream_t *stream) { return *stream = handle(), 0; }
PUBLIC cudaError_t cudaStreamGetPriority(cudaStream_t stream, int *priority) {
    return *priority = 0, cudaSuccess;
}
PUBLIC cudaError_t cudaEventCreate(cudaEvent_t *event) { return *event = handle(), cudaSuccess; }
PUBLIC cudaError_t cudaEventCreateWithFlags(cudaEvent_t *event, unsigned flags) {
    return *event = handle(), cudaSuccess;
}
PUBLIC cudaError_t cudaEventElapsedTime(float *ms, cudaEvent_t from, cudaEvent_t to) {
    return *ms = 0, cudaSuccess;
}
PUBLIC cudaError_t cudaDeviceSynchronize(void) { return waited(__func__); }
PUBLIC cudaError_t cudaStreamSynchronize(cudaStream_t stream) { return waited(__func__); }
PUBLIC cudaError_t cudaEventSynchronize(cudaEvent_t event) { return waited(__func__); }
QUIET(cudaStreamDestroy)
QUIET(cudaStreamWaitEvent)
QUIET(cudaStreamQuery)
QUIET(cudaEventDestroy)
QUIET(cudaEventRecord)
QUIET(cudaEventRecordWithFlags)
QUIET(cudaEventQuery)

/* ---- Graphs: one capture at a time ---- */

PUBLIC cudaError_t cudaStreamBeginCapture(cudaStream_t stream, enum cudaStreamCaptureMode mode) {
    pthread_mutex_lock(&lock);
    captured_stream = stream, captured = calloc(1, sizeof *captured);
    pthread_mutex_unlock(&lock);
    return cudaSuccess;
}
PUBLIC cudaError_t cudaStreamEndCapture(cudaStream_t stream, cudaGraph_t *graph) {
    pthread_mutex_lock(&lock);
    *graph = captured, captured = NULL;
    pthread_mutex_unlock(&lock);
    return cudaSuccess;
}
PUBLIC cudaError_t cudaStreamIsCapturing(cudaStream_t stream, enum cudaStreamCaptureStatus *status) {
    int active = captured && stream == captured_stream;
    *status = active ? cudaStreamCaptureStatusActive : cudaStreamCaptureStatusNone;
    return cudaSuccess;
}
PUBLIC cudaError_t cudaStreamGetCaptureInfo(cudaStream_t stream,
                                            enum cudaStreamCaptureStatus *status,
                                            unsigned long long *id, cudaGraph_t *graph,
                                            const cudaGraphNode_t **nodes,
                                            const cudaGraphEdgeData **edges, size_t *count) {
    if (id) *id = (unsigned long long)captured;
    if (graph) *graph = captured;
    if (count) *count = 0;
    return cudaStreamIsCapturing(stream, status);
}
PUBLIC cudaError_t cudaGraphGetNodes(cudaGraph_t graph, cudaGraphNode_t *nodes, size_t *count) {
    return *count = graph->launches, cudaSuccess;
}
PUBLIC cudaError_t cudaGraphInstantiateWithFlags(cudaGraphExec_t *made, cudaGraph_t graph,
                                                 unsigned long long flags) {
    return *made = handle(), cudaSuccess;
}
PUBLIC cudaError_t cudaGraphLaunch(cudaGraphExec_t graph, cudaStream_t stream) {
    return note(GRAPH_LAUNCH, __func__, 0), cudaSuccess;
}
PUBLIC cudaError_t cudaUserObjectCreate(cudaUserObject_t *made, void *with, cudaHostFn_t destroy,
                                        unsigned references, unsigned flags) {
    return *made = handle(), cudaSuccess;
}
QUIET(cudaThreadExchangeStreamCaptureMode)
QUIET(cudaGraphRetainUserObject)
QUIET(cudaUserObjectRelease)
QUIET(cudaGraphExecDestroy)
QUIET(cudaGraphDestroy)

static void unknown(void) { null_cuda_missing("a call of the driver, looked up by its name,"); }
PUBLIC cudaError_t cudaGetDriverEntryPointByVersion(const char *name, void **function,
                                                    unsigned version, unsigned long long flags,
                                                    enum cudaDriverEntryPointQueryResult *result) {
    void *driver = dlopen("libcuda.so.1", RTLD_LAZY);
    *function = driver ? dlsym(driver, name) : NULL;
    if (!*function) *function = unknown;
    if (result) *result = cudaDriverEntryPointSuccess;
    return cudaSuccess;
}

/* ---- cuBLAS ---- */

#define PRODUCT(name) CALL(name, note(GEMM, #name, 0);)
PRODUCT(cublasGemmEx)
PRODUCT(cublasGemmStridedBatchedEx)
PRODUCT(cublasSgemm_v2)
PRODUCT(cublasDgemm_v2)
PRODUCT(cublasSgemmEx)
PRODUCT(cublasSgemmStridedBatched)
PRODUCT(cublasDgemmStridedBatched)
PRODUCT(cublasSgemv_v2)
PRODUCT(cublasDgemv_v2)
PRODUCT(cublasDotEx)
PRODUCT(cublasSdot_v2)
PRODUCT(cublasDdot_v2)
PRODUCT(cublasLtMatmul)
PUBLIC cublasStatus_t cublasCreate_v2(cublasHandle_t *made) { return *made = handle(), 0; }
PUBLIC cublasStatus_t cublasGetMathMode(cublasHandle_t of, cublasMath_t *mode) {
    return *mode = CUBLAS_DEFAULT_MATH, 0;
}
PUBLIC cublasStatus_t cublasGetPointerMode_v2(cublasHandle_t of, cublasPointerMode_t *mode) {
    return *mode = CUBLAS_POINTER_MODE_HOST, 0;
}
QUIET(cublasDestroy_v2)
QUIET(cublasSetStream_v2)
QUIET(cublasSetWorkspace_v2)
QUIET(cublasSetMathMode)
QUIET(cublasSetPointerMode_v2)
QUIET(cublasSetSmCountTarget)

PUBLIC size_t cublasLtGetVersion(void) { return CUBLAS_VERSION; }
PUBLIC cublasStatus_t cublasLtCreate(cublasLtHandle_t *made) { return *made = handle(), 0; }
PUBLIC cublasStatus_t cublasLtMatmulDescCreate(cublasLtMatmulDesc_t *made,
                                               cublasComputeType_t compute, cudaDataType_t scale) {
    return *made = handle(), 0;
}
PUBLIC cublasStatus_t cublasLtMatmulPreferenceCreate(cublasLtMatmulPreference_t *made) {
    return *made = handle(), 0;
}
PUBLIC cublasStatus_t cublasLtMatrixLayoutCreate(cublasLtMatrixLayout_t *made, cudaDataType type,
                                                 uint64_t rows, uint64_t columns, int64_t stride) {
    return *made = handle(), 0;
}
PUBLIC cublasStatus_t cublasLtMatmulAlgoGetHeuristic(
    cublasLtHandle_t of, cublasLtMatmulDesc_t product, cublasLtMatrixLayout_t a,
    cublasLtMatrixLayout_t b, cublasLtMatrixLayout_t c, cublasLtMatrixLayout_t d,
    cublasLtMatmulPreference_t preference, int wanted, cublasLtMatmulHeuristicResult_t results[],
    int *found) {
    memset(results, 0, sizeof *results);
    return *found = 1, 0;
}
QUIET(cublasLtDestroy)
QUIET(cublasLtMatmulDescSetAttribute)
QUIET(cublasLtMatmulDescDestroy)
QUIET(cublasLtMatmulPreferenceSetAttribute)
QUIET(cublasLtMatmulPreferenceDestroy)
QUIET(cublasLtMatrixLayoutSetAttribute)
QUIET(cublasLtMatrixLayoutDestroy)

/* ---- NVRTC: what is compiled where it is called. The code of a kernel is its name ---- */

struct _nvrtcProgram { char *kernel; };

PUBLIC int nvrtcVersion(int *major, int *minor) {
    return *major = CUDART_VERSION / 1000, *minor = CUDART_VERSION % 1000 / 10, 0;
}
PUBLIC int nvrtcGetNumSupportedArchs(int *count) { return *count = 1, 0; }
PUBLIC int nvrtcGetSupportedArchs(int *found) { return *found = 90, 0; }
PUBLIC int nvrtcCreateProgram(struct _nvrtcProgram **made, const char *source, const char *name,
                              int headers, const char *const *texts, const char *const *names) {
    *made = calloc(1, sizeof **made);
    return 0;
}
PUBLIC int nvrtcAddNameExpression(struct _nvrtcProgram *of, const char *kernel) {
    return of->kernel = strdup(kernel), 0;
}
PUBLIC int nvrtcGetLoweredName(struct _nvrtcProgram *of, const char *kernel, const char **name) {
    return *name = of->kernel, 0;
}
PUBLIC int nvrtcGetCUBINSize(struct _nvrtcProgram *of, size_t *bytes) { return *bytes = 1, 0; }
PUBLIC int nvrtcGetCUBIN(struct _nvrtcProgram *of, char *to) { return *to = 0; }
PUBLIC int nvrtcDestroyProgram(struct _nvrtcProgram **of) {
    return free((*of)->kernel), free(*of), 0;
}
PUBLIC const char *nvrtcGetErrorString(int error) { return "an error of the null device"; }
QUIET(nvrtcCompileProgram)

/* ---- NCCL ---- */

struct ncclComm { int ranks, rank; };

static size_t width_of(ncclDataType_t type) {
    switch (type) {
    case ncclInt64: case ncclUint64: case ncclFloat64: return 8;
    case ncclInt32: case ncclUint32: case ncclFloat32: return 4;
    case ncclFloat16: case ncclBfloat16: return 2;
    default: return 1;
    }
}
/* `bytes` arrive at `to` from a rank that holds what lies at `from`. */
static void collective(const char *call, const void *from, void *to, size_t bytes) {
    if ((bytes && from && place_of(from) != DEVICE) || (bytes && to && place_of(to) != DEVICE))
        note(COLLECTIVE_OF_HOST_MEMORY, call, bytes);
    note(COLLECTIVE, call, bytes);
    if (from && to && from != to && bytes <= LARGEST_COPY) memmove(to, from, bytes);
}
PUBLIC ncclResult_t ncclAllReduce(const void *from, void *to, size_t count, ncclDataType_t type,
                                  ncclRedOp_t op, ncclComm_t ranks, cudaStream_t stream) {
    return collective(__func__, from, to, count * width_of(type)), ncclSuccess;
}
PUBLIC ncclResult_t ncclReduce(const void *from, void *to, size_t count, ncclDataType_t type,
                               ncclRedOp_t op, int root, ncclComm_t ranks, cudaStream_t stream) {
    return collective(__func__, from, to, count * width_of(type)), ncclSuccess;
}
PUBLIC ncclResult_t ncclBroadcast(const void *from, void *to, size_t count, ncclDataType_t type,
                                  int root, ncclComm_t ranks, cudaStream_t stream) {
    return collective(__func__, from, to, count * width_of(type)), ncclSuccess;
}
PUBLIC ncclResult_t ncclBcast(void *at, size_t count, ncclDataType_t type, int root,
                              ncclComm_t ranks, cudaStream_t stream) {
    return collective(__func__, at, at, count * width_of(type)), ncclSuccess;
}
PUBLIC ncclResult_t ncclAllGather(const void *from, void *to, size_t count, ncclDataType_t type,
                                  ncclComm_t ranks, cudaStream_t stream) {
    size_t bytes = count * width_of(type);
    const char *own = (char *)to + ranks->rank * bytes;
    collective(__func__, from, (void *)own, bytes);
    for (int rank = 0; rank < ranks->ranks && bytes <= LARGEST_COPY; rank++)
        memmove((char *)to + rank * bytes, own, bytes);
    return ncclSuccess;
}
PUBLIC ncclResult_t ncclReduceScatter(const void *from, void *to, size_t count, ncclDataType_t type,
                                      ncclRedOp_t op, ncclComm_t ranks, cudaStream_t stream) {
    size_t bytes = count * width_of(type);
    return collective(__func__, (char *)from + ranks->rank * bytes, to, bytes), ncclSuccess;
}
PUBLIC ncclResult_t ncclAlltoAll(const void *from, void *to, size_t count, ncclDataType_t type,
                                 ncclComm_t ranks, cudaStream_t stream) {
    return collective(__func__, from, to, ranks->ranks * count * width_of(type)), ncclSuccess;
}
PUBLIC ncclResult_t ncclSend(const void *from, size_t count, ncclDataType_t type, int peer,
                             ncclComm_t ranks, cudaStream_t stream) {
    return collective(__func__, from, NULL, count * width_of(type)), ncclSuccess;
}
PUBLIC ncclResult_t ncclRecv(void *to, size_t count, ncclDataType_t type, int peer,
                             ncclComm_t ranks, cudaStream_t stream) {
    return collective(__func__, NULL, to, count * width_of(type)), ncclSuccess;
}

static ncclResult_t communicate(ncclComm_t *made, int ranks, int rank) {
    *made = calloc(1, 4096);
    (*made)->ranks = ranks, (*made)->rank = rank;
    return ncclSuccess;
}
PUBLIC ncclResult_t ncclCommInitRank(ncclComm_t *made, int ranks, ncclUniqueId id, int rank) {
    return communicate(made, ranks, rank);
}
PUBLIC ncclResult_t ncclCommInitRankConfig(ncclComm_t *made, int ranks, ncclUniqueId id, int rank,
                                           ncclConfig_t *configuration) {
    return communicate(made, ranks, rank);
}
PUBLIC ncclResult_t ncclCommInitRankScalable(ncclComm_t *made, int ranks, int rank, int roots,
                                             ncclUniqueId *ids, ncclConfig_t *configuration) {
    return communicate(made, ranks, rank);
}
PUBLIC ncclResult_t ncclGetUniqueId(ncclUniqueId *id) { return memset(id, 1, sizeof *id), 0; }
PUBLIC ncclResult_t ncclGetVersion(int *version) { return *version = NCCL_VERSION_CODE, 0; }
PUBLIC ncclResult_t ncclCommCount(const ncclComm_t of, int *ranks) { return *ranks = of->ranks, 0; }
PUBLIC ncclResult_t ncclCommUserRank(const ncclComm_t of, int *rank) { return *rank = of->rank, 0; }
PUBLIC ncclResult_t ncclCommGetAsyncError(ncclComm_t of, ncclResult_t *error) {
    return *error = ncclSuccess, 0;
}
PUBLIC const char *ncclGetErrorString(ncclResult_t error) { return "an error of the null device"; }
PUBLIC const char *ncclGetLastError(ncclComm_t of) { return ""; }
QUIET(ncclCommDestroy)
QUIET(ncclCommAbort)
QUIET(ncclCommFinalize)
QUIET(ncclCommRegister)
QUIET(ncclCommDeregister)
QUIET(ncclGroupStart)
QUIET(ncclGroupEnd)
