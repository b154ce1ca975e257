/* Descriptors of libopapi, and the way of every aclnn call into Python.
 *
 * Each descriptor carries its kind and stands in a list of live ones, so that a wrong argument list is recognised
 * instead of read as something else. The generator adds one entry per aclnn name, which jumps to the trampoline.
 */
#include <pthread.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#define MAX_DIMS 16
#define REFUSED 561000

enum { TENSOR = 1, TENSOR_LIST, SCALAR, SCALAR_LIST, INT_ARRAY, BOOL_ARRAY, FLOAT_ARRAY };

typedef struct head { int64_t kind; struct head *before, *after; } head;
typedef struct {
    head h;
    int64_t dims, size[MAX_DIMS], stride[MAX_DIMS], dtype, offset, format, storage_dims, storage[MAX_DIMS];
    void *data;
} tensor;
typedef struct { head h; int64_t n; void *items; } array;
typedef struct { head h; int64_t dtype; uint8_t value[16]; } scalar;

static head live = {0, &live, &live};
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;

static void *born(size_t bytes, int kind)
{
    head *h = calloc(1, bytes);
    h->kind = kind;
    pthread_mutex_lock(&lock);
    h->before = &live;
    h->after = live.after;
    live.after->before = h;
    live.after = h;
    pthread_mutex_unlock(&lock);
    return h;
}

static int died(void *p)
{
    head *h = p;
    if (!h) return 0;
    pthread_mutex_lock(&lock);
    h->before->after = h->after;
    h->after->before = h->before;
    pthread_mutex_unlock(&lock);
    if (h->kind == TENSOR_LIST || h->kind == SCALAR_LIST || h->kind >= INT_ARRAY) free(((array *)h)->items);
    free(h);
    return 0;
}

/* kind of a live descriptor, 0 for anything else; never reads through the pointer */
int64_t standin_kind(const void *p)
{
    int64_t kind = 0;
    pthread_mutex_lock(&lock);
    for (head *h = live.after; h != &live; h = h->after)
        if (h == p) { kind = h->kind; break; }
    pthread_mutex_unlock(&lock);
    return kind;
}

void *aclCreateTensor(const int64_t *size, uint64_t dims, int dtype, const int64_t *stride, int64_t offset, int format,
                      const int64_t *storage, uint64_t storage_dims, void *data)
{
    tensor *t = born(sizeof *t, TENSOR);
    t->dims = dims; t->dtype = dtype; t->offset = offset; t->format = format; t->storage_dims = storage_dims; t->data = data;
    for (uint64_t i = 0; i < dims && i < MAX_DIMS; i++) { t->size[i] = size[i]; t->stride[i] = stride ? stride[i] : 0; }
    for (uint64_t i = 0; i < storage_dims && i < MAX_DIMS; i++) t->storage[i] = storage[i];
    return t;
}

static void *copied(const void *from, uint64_t n, size_t width, int kind)
{
    array *a = born(sizeof *a, kind);
    a->n = (int64_t)n;
    a->items = malloc(width * n + 8);
    memcpy(a->items, from, width * n);
    return a;
}
void *aclCreateTensorList(void **items, uint64_t n) { return copied(items, n, 8, TENSOR_LIST); }
void *aclCreateScalarList(void **items, uint64_t n) { return copied(items, n, 8, SCALAR_LIST); }
void *aclCreateIntArray(const int64_t *items, uint64_t n) { return copied(items, n, 8, INT_ARRAY); }
void *aclCreateBoolArray(const uint8_t *items, uint64_t n) { return copied(items, n, 1, BOOL_ARRAY); }
void *aclCreateFloatArray(const float *items, uint64_t n) { return copied(items, n, 4, FLOAT_ARRAY); }

void *aclCreateScalar(void *value, int dtype)
{
    static const uint8_t width[] = {4, 2, 1, 4, 1, 0, 2, 2, 4, 8, 8, 8, 1};
    scalar *s = born(sizeof *s, SCALAR);
    s->dtype = dtype;
    memcpy(s->value, value, dtype == 27 ? 2 : dtype < 13 && width[dtype] ? width[dtype] : 8);
    return s;
}

int aclDestroyTensor(void *p) { return died(p); }
int aclDestroyScalar(void *p) { return died(p); }
int aclDestroyIntArray(void *p) { return died(p); }
int aclDestroyBoolArray(void *p) { return died(p); }
int aclDestroyFloatArray(void *p) { return died(p); }
static int died_with_items(array *list)
{
    for (int64_t i = 0; i < list->n; i++) died(((void **)list->items)[i]);
    return died(list);
}
int aclDestroyTensorList(void *p) { return died_with_items(p); }
int aclDestroyScalarList(void *p) { return died_with_items(p); }
int aclDestroyAclOpExecutor(void *executor) { return 0; }
int aclnnInit(const char *config) { return 0; }
int aclnnFinalize(void) { return 0; }

/* first phase: (name, integer registers, vector registers, stack) go to Python, which runs the model of the op */
typedef int (*called)(const char *name, const int64_t *ints, const double *reals, const int64_t *stack);
static called on_call;
static long launches;

void standin_on_call(called f) { on_call = f; }
long standin_launches(void) { return launches; }
void standin_launches_clear(void) { launches = 0; }

/* exported, since the entries of a pretended op package lie in a library of their own */
__attribute__((used)) int standin_enter(const char *name, const int64_t *ints, const double *reals, const int64_t *stack)
{
    return on_call ? on_call(name, ints, reals, stack) : REFUSED;
}

/* second phase: the launch itself, which only counts */
int standin_launch(void *workspace, uint64_t bytes, void *executor, void *stream)
{
    __sync_add_and_fetch(&launches, 1);
    return 0;
}

int standin_unanswered(void) { return REFUSED; }
