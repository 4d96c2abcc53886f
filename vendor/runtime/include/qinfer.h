/* qinfer runtime: the only public header.
 *
 * Conventions
 *  - Every fallible function returns a qi_status and, when it is not QI_OK, fills the caller's
 *    qi_error (may be NULL) with a message that names the file, tensor or option, what was found
 *    and what would have been right.
 *  - Strings are UTF-8 with an explicit length; pointers handed out stay valid until the object
 *    they came from is closed.
 *  - Nothing here prints, exits, aborts, throws or calls back. Progress, cancellation and log lines
 *    are polled.
 *  - Models are immutable and may be shared by threads; a context serves one thread at a time and
 *    answers QI_BUSY otherwise.
 *  - Sizes are bytes, counts are elements, `n_` means "number of".
 *
 * Between the two marked lines the text is plain C declarations, read as they stand by the compiler
 * and by cffi.
 */
#ifndef QINFER_H
#define QINFER_H

#include <stdint.h>

#if defined(__GNUC__)
#pragma GCC visibility push(default)
#endif
#ifdef __cplusplus
extern "C" {
#endif

/* --- declarations begin --- */

#define QI_ABI_VERSION 6

typedef enum qi_status {
    QI_OK = 0,
    QI_FORMAT = 1,       /* a file is not what it should be */
    QI_ARGUMENT = 2,     /* a parameter is out of range or inconsistent */
    QI_IO = 3,           /* the operating system refused to read, write or map */
    QI_MEMORY = 4,       /* an allocation failed */
    QI_CONTEXT_FULL = 5, /* tokens do not fit in the context */
    QI_CANCELLED = 6,    /* qi_context_cancel was called */
    QI_BUSY = 7,         /* another thread is inside this context */
    QI_UNSUPPORTED = 8,  /* well-formed, but not something this runtime does */
    QI_DEVICE = 9,       /* an accelerator is missing or failed */
    QI_INTERNAL = 10     /* a defect of ours */
} qi_status;

typedef struct qi_error {
    int32_t status;
    char message[1020]; /* NUL-terminated UTF-8 */
} qi_error;

/* ---- library ---- */

int32_t qi_abi_version(void);
/* sizeof of a public struct by name, 0 when unknown; the binding compares it at import. */
uint64_t qi_struct_size(const char* name);
const char* qi_version(void); /* "0.1.0+<git hash>" */

/* Takes one pending log line out of the ring: its level (10 debug … 40 error, as Python's logging)
 * or 0 when empty. */
int32_t qi_log_next(char* text, uint64_t capacity);

typedef struct qi_cpu_info {
    char isa[16];      /* level in use: "portable", "avx2", "avx512", "neon" */
    char best_isa[16]; /* best level this machine has */
    char brand[64];
    char features[192]; /* space-separated, as found by cpuid and xgetbv */
    int32_t n_physical_cores;
    int32_t n_usable_cores; /* after affinity mask and cgroup quota */
} qi_cpu_info;

int32_t qi_get_cpu_info(qi_cpu_info* out, qi_error* error);
/* Median speed of a plain read loop over `n_bytes` of private memory with `n_threads`, in bytes per
 * second. */
int32_t qi_measure_read_bandwidth(int32_t n_threads, uint64_t n_bytes, double* bytes_per_second,
                                  qi_error* error);

/* ---- CUDA ---- */

/* Where NVRTC and cuBLAS are looked for before the system's places: n_folders folders as one byte
 * run and n_folders + 1 offsets into it; and the folder that compiled kernels are kept in (length
 * 0: nowhere). Holds for what is loaded and compiled from then on. */
int32_t qi_cuda_configure(const char* folders, const uint64_t* offsets, uint64_t n_folders,
                          const char* cache_folder, uint64_t cache_folder_length, qi_error* error);

/* A version is 1000 · major + 10 · minor, and 0 for what cannot be used: the problem says why. */
typedef struct qi_cuda_info {
    int32_t built; /* 0: this library was built without CUDA */
    int32_t n_embedded_cubins;
    int32_t n_devices;
    int32_t driver_version; /* the CUDA release it is made for */
    int32_t nvrtc_version;
    int32_t cublas_version;
    char driver_problem[1020];
    char nvrtc_path[1020];
    char nvrtc_problem[1020];
    char cublas_path[1020];
    char cublas_problem[1020];
} qi_cuda_info;

int32_t qi_cuda_get_info(qi_cuda_info* out, qi_error* error);

typedef struct qi_cuda_device_info {
    char name[256];
    char uuid[48];
    int32_t compute_major;
    int32_t compute_minor;
    int32_t n_sm;
    int32_t reserved;
    uint64_t memory_bytes;
    uint64_t l2_bytes;
    double memory_bandwidth; /* bytes per second in theory; 0: not known */
} qi_cuda_device_info;

/* Of the devices that are visible, numbered from 0; QI_DEVICE when there are fewer. */
int32_t qi_cuda_get_device_info(int32_t device, qi_cuda_device_info* out, qi_error* error);

#define QI_KERNEL_EMBEDDED 0 /* came with the library */
#define QI_KERNEL_CACHED 1   /* compiled before, and kept */
#define QI_KERNEL_COMPILED 2

typedef struct qi_cuda_probe {
    uint64_t free_bytes;   /* of the card */
    int32_t kernel_origin; /* QI_KERNEL_* */
    int32_t reserved;
    double compile_seconds;
    double seconds; /* all of it */
} qi_cuda_probe;

/* A small computation on a device, to see that it works: n_bytes of its memory within a budget (0:
 * no limit), copies, a kernel alone and in a graph. Holds nothing afterwards. */
int32_t qi_cuda_run_probe(int32_t device, uint64_t n_bytes, uint64_t budget_bytes,
                          qi_cuda_probe* out, qi_error* error);

/* A device held open from one of the measurements below to the next. */
typedef struct qi_cuda_gpu qi_cuda_gpu;

int32_t qi_cuda_open(int32_t device, qi_cuda_gpu** out, qi_error* error);
void qi_cuda_close(qi_cuda_gpu* gpu);
/* Bytes per second at which a kernel reads n_bytes of its memory: the median of several. */
int32_t qi_cuda_measure_read_bandwidth(qi_cuda_gpu* gpu, uint64_t n_bytes, double* bytes_per_second,
                                       qi_error* error);
/* What a kernel in a graph costs that does nothing: the median of several graphs of many. */
int32_t qi_cuda_measure_launch_seconds(qi_cuda_gpu* gpu, double* seconds, qi_error* error);

typedef struct qi_cuda_self_test {
    char name[120];
    double error;      /* the largest difference from the processor's result, as a multiple of what
                          rounding in another order explains */
    double tolerance;  /* of `error` */
    double seconds;    /* all of it: making data, loading kernels, computing on both sides */
    uint64_t n_values; /* compared */
    int32_t passed;
    int32_t reserved;
} qi_cuda_self_test;

/* Tests of the kernels, each against the processor on random data; 0 in a library built without
 * CUDA. */
int32_t qi_cuda_n_self_tests(void);
/* What the test of that number, from 0, is called, as much of it as fits; needs no device. */
int32_t qi_cuda_get_self_test_name(int32_t number, char* name, uint64_t capacity, qi_error* error);
/* A difference is a result; what keeps a kernel from running is an error. */
int32_t qi_cuda_run_self_test(qi_cuda_gpu* gpu, int32_t number, qi_cuda_self_test* out,
                              qi_error* error);

/* ---- tensor types ---- */

typedef struct qi_type_info {
    int32_t type;       /* GGUF's number */
    char name[16];      /* "Q4_0" */
    int32_t block_size; /* elements per block */
    int32_t block_bytes;
    int32_t can_decode; /* all operators accept it */
    int32_t can_encode;
} qi_type_info;

/* 0-based over the types this runtime knows; QI_ARGUMENT past the end. */
int32_t qi_type_by_index(int32_t index, qi_type_info* out);
int32_t qi_type_decode(int32_t type, const void* blocks, uint64_t n_elements, float* out,
                       qi_error* error);
/* `n_per_row` elements make one row; `importance` (n_per_row weights, or NULL) is used by the types
 * that can. */
int32_t qi_type_encode(int32_t type, const float* values, uint64_t n_elements, uint64_t n_per_row,
                       const float* importance, void* blocks, qi_error* error);
/* Blocks of type `from` as blocks of type `to`: decodes and encodes at once. `out` NULL only looks
 * at the values. A value that is not finite or too large for `to` is QI_ARGUMENT. */
int32_t qi_type_convert(int32_t from, const void* blocks, uint64_t n_elements, uint64_t n_per_row,
                        const float* importance, int32_t to, void* out, qi_error* error);

/* ---- GGUF files ---- */

typedef struct qi_gguf qi_gguf;

typedef struct qi_gguf_info {
    uint32_t version;
    int32_t is_powerinfer; /* magic PWRI */
    uint32_t alignment;
    uint32_t n_files; /* more than one when split */
    uint64_t n_kv;
    uint64_t n_tensors;
    uint64_t n_bytes;      /* all files together */
    uint64_t header_bytes; /* of the first file: magic, metadata and tensor descriptions */
} qi_gguf_info;

typedef struct qi_gguf_kv {
    const char* key;
    uint64_t key_length;
    /* GGUF value type: 0 u8 1 i8 2 u16 3 i16 4 u32 5 i32 6 f32 7 bool 8 string 9 array 10 u64
     * 11 i64 12 f64 */
    int32_t type;
    int32_t item_type; /* of an array; else equal to type */
    uint64_t n_items;  /* 1 unless an array */
    const void* data;  /* numbers, bools: packed, unaligned; strings: see qi_gguf_kv_strings */
} qi_gguf_kv;

typedef struct qi_gguf_tensor {
    const char* name;
    uint64_t name_length;
    int32_t type;
    uint32_t n_dims;
    uint64_t dims[4]; /* dims[0] is contiguous; unused ones are 1 */
    uint64_t n_bytes;
    uint64_t file_index;
    uint64_t file_offset;
    const void* data;
} qi_gguf_tensor;

/* Flags of qi_gguf_open. */
#define QI_GGUF_NO_MMAP 1 /* read into private memory instead of mapping */
/* Metadata and descriptions only: data pointers are NULL, missing data is no error. */
#define QI_GGUF_NO_TENSORS 2

/* How far an open has come that reads into memory. Other threads may look at it, and set `cancel`,
 * meanwhile. */
typedef struct qi_read_progress {
    uint64_t n_read;  /* bytes so far */
    uint64_t n_bytes; /* to be read, of all files that are known by now */
    int32_t cancel;   /* anything but 0 ends the open with QI_CANCELLED */
} qi_read_progress;

/* `progress` (zeroed by the caller, or NULL) is written while a file is read into memory. */
int32_t qi_gguf_open(const char* path, uint64_t path_length, uint32_t flags,
                     qi_read_progress* progress, qi_gguf** out, qi_error* error);
void qi_gguf_close(qi_gguf* file); /* a model keeps what it needs: closing the file first is fine */
int32_t qi_gguf_get_info(const qi_gguf* file, qi_gguf_info* out);
int32_t qi_gguf_get_kv(const qi_gguf* file, uint64_t index, qi_gguf_kv* out, qi_error* error);
/* Index of a key, or -1. */
int64_t qi_gguf_find_kv(const qi_gguf* file, const char* key, uint64_t key_length);
/* A string or array of strings as one byte run and n_items + 1 offsets into it. */
int32_t qi_gguf_kv_strings(const qi_gguf* file, uint64_t index, const char** bytes,
                           const uint64_t** offsets, qi_error* error);
int32_t qi_gguf_get_tensor(const qi_gguf* file, uint64_t index, qi_gguf_tensor* out,
                           qi_error* error);
int64_t qi_gguf_find_tensor(const qi_gguf* file, const char* name, uint64_t name_length);
const void* qi_gguf_header(const qi_gguf* file); /* header_bytes of them, for fingerprints */

typedef struct qi_gguf_writer qi_gguf_writer;

/* Writes to a temporary name beside `path`; qi_gguf_writer_finish renames, closing before that
 * leaves nothing behind. Order of calls: every kv, every tensor description, then the data of each
 * tensor in that order, in pieces of any size. */
int32_t qi_gguf_writer_create(const char* path, uint64_t path_length, int32_t is_powerinfer,
                              uint32_t alignment, qi_gguf_writer** out, qi_error* error);
int32_t qi_gguf_writer_add_kv(qi_gguf_writer* writer, const char* key, uint64_t key_length,
                              int32_t type, int32_t item_type, uint64_t n_items, const void* data,
                              uint64_t n_bytes, qi_error* error);
/* Strings as one byte run and n_items + 1 offsets; is_array 0 writes a single string. */
int32_t qi_gguf_writer_add_strings(qi_gguf_writer* writer, const char* key, uint64_t key_length,
                                   int32_t is_array, const char* bytes, const uint64_t* offsets,
                                   uint64_t n_items, qi_error* error);
int32_t qi_gguf_writer_add_tensor(qi_gguf_writer* writer, const char* name, uint64_t name_length,
                                  int32_t type, uint32_t n_dims, const uint64_t* dims,
                                  qi_error* error);
int32_t qi_gguf_writer_write(qi_gguf_writer* writer, const void* data, uint64_t n_bytes,
                             qi_error* error);
int32_t qi_gguf_writer_finish(qi_gguf_writer* writer, qi_error* error);
void qi_gguf_writer_close(qi_gguf_writer* writer);

/* ---- models ---- */

typedef struct qi_model qi_model;

typedef struct qi_model_params {
    /* NULL: from the file; else "silu", "relu", "gelu", "gelu_tanh", "relu_relu" or
     * "fatrelu:<threshold>" */
    const char* hidden_act;
    int32_t check_tensors; /* scan every weight for NaN and infinity: reads the whole file */
    int32_t reserved;
} qi_model_params;

typedef struct qi_model_info {
    char architecture[32];
    char hidden_act[32];
    int32_t n_vocab;
    int32_t n_embd;
    int32_t n_layer;
    int32_t n_head;
    int32_t n_head_kv;
    int32_t head_dim;
    int32_t n_ff;
    int32_t n_ctx_train;
    int32_t n_ctx_max;      /* of learned position embeddings; 0: no limit */
    int32_t sliding_window; /* 0: none */
    int32_t is_powerinfer;
    int32_t tied_head;
    int32_t has_sparse_act; /* an activation that is zero for many inputs: QI_RULE_EXACT works */
    int32_t predictor_rank; /* the largest of the layers'; 0: no predictors */
    int32_t down_by_neuron; /* the down projection is stored by neuron in every layer */
    float sparse_threshold; /* of predictions, as the file gives it */
    uint64_t n_params;
    uint64_t n_weight_bytes;
    uint64_t n_bytes_per_token;     /* weight bytes one token reads with all neurons computed */
    uint64_t n_ffn_bytes_per_token; /* of these, the feed-forward networks' */
    uint64_t kv_bytes_per_token_f16;
} qi_model_info;

int32_t qi_model_load(const qi_gguf* file, const qi_model_params* params, qi_model** out,
                      qi_error* error);
void qi_model_close(qi_model* model); /* contexts keep it alive */
int32_t qi_model_get_info(const qi_model* model, qi_model_info* out);

/* ---- a model's share on an accelerator ---- */

typedef struct qi_offload qi_offload;

typedef struct qi_offload_info {
    char device[160];
    char placement[256]; /* what is kept there, in words; empty before the first context */
    uint64_t budget_bytes;
    uint64_t used_bytes;
    uint64_t attention_bytes;
    uint64_t predictor_bytes;
    uint64_t head_bytes;
    uint64_t neuron_bytes;
    uint64_t n_neurons; /* in all layers together */
    uint64_t n_moved;   /* that have taken another's place since */
    int32_t is_placed;
    int32_t n_layers; /* the first so many have their attention there */
    int32_t has_head;
    int32_t n_predictors; /* the first so many layers have their predictors there, if any */
} qi_offload_info;

/* device: "cuda" or "cuda:N". budget_bytes: of its memory, everything counted; below 0, or beyond
 * what is free: all that is free once kernels are loaded. What is kept there is decided when the
 * first context with it is made, and again for one of other sizes when no other is alive. */
int32_t qi_offload_create(qi_model* model, const char* device, int64_t budget_bytes,
                          qi_offload** out, qi_error* error);
void qi_offload_close(qi_offload* offload); /* contexts keep it alive */
/* Before the first context: the neurons of a layer to be kept there, ascending; or how often each
 * of a layer's n_ff neurons is active. */
int32_t qi_offload_choose_neurons(qi_offload* offload, int32_t layer, const int32_t* neurons,
                                  uint64_t n_neurons, qi_error* error);
int32_t qi_offload_count_neurons(qi_offload* offload, int32_t layer, const float* counts,
                                 uint64_t n_ff, qi_error* error);
/* Before the first context, after counts were given: a layer keeps only so many neurons that both
 * sides need the same time for it, by their measured speeds. */
int32_t qi_offload_balance_layers(qi_offload* offload, qi_error* error);
/* Which neurons are kept there while the model runs. Where they move, results depend, in their
 * rounding, on where neurons are; in deterministic contexts none moves. */
#define QI_CACHE_STATIC 0    /* those of the beginning; see qi_offload_set_neuron_cache */
#define QI_CACHE_BALANCE 1   /* such that both sides need the same time */
#define QI_CACHE_FREQUENCY 2 /* those active most often, of late above all */
/* Before the first context. Policies other than QI_CACHE_STATIC, with which it begins, need a down
 * stored by neuron. Under that one, neurons stay, but where they were chosen without lists and
 * counts, and down is stored by neuron, the first tokens (64) computed under QI_RULE_EXACT or
 * QI_RULE_PREDICT choose them anew, once. */
int32_t qi_offload_set_neuron_cache(qi_offload* offload, int32_t policy, qi_error* error);
/* As if no context had been made yet: the next one decides what is kept, and neurons that move
 * begin where it puts them. Does nothing while a context is alive. */
int32_t qi_offload_reset(qi_offload* offload, qi_error* error);
int32_t qi_offload_get_info(const qi_offload* offload, qi_offload_info* out);
/* The neurons of a layer that are kept there now: their number, and with out not NULL their ids. */
int32_t qi_offload_get_neurons(const qi_offload* offload, int32_t layer, int32_t* out,
                               uint64_t* n_neurons, qi_error* error);

/* ---- sampling ---- */

typedef struct qi_sampler qi_sampler;

typedef struct qi_sampling_params {
    float temperature; /* 0: exact argmax, lowest id on ties */
    float dynatemp_range;
    float dynatemp_exponent;
    float top_p;
    float min_p;
    float typical_p;
    float repeat_penalty;
    float presence_penalty;
    float frequency_penalty;
    float mirostat_tau;
    float mirostat_eta;
    int32_t top_k;          /* 0: all */
    int32_t penalty_window; /* last tokens looked at; -1: all */
    int32_t mirostat;       /* 0, 1, 2 */
    int32_t min_keep;
    int32_t n_bias;
    uint64_t seed;
    const int32_t* bias_tokens; /* n_bias */
    const float* bias_values;   /* n_bias, added to logits; -INFINITY bans */
} qi_sampling_params;

int32_t qi_sampler_create(const qi_sampling_params* params, int32_t n_vocab, qi_sampler** out,
                          qi_error* error);
void qi_sampler_close(qi_sampler* sampler);
/* Puts a token into the penalty window without drawing it, for prompt tokens. */
int32_t qi_sampler_accept(qi_sampler* sampler, const int32_t* tokens, uint64_t n_tokens,
                          qi_error* error);
/* Draws from logits (n_vocab, left unchanged) and accepts the token drawn. NaN logits are
 * QI_ARGUMENT. */
int32_t qi_sampler_sample(qi_sampler* sampler, const float* logits, int32_t* token,
                          qi_error* error);

/* ---- contexts ---- */

typedef struct qi_context qi_context;

/* Which neurons of the feed-forward networks a token computes. */
#define QI_RULE_ALL 0
#define QI_RULE_EXACT 1   /* those whose gate is not zero */
#define QI_RULE_PREDICT 2 /* of those a predictor names, the ones whose gate is not zero */

/* Where the keys and values of an accelerator's layers live. */
#define QI_KV_AUTO 0   /* on the device if they fit there beside the attention, else split */
#define QI_KV_DEVICE 1 /* on the device */
#define QI_KV_HOST 2   /* in host memory: attention is the processor's */
#define QI_KV_SPLIT 3  /* in host memory, and on the device copies of as many pages as fit */

typedef struct qi_context_params {
    int32_t n_ctx;          /* positions per sequence; 0: what the model was trained for */
    int32_t n_seq;          /* sequences this context can hold */
    int32_t n_batch;        /* tokens computed together at most; 0: 512 */
    int32_t n_threads;      /* 0: usable physical cores */
    int32_t kv_type;        /* GGUF type number: F16 (1) or Q8_0 (8) */
    int32_t prompt_rule;    /* QI_RULE_* of tokens fed without QI_GENERATED, */
    int32_t generated_rule; /* and of those with it */
    float sparse_threshold; /* a neuron is left out when its prediction is below; NaN: the file's */
    qi_offload* offload;    /* of the same model; NULL: the processor alone */
    /* Layers from this one on predict from what the predictor of the layer before looked at; 0: no
     * layer does. */
    int32_t cross_layer_from;
    int32_t kv_mode; /* QI_KV_*; without an offload QI_KV_AUTO */
    /* Of split keys and values: which share of the positions the processor attends to at first, 0
     * to 1, NaN: what does not fit on the device; and by which share, 0 to 1, but a page at least,
     * the boundary of a layer moves after a token, towards where both take as long, 0: not. With
     * QI_KV_AUTO a ratio or a step above 0 means split, with QI_KV_DEVICE and QI_KV_HOST both are
     * refused. */
    float kv_ratio;
    float kv_step;
    /* Anything but 0: an accelerator, too, computes each token the same whatever else is in its
     * batch, as the processor always does; slower prompts. */
    int32_t deterministic;
} qi_context_params;

typedef struct qi_context_info {
    int32_t n_ctx;
    int32_t n_seq;
    int32_t n_batch;
    int32_t n_threads;
    int32_t kv_type;
    int32_t page_size; /* positions */
    uint64_t kv_bytes_used;
    uint64_t kv_bytes_reserved; /* address space; memory is taken as pages fill */
    uint64_t scratch_bytes;
    int32_t kv_mode;        /* QI_KV_DEVICE, HOST or SPLIT */
    int32_t n_device_pages; /* of keys and values that an accelerator has room for */
} qi_context_info;

typedef struct qi_stats {
    uint64_t n_prompt_tokens;    /* fed in batches of more than one token per sequence */
    uint64_t n_generated_tokens; /* fed one per sequence */
    double prompt_seconds;
    double generated_seconds;
    double sample_seconds;
    uint64_t weight_bytes_read; /* by generated tokens */
    uint64_t n_launches;        /* of a device's kernels, by generated tokens before sampling */
} qi_stats;

/* What one layer's feed-forward network did; neurons are summed over tokens. */
typedef struct qi_layer_stats {
    uint64_t n_tokens;    /* computed under a rule other than QI_RULE_ALL */
    uint64_t n_active;    /* neurons that contributed to them */
    uint64_t n_predicted; /* neurons that the predictor named */
    uint64_t n_checked;   /* tokens whose predictions were held against all gates */
    uint64_t n_due;       /* neurons that should have contributed to those */
    uint64_t n_missed;    /* of which the predictor did not name so many */
    uint64_t n_bytes;     /* weight bytes read, for tokens under any rule */
    double predict_seconds;
    double seconds; /* all of it, prediction included */
    /* Where a device shares a layer with the processor: until the device had its own part, what the
     * processor took for its part meanwhile, and how long the device then waited for it. */
    double device_seconds;
    double host_seconds;
    double wait_seconds;
} qi_layer_stats;

/* QI_MEMORY also where the offload's device has no room for another context. */
int32_t qi_context_create(qi_model* model, const qi_context_params* params, qi_context** out,
                          qi_error* error);
void qi_context_close(qi_context* context);
int32_t qi_context_get_info(const qi_context* context, qi_context_info* out);
int32_t qi_context_set_threads(qi_context* context, int32_t n_threads, qi_error* error);

/* What is wanted of a token fed, and its role; or-ed together. */
#define QI_WANT_LOGITS 1
#define QI_WANT_HIDDEN 2 /* the final normalised hidden state */
#define QI_GENERATED 4   /* computed by the rule of generated tokens, not of a prompt */

/* Appends token i to sequence seqs[i] (NULL: all to sequence 0) in the order given; several
 * sequences may be mixed. flags[i] (NULL: a prompt, logits of the last token of each sequence)
 * asks for outputs. On any failure no sequence has changed. */
int32_t qi_context_feed(qi_context* context, const int32_t* tokens, const int32_t* seqs,
                        const uint8_t* flags, uint64_t n_tokens, qi_error* error);
/* Outputs of the last feed in the order asked for: n_vocab logits, or n_embd of the hidden state.
 * Valid until the next feed. Logits on an accelerator come from there when they are asked for. */
int32_t qi_context_logits(qi_context* context, uint64_t index, const float** logits,
                          qi_error* error);
int32_t qi_context_hidden(const qi_context* context, uint64_t index, const float** hidden,
                          qi_error* error);
uint64_t qi_context_n_logits(const qi_context* context);

/* Feeds tokens[i] to seqs[i] as generated ones and draws next[i] with samplers[i]; each sequence
 * and each sampler once. */
int32_t qi_context_step(qi_context* context, const int32_t* tokens, const int32_t* seqs,
                        qi_sampler* const* samplers, uint64_t n, int32_t* next, qi_error* error);
/* Appends tokens to a sequence; logprobs[i] = log p(targets[i] | everything up to and including
 * tokens[i]), natural logarithm; a target of -1 is skipped (0 is written). Logits are reduced block
 * by block, never all kept. generated: their role, as QI_GENERATED gives it. */
int32_t qi_context_score(qi_context* context, int32_t seq, const int32_t* tokens,
                         const int32_t* targets, uint64_t n, int32_t generated, float* logprobs,
                         qi_error* error);

int64_t qi_context_seq_length(const qi_context* context, int32_t seq);
int32_t qi_context_truncate(qi_context* context, int32_t seq, int64_t n_keep, qi_error* error);
/* Makes `target` a copy of the first n_keep (-1: all) positions of `source`, sharing full pages. */
int32_t qi_context_fork(qi_context* context, int32_t source, int32_t target, int64_t n_keep,
                        qi_error* error);

uint64_t qi_context_state_size(const qi_context* context, int32_t seq);
int32_t qi_context_state_save(qi_context* context, int32_t seq, void* out, uint64_t n_bytes,
                              qi_error* error);
int32_t qi_context_state_load(qi_context* context, int32_t seq, const void* data, uint64_t n_bytes,
                              qi_error* error);

/* From any thread: the feed now running (or else the next one) ends with QI_CANCELLED within
 * milliseconds. */
void qi_context_cancel(qi_context* context);
void qi_context_clear_cancel(qi_context* context);
/* From any thread: tokens done of the feed now running, as a share in [0, 1]. */
double qi_context_progress(const qi_context* context);
/* From any thread: while another computes in the context, as it was after one of its last calls. */
int32_t qi_context_get_stats(const qi_context* context, qi_stats* out);
/* From any thread, once no other computes in the context. Also of the layers, and of the
 * activations counted. */
void qi_context_reset_stats(qi_context* context);
/* Which share of the positions the processor attended to in the last batch, by layer. */
int32_t qi_context_kv_host_shares(const qi_context* context, double* out, uint64_t n_layer,
                                  qi_error* error);
/* From any thread, as qi_context_get_stats. */
int32_t qi_context_get_layer_stats(const qi_context* context, int32_t layer, qi_layer_stats* out,
                                   qi_error* error);
/* Holds the predictions for every n-th token that is fed alone against all gates, which costs
 * computing those, and for all that are fed several at a time, as qi_context_score does; 0, as at
 * first: asks for none. */
int32_t qi_context_check_predictions(qi_context* context, int32_t every, qi_error* error);
/* Starts counting, from 0, for how many tokens each neuron is active (on 1), or stops (on 0). */
int32_t qi_context_count_activations(qi_context* context, int32_t on, qi_error* error);
/* The counts of a layer: n_ff of them into out. */
int32_t qi_context_activations(qi_context* context, int32_t layer, uint64_t* out, uint64_t n_ff,
                               qi_error* error);

/* --- declarations end --- */

#ifdef __cplusplus
}
#endif
#if defined(__GNUC__)
#pragma GCC visibility pop
#endif

#endif /* QINFER_H */
