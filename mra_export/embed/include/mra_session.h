/* mra_session: open a bundle and run it, plain C API for C, Rust, Go, C# and whatever else binds C. C++ has mra_session.hpp.
 *
 * A call that may fail returns NULL, or an MraError that says what failed; free it with mra_error_free. No C++ exception leaves the
 * library, and no message is kept per thread, so a runtime that moves work between threads binds it as it is. One session serves
 * any number of threads at once. Texts are UTF-8; every pointer that a getter returns lives as long as the object it was asked of.
 */
#ifndef MRA_SESSION_H_
#define MRA_SESSION_H_

#include <stddef.h>
#include <stdint.h>

#if defined(_WIN32)
#define MRA_SESSION_API __declspec(dllexport)
#else
#define MRA_SESSION_API __attribute__((visibility("default")))
#endif

#ifdef __cplusplus
extern "C" {
#endif

typedef struct MraError MraError;     /* what failed: a kind and a message */
typedef struct MraSession MraSession; /* a loaded bundle */
typedef struct MraOutputs MraOutputs; /* the tensors of one call */
typedef struct MraGolden MraGolden;   /* a comparison with the bundle's golden outputs */

/* The classes of mra_export/errors.py, by their names. */
typedef enum MraErrorKind {
  MRA_CONTRACT_ERROR = 1,    /* inputs or options that the model cannot take */
  MRA_BUNDLE_ERROR = 2,      /* the bundle is missing, incomplete, altered, or of another contract version */
  MRA_PLUGIN_LOAD_ERROR = 3, /* the bundle's op library or plugin does not load */
  MRA_BACKEND_ERROR = 4,     /* the backend, device or dtype that was asked for cannot run here */
  MRA_ENGINE_ERROR = 5,      /* a TensorRT engine does not fit this machine */
  MRA_PARITY_ERROR = 6,      /* the answers are too far from PyTorch's */
  MRA_INTERNAL_ERROR = 7     /* anything else, such as no memory */
} MraErrorKind;

MRA_SESSION_API MraErrorKind mra_error_kind(const MraError* error);
MRA_SESSION_API const char* mra_error_message(const MraError* error); /* names the thing, shows the value, says the fix */
MRA_SESSION_API void mra_error_free(MraError* error);                 /* NULL is fine, for this and every other free */

/* The version of the operator's contract that the library knows: a bundle of another one is refused. */
MRA_SESSION_API int32_t mra_session_contract_version(void);

typedef struct MraSessionOptions {
  uint32_t struct_size;            /* sizeof(MraSessionOptions); mra_session_options_init sets it */
  int32_t verify_hashes;           /* 1: check the sha256 of every file; 0: only that each is there and of the right size */
  int32_t use_op_library;          /* 1: the bundle's kernel; 0: the graph's own function body: slower, same answer */
  int32_t intra_op_threads;        /* threads of one ONNX Runtime call; 0: ONNX Runtime's default */
  int32_t device_index;            /* which GPU, in CUDA's order */
  int32_t allow_embedded_plugin;   /* 1: let a TensorRT plan bring its own plugin code */
  const char* backend;             /* "onnxruntime" (NULL) or "tensorrt", which is TensorRT-RTX for an engine of that kind */
  const char* device;              /* "cpu" or "cuda", no fallback; NULL: "cuda" for tensorrt, else "cpu" */
  const char* engine;              /* file name of an engine, where the bundle holds several; NULL: the first that fits */
  const char* onnxruntime_library; /* path of libonnxruntime.so; NULL: $MRA_ONNXRUNTIME_LIBRARY, then the system's */
  const char* tensorrt_library;    /* path of libnvinfer or libtensorrt_rtx; NULL: $MRA_TENSORRT_LIBRARY, then the system's */
} MraSessionOptions;

/* Sets every option to its default, the value named first above. */
MRA_SESSION_API void mra_session_options_init(MraSessionOptions* options);

/* Opens a bundle: checks manifest, contract version and hashes, then loads it. options: NULL for the defaults. */
MRA_SESSION_API MraError* mra_session_open(const char* bundle, const MraSessionOptions* options, MraSession** session);

/* No call may still be running. Outputs stay valid. */
MRA_SESSION_API void mra_session_close(MraSession* session);

MRA_SESSION_API const char* mra_session_backend(const MraSession* session);  /* "onnxruntime" or "tensorrt" */
MRA_SESSION_API const char* mra_session_device(const MraSession* session);   /* "cpu" or "cuda" */
MRA_SESSION_API const char* mra_session_task(const MraSession* session);     /* such as "fill-mask" */
MRA_SESSION_API const char* mra_session_manifest(const MraSession* session); /* the bundle's manifest.json, whole */
MRA_SESSION_API int64_t mra_session_vocab_size(const MraSession* session);   /* token ids are 0 to vocab_size - 1 */
MRA_SESSION_API int64_t mra_session_max_length(const MraSession* session);   /* tokens */

typedef struct MraInput {
  const char* name;     /* "input_ids", "attention_mask" or "token_type_ids" */
  const int64_t* data;  /* contiguous, row-major; NULL: as if the input were not given */
  const int64_t* shape; /* (batch, length), or (batch, choices, length) for multiple choice */
  size_t rank;
} MraInput;

/* Runs the model once. input_ids must be given; a mask (1 = real token) that is not is all ones, token_type_ids all zeros; any mask
 * value other than 0 counts as 1. */
MRA_SESSION_API MraError* mra_session_run(const MraSession* session, const MraInput* inputs, size_t count, MraOutputs** outputs);

typedef enum MraElementType { MRA_ELEMENT_FLOAT32 = 0, MRA_ELEMENT_FLOAT16 = 1, MRA_ELEMENT_BFLOAT16 = 2 } MraElementType;

/* Outputs by number, in the graph's order; index < mra_outputs_count. */
MRA_SESSION_API size_t mra_outputs_count(const MraOutputs* outputs);
MRA_SESSION_API const char* mra_outputs_name(const MraOutputs* outputs, size_t index); /* transformers' name, such as "logits" */
MRA_SESSION_API MraElementType mra_outputs_type(const MraOutputs* outputs, size_t index);
MRA_SESSION_API size_t mra_outputs_rank(const MraOutputs* outputs, size_t index);
MRA_SESSION_API const int64_t* mra_outputs_shape(const MraOutputs* outputs, size_t index);
MRA_SESSION_API size_t mra_outputs_elements(const MraOutputs* outputs, size_t index);
MRA_SESSION_API const void* mra_outputs_data(const MraOutputs* outputs, size_t index); /* row-major, of its type */
/* Writes mra_outputs_elements values, 16-bit types widened without loss. */
MRA_SESSION_API void mra_outputs_copy_float32(const MraOutputs* outputs, size_t index, float* values);
MRA_SESSION_API void mra_outputs_free(MraOutputs* outputs);

typedef struct MraGoldenRow {
  const char* name;   /* the batch, such as "golden 2x33" */
  const char* output; /* such as "logits" */
  const char* status; /* "pass", "fail" or "skip" */
  const char* reason; /* why it failed or was skipped, else empty */
  double max_abs;     /* largest difference to PyTorch's output */
  double needed;      /* the tolerance that would have passed */
  double tolerance;   /* the one allowed: docs/parity.md */
} MraGoldenRow;

/* Runs the bundle's golden inputs and compares with the outputs that PyTorch wrote at export. */
MRA_SESSION_API MraError* mra_session_compare_golden(const MraSession* session, MraGolden** golden);
MRA_SESSION_API size_t mra_golden_count(const MraGolden* golden);
MRA_SESSION_API const MraGoldenRow* mra_golden_row(const MraGolden* golden, size_t index);
MRA_SESSION_API void mra_golden_free(MraGolden* golden);

/* As mra_session_compare_golden; a row that fails is an MRA_PARITY_ERROR. A server is ready when this has returned NULL. */
MRA_SESSION_API MraError* mra_session_validate(const MraSession* session);

#ifdef __cplusplus
}
#endif

#endif /* MRA_SESSION_H_ */
