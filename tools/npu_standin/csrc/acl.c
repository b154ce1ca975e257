/* Runtime of a pretended NPU (libascendcl): device memory is host memory, streams and events are numbers.
 *
 * Only the functions whose answer matters stand here; the generator adds a "return 0" for every other name that the
 * installed torch_npu asks for. $V4_STANDIN_SOC and $V4_STANDIN_DEVICES say what the pretended node looks like.
 */
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#define OUT_OF_MEMORY 207001
#define NOT_SUPPORTED 207000
#define CORES 24
#define ALIGNMENT 512
#define POISON 0xCD
#define POISONED_BYTES (1u << 20)

typedef uintptr_t handle;

/* what the host waits for or copies; read by Python */
enum { STREAM_SYNC, DEVICE_SYNC, EVENT_SYNC, COPY_TO_HOST, COPY_TO_DEVICE, COPY_ON_DEVICE, KINDS };
static long counters[KINDS];
static char message[4096];
static __thread int current_device;

long standin_counter(int kind) { return kind < KINDS ? counters[kind] : -1; }
void standin_counters_clear(void) { memset(counters, 0, sizeof counters); }
void standin_message(const char *text) { strncpy(message, text, sizeof message - 1); }
/* asking takes the message away, so that it is never told for another error */
const char *aclGetRecentErrMsg(void)
{
    static char told[sizeof message];
    memcpy(told, message, sizeof told);
    message[0] = 0;
    return told;
}

static const char *setting(const char *name, const char *otherwise)
{
    const char *found = getenv(name);
    return found ? found : otherwise;
}

static int fresh_handle(void **out)
{
    static handle next = 0x1000;
    *out = (void *)__sync_add_and_fetch(&next, 16);
    return 0;
}

/* the node */
int aclrtGetDeviceCount(uint32_t *out) { *out = (uint32_t)atoi(setting("V4_STANDIN_DEVICES", "1")); return 0; }
const char *aclrtGetSocName(void) { return setting("V4_STANDIN_SOC", "Ascend910_9391"); }
int aclrtGetDevice(int32_t *out) { *out = current_device; return 0; }
int aclrtSetDevice(int32_t device) { current_device = device; return 0; }
int aclrtGetCurrentContext(void **out) { *out = (void *)(handle)(0x100 + current_device); return 0; }
int aclrtGetDeviceInfo(uint32_t device, int what, int64_t *out) { *out = CORES; return 0; }
int aclGetDeviceCapability(uint32_t device, int what, int64_t *out) { *out = CORES; return 0; }
int aclrtGetDeviceResLimit(int device, int what, uint32_t *out) { *out = CORES; return 0; }
int aclrtGetStreamResLimit(void *stream, int what, uint32_t *out) { *out = CORES; return 0; }
int aclrtGetResInCurrentThread(int what, uint32_t *out) { *out = CORES; return 0; }
int aclrtGetPrimaryCtxState(int device, uint32_t *flags, int32_t *active)
{
    if (flags) *flags = 0;
    *active = 1;
    return 0;
}
int aclrtGetLogicDevIdByUserDevId(int device, int *out) { *out = device; return 0; }
int aclrtDeviceCanAccessPeer(int *out, int a, int b) { *out = 1; return 0; }
int aclrtDeviceGetBareTgid(int *out) { *out = 1; return 0; }
int aclrtGetSysParamOpt(int option, int64_t *out) { *out = 0; return 0; }
int aclrtCtxGetSysParamOpt(int option, int64_t *out) { *out = 0; return 0; }
int aclsysGetVersionStr(char *name, char *out) { strcpy(out, "9.0.0"); return 0; }
int aclsysGetCANNVersion(int name, void *out) { memset(out, 0, 128); strcpy(out, "9.0.0"); return 0; }
/* torch_npu parses this answer while it is imported */
size_t aclGetCompileoptSize(int option) { return 16; }
int aclGetCompileopt(int option, char *out, size_t bytes) { strncpy(out, "disable", bytes); return 0; }

/* memory: fresh bytes are poisoned, so that an op which does nothing does not look right */
static int allocate(void **out, size_t bytes)
{
    if (posix_memalign(out, ALIGNMENT, bytes ? bytes : ALIGNMENT)) return OUT_OF_MEMORY;
    memset(*out, POISON, bytes < POISONED_BYTES ? bytes : POISONED_BYTES);
    return 0;
}
int aclrtMalloc(void **out, size_t bytes, int policy) { return allocate(out, bytes); }
int aclrtMallocAlign32(void **out, size_t bytes, int policy) { return allocate(out, bytes); }
int aclrtMallocHost(void **out, size_t bytes) { return allocate(out, bytes); }
int aclrtMallocHostWithCfg(void **out, uint64_t bytes, void *config) { return allocate(out, bytes); }
int aclrtFree(void *memory) { free(memory); return 0; }
int aclrtFreeHost(void *memory) { free(memory); return 0; }
int aclrtGetMemInfo(int what, size_t *available, size_t *total)
{
    *available = (size_t)32 << 30;
    *total = (size_t)64 << 30;
    return 0;
}
/* refused, so that torch_npu takes its plain allocator */
int aclrtReserveMemAddress(void **out, size_t bytes, size_t alignment, void *wanted, uint64_t flags) { return NOT_SUPPORTED; }
int aclrtMemcpyBatch(void) { return 1; }
int aclrtPointerGetAttributes(const void *memory, void *out) { memset(out, 0, 64); return 0; }

static int copy(void *to, const void *from, size_t bytes, int kind)
{
    static const int counted[] = {-1, COPY_TO_DEVICE, COPY_TO_HOST, COPY_ON_DEVICE};
    if (kind > 0 && kind < 4) __sync_add_and_fetch(&counters[counted[kind]], 1);
    memcpy(to, from, bytes);
    return 0;
}
int aclrtMemcpy(void *to, size_t room, const void *from, size_t bytes, int kind) { return copy(to, from, bytes, kind); }
int aclrtMemcpyAsync(void *to, size_t room, const void *from, size_t bytes, int kind, void *stream)
{
    return copy(to, from, bytes, kind);
}
int aclrtMemset(void *to, size_t room, int value, size_t bytes) { memset(to, value, bytes); return 0; }
int aclrtMemsetAsync(void *to, size_t room, int value, size_t bytes, void *stream) { memset(to, value, bytes); return 0; }

/* streams and events: everything has happened when it is asked for */
int aclrtCreateStream(void **out) { return fresh_handle(out); }
int aclrtCreateStreamWithConfig(void **out, uint32_t priority, uint32_t flags) { return fresh_handle(out); }
int aclrtCreateEventExWithFlag(void **out, uint32_t flags) { return fresh_handle(out); }
int aclrtCreateEventWithFlag(void **out, uint32_t flags) { return fresh_handle(out); }
int aclrtEventElapsedTime(float *out, void *a, void *b) { *out = 0; return 0; }
int aclrtQueryEventStatus(void *event, int *out) { *out = 1; return 0; }
int aclrtQueryEventWaitStatus(void *event, int *out) { *out = 1; return 0; }
int aclQueryEventRecordedStatus(void *event, int *out) { *out = 1; return 0; }
int aclrtStreamQuery(void *stream, int *out) { *out = 0; return 0; }
int aclrtStreamGetId(void *stream, int32_t *out) { *out = (int32_t)(handle)stream; return 0; }
int aclrtSynchronizeStream(void *stream) { __sync_add_and_fetch(&counters[STREAM_SYNC], 1); return 0; }
int aclrtSynchronizeStreamWithTimeout(void *stream, int32_t limit) { return aclrtSynchronizeStream(stream); }
int aclrtSynchronizeDevice(void) { __sync_add_and_fetch(&counters[DEVICE_SYNC], 1); return 0; }
int aclrtSynchronizeDeviceWithTimeout(int32_t limit) { return aclrtSynchronizeDevice(); }
int aclrtSynchronizeEvent(void *event) { __sync_add_and_fetch(&counters[EVENT_SYNC], 1); return 0; }
int aclrtSynchronizeEventWithTimeout(void *event, int32_t limit) { return aclrtSynchronizeEvent(event); }
int aclmdlRICaptureGetInfo(void *stream, int *status, void **model)
{
    if (status) *status = 0;
    if (model) *model = 0;
    return 0;
}
