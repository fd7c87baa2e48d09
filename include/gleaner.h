/* Gleaner: answers questions about documents of any length, with the sentences that each answer came from.
 *
 * docs/embedding.md is the guide, with programs. In short:
 *
 *     gleaner_engine *engine;      a model on a device: open one, keep it
 *     gleaner_document *document;  a text
 *     gleaner_answer *answer;      gleaner_ask(engine, document, question, NULL, &answer)
 *
 * One tier below, a plan is made from a document and a question or from token ids; gleaner_read gives each step's
 * sentences and the score of every token; gleaner_decode continues a prompt.
 *
 * Errors. Every function that can fail returns a gleaner_status, and gleaner_last_error says in words what was wrong,
 * where, and what to do. What a failed call was to write is untouched, unless said otherwise. The library does not print,
 * exit, abort on bad input, install signal handlers or let a Rust panic out. Two things it cannot turn into an error: the
 * process running out of memory, and a model file that another process shortens while it is mapped.
 *
 * Handles. A handle is null, or what this library made and did not yet free; a free function sets it to null. Null and a
 * handle of another kind are errors. A copy of a freed handle is often recognised, never reliably: it is a mistake like
 * using freed memory, and only tools that find those find it for certain.
 *
 * Memory. Pointers from the library belong to the handle they were asked of and live as long as that. The library copies
 * what it is given. Text is UTF-8; offsets and lengths are in bytes; counts are in elements.
 *
 * Threads. Any number of threads may use one handle at once, and engines, documents, plans and answers may go from thread
 * to thread. On a GPU the calls of one engine wait for each other. Free a handle once, when no call with it is under way.
 * Callbacks come on the thread that made the call, before it returns. A callback may call the library, but not read, ask
 * or decode with the engine that called it, which is an error. It must return: no longjmp, no C++ exception.
 * CPU work is shared with a pool of threads that starts with the first call and lasts as long as the process;
 * RAYON_NUM_THREADS in the environment sets their number.
 *
 * Structs that may grow begin with struct_size: the init functions set it and the defaults.
 */
#ifndef GLEANER_H
#define GLEANER_H

#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

/* The version of this header. */
#define GLEANER_VERSION "0.1.0"
/* Rises when a program must be compiled anew. */
#define GLEANER_ABI_VERSION 1

/* Result of a call. */
typedef int32_t gleaner_status;
enum {
    GLEANER_OK = 0,
    GLEANER_CANCELLED = 1,       /* a callback asked for it */
    GLEANER_ERROR_ARGUMENT = 2,  /* a null, a handle of another kind, a struct_size, text that is not UTF-8 */
    GLEANER_ERROR_BUFFER = 3,    /* a buffer is too small; the count says what is needed */
    GLEANER_ERROR_FILE = 4,      /* a file cannot be opened, read or mapped */
    GLEANER_ERROR_DOCUMENT = 5,  /* a document that is empty or not UTF-8 */
    GLEANER_ERROR_MODEL = 6,     /* a model directory that is not there, or a file of it that is not supported */
    GLEANER_ERROR_TEMPLATE = 7,  /* a prompt or chat template, or the tokenizer */
    GLEANER_ERROR_PARAMETER = 8, /* an option out of its range, a question that is empty or too long */
    GLEANER_ERROR_PLAN = 9,      /* tables or tokens that contradict each other or the model */
    GLEANER_ERROR_DEVICE = 10,   /* a device that is not there, lacks memory or failed */
    GLEANER_ERROR_NOT_FINITE = 11, /* the model produced a value that is not a number */
    GLEANER_ERROR_INTERNAL = 12  /* a defect of the library; please report it */
};

/* The version of the library, as "0.1.0". */
const char *gleaner_version(void);

/* Whether a program compiled with this header can use the library that it found:
 * gleaner_check_abi(GLEANER_ABI_VERSION) is GLEANER_OK or GLEANER_ERROR_ARGUMENT. */
gleaner_status gleaner_check_abi(uint32_t abi_version);

/* A model on a device. */
typedef struct gleaner_engine gleaner_engine;
/* A text to be asked about. */
typedef struct gleaner_document gleaner_document;
/* An answer with its evidence. */
typedef struct gleaner_answer gleaner_answer;
/* A reading job: tables of integers. */
typedef struct gleaner_plan gleaner_plan;

/* What went wrong in the calling thread's last call with this engine; "" if nothing did. Valid until that thread's next
 * call with the engine, or until the engine is freed. For calls without an engine, and for one that is not valid, pass
 * NULL: what comes is valid until the thread's next such call. */
const char *gleaner_last_error(const gleaner_engine *engine);

/* ---- Engines ---------------------------------------------------------------------------------------------------- */

enum { GLEANER_LOG_INFO = 0, GLEANER_LOG_WARNING = 1 };

/* Takes a message: the device that was chosen, why a GPU is not used, the warnings of an answer. It may come on any
 * thread that calls with the engine, on several at once. */
typedef void (*gleaner_log_fn)(void *user_data, int level, const char *message);

typedef struct gleaner_engine_options {
    size_t struct_size;
    /* "auto" (the first GPU if it can be used, else the CPU), "cpu", "cuda", "cuda:N"; null is "auto". */
    const char *device;
    /* A CUstream or cudaStream_t of the device's primary context to do all work on, or null for a stream of the engine's
     * own; with it, device must be "cuda" or "cuda:N". The stream must live as long as the engine, and while a call with
     * the engine is under way nothing else may put work on it, wait for it or record it. The default streams are
     * refused. */
    void *cuda_stream;
    gleaner_log_fn log; /* or null */
    void *user_data;    /* for log */
} gleaner_engine_options;

/* Sets struct_size, which is sizeof *options, and the defaults: "auto" and nothing else. */
gleaner_status gleaner_engine_options_init(gleaner_engine_options *options, size_t struct_size);

/* Opens a Hugging Face model directory. options may be null. *engine is set to null if it fails; the error is
 * gleaner_last_error(NULL). */
gleaner_status gleaner_engine_open(const char *model_dir, const gleaner_engine_options *options,
                                   gleaner_engine **engine);

/* Frees *engine and sets it to null. A null engine or *engine is fine. A callback may free its own engine: the call that
 * is under way finishes. */
gleaner_status gleaner_engine_free(gleaner_engine **engine);

/* What it runs on, for people; null if the engine is not valid. */
const char *gleaner_engine_device(const gleaner_engine *engine);

/* ---- Documents -------------------------------------------------------------------------------------------------- */

/* A document from a file, or from length bytes of memory, in which NUL is a character like others. name, which may be
 * null, is what errors call it. *document is set to null if it fails; the error is gleaner_last_error(NULL). */
gleaner_status gleaner_document_open(const char *path, gleaner_document **document);
gleaner_status gleaner_document_from_text(const char *name, const char *text, size_t length,
                                          gleaner_document **document);

/* Frees *document and sets it to null. Plans made from it keep what they need. */
gleaner_status gleaner_document_free(gleaner_document **document);

/* The whole text, which spans are offsets into, with no NUL behind it; null if the document is not valid. */
const char *gleaner_document_text(const gleaner_document *document, size_t *length);

/* ---- Asking ----------------------------------------------------------------------------------------------------- */

/* A sentence that was kept, with its best token's score, comparable within one step. */
typedef struct gleaner_kept {
    uint32_t sentence;
    float score;
} gleaner_kept;

/* What one step of a reading did. All of it lives until the callback returns. */
typedef struct gleaner_step {
    size_t struct_size;
    size_t step;            /* from 0 */
    size_t steps;           /* how many there will be */
    size_t tokens;          /* of the whole prompt */
    size_t context_tokens;  /* of its context */
    size_t retained_tokens; /* that stay */
    /* Sentences that stay, ascending. */
    const gleaner_kept *kept;
    size_t kept_count;
    /* The sentences of the context, ascending: their tokens, one sentence behind the other, are the context. */
    const uint32_t *sentences;
    size_t sentence_count;
    /* The score of each context token, context_tokens of them; null unless gleaner_read was asked for scores. */
    const float *scores;
} gleaner_step;

/* Called after each step; on a GPU, where nothing comes back before the last step, for all of them behind it. Any return
 * but 0 cancels the call. */
typedef int (*gleaner_step_fn)(void *user_data, const gleaner_step *step);

/* Takes the answer's next piece of text, whole characters, NUL behind it. Any return but 0 ends the answer there, which
 * is no error. */
typedef int (*gleaner_text_fn)(void *user_data, const char *text, size_t length);

typedef struct gleaner_ask_options {
    size_t struct_size;
    /* How the document is read. */
    size_t window_length;       /* most tokens of a chunk: 16 to 32768; 1024 */
    size_t topk;                /* best tokens of a step, whose sentences stay: 1 to 16384; 300 */
    size_t phrase_width;        /* width of the filter over token scores: 1 to 256; 8 */
    size_t max_retained;        /* most tokens that stay after a step; 0 is twice the window; 0 */
    size_t max_sentence_tokens; /* longer sentences are cut: 8 to 32768; 256 */
    size_t short_tail;          /* a piece of so many characters behind a full stop starts no sentence; 8 */
    size_t chunk_short_tail;    /* nor, of so many, a chunk; 10 */
    const char *prompt_template; /* a prompt with {context} and {question}; null is the paper's */
    /* How the answer is chosen. */
    size_t max_new_tokens; /* 1 to 65536; 128 */
    float temperature;     /* 0 to 100; 0 takes the likeliest token */
    float top_p;           /* above 0, at most 1; 1 */
    uint64_t seed;         /* the same seed gives the same draws; 0 */
    gleaner_step_fn step;  /* or null */
    gleaner_text_fn text;  /* or null */
    void *user_data;       /* for both */
} gleaner_ask_options;

gleaner_status gleaner_ask_options_init(gleaner_ask_options *options, size_t struct_size);

/* Answers a question from a document. options may be null. *answer is set to null if it fails. */
gleaner_status gleaner_ask(gleaner_engine *engine, const gleaner_document *document, const char *question,
                           const gleaner_ask_options *options, gleaner_answer **answer);

gleaner_status gleaner_answer_free(gleaner_answer **answer);

/* The answer's text, NUL behind it; null if the answer is not valid. length may be null. */
const char *gleaner_answer_text(const gleaner_answer *answer, size_t *length);

/* The whole answer with figures, parameters, times and warnings as a JSON object: what `gleaner ask --json` prints. */
const char *gleaner_answer_json(const gleaner_answer *answer);

/* A sentence that the answer was made from. */
typedef struct gleaner_evidence {
    const char *text;   /* the document from start to end, NUL behind it */
    size_t text_length; /* end - start */
    size_t start;       /* its first byte in the document */
    size_t end;         /* one past its last */
    size_t line;        /* the line it starts on, from 1 */
    size_t chunk;       /* the chunk that brought it in, from 0 */
    float score;        /* of its best token in the last step; comparable within one answer */
} gleaner_evidence;

/* Evidence by index, highest score first; null beyond the last. */
const gleaner_evidence *gleaner_answer_evidence(const gleaner_answer *answer, size_t index);

/* ---- Plans and scores ------------------------------------------------------------------------------------------- */

/* A plan's tables. A step's prompt is prefix, the kept sentences, the sentences of its chunk, tail. */
typedef struct gleaner_plan_tables {
    size_t struct_size;
    const uint32_t *prefix; /* tokens before the context; may be null if there are none */
    size_t prefix_count;
    const uint32_t *tail; /* tokens behind it */
    size_t tail_count;
    size_t question_start; /* index in tail of the first token that attention is read from; they run to its end */
    const uint32_t *tokens; /* of all sentences, in order */
    size_t token_count;
    /* Sentence s is tokens[sentence_offsets[s]] up to tokens[sentence_offsets[s + 1]]; one more than sentences. */
    const uint32_t *sentence_offsets;
    size_t sentence_offset_count;
    /* Chunk c is sentence chunk_offsets[c] up to chunk_offsets[c + 1]; one more than chunks, which are the steps. */
    const uint32_t *chunk_offsets;
    size_t chunk_offset_count;
    uint32_t topk;         /* best tokens of a step */
    uint32_t phrase_width; /* width of the filter over scores; 1 is none */
    uint32_t max_retained; /* most tokens that stay after a step */
} gleaner_plan_tables;

/* The plan that gleaner_ask would read: of the options, which may be null, those of reading count. *plan is set to null
 * if this or the next fails. */
gleaner_status gleaner_plan_from_document(gleaner_engine *engine, const gleaner_document *document,
                                          const char *question, const gleaner_ask_options *options,
                                          gleaner_plan **plan);

/* A plan of the caller's own tokens, checked against the engine's model. */
gleaner_status gleaner_plan_from_tokens(gleaner_engine *engine, const gleaner_plan_tables *tables,
                                        gleaner_plan **plan);

gleaner_status gleaner_plan_free(gleaner_plan **plan);

/* Fills *tables, whose struct_size the caller sets, with pointers into the plan. */
gleaner_status gleaner_plan_view(const gleaner_plan *plan, gleaner_plan_tables *tables);

/* The bytes of a sentence in the document that the plan was made from. The spans cover the document without gap. */
gleaner_status gleaner_plan_span(const gleaner_plan *plan, uint32_t sentence, size_t *start, size_t *end);

typedef struct gleaner_read_options {
    size_t struct_size;
    int scores;           /* whether steps carry the score of every context token; 0 */
    gleaner_step_fn step; /* or null */
    void *user_data;      /* for step */
} gleaner_read_options;

gleaner_status gleaner_read_options_init(gleaner_read_options *options, size_t struct_size);

/* Reads a plan to its end and writes the sentences that are left, ascending. kept must hold topk elements or as many as
 * the plan has sentences, whichever is fewer: that is checked before reading, and *count is then what is needed. options
 * may be null. */
gleaner_status gleaner_read(gleaner_engine *engine, const gleaner_plan *plan, const gleaner_read_options *options,
                            gleaner_kept *kept, size_t capacity, size_t *count);

/* The prompt to answer from, out of any sentences of a plan that was made from a document, in the order given. Writes up
 * to capacity tokens; if there are more, fails with *count tokens needed. tokens may be null if capacity is 0. */
gleaner_status gleaner_final_prompt(gleaner_engine *engine, const gleaner_plan *plan, const uint32_t *sentences,
                                    size_t sentence_count, uint32_t *tokens, size_t capacity, size_t *count);

/* Takes the next token and the text that it made certain, "" if a character is not whole yet; NUL behind it. Any return
 * but 0 ends the answer behind this token, which is no error. */
typedef int (*gleaner_token_fn)(void *user_data, uint32_t token, const char *text, size_t length);

typedef struct gleaner_decode_options {
    size_t struct_size;
    size_t max_new_tokens; /* as for gleaner_ask, and so on */
    float temperature;
    float top_p;
    uint64_t seed;
    gleaner_token_fn token; /* or null */
    void *user_data;        /* for token */
} gleaner_decode_options;

gleaner_status gleaner_decode_options_init(gleaner_decode_options *options, size_t struct_size);

/* Continues a prompt until the model ends, the callback stops or max_new_tokens, and writes the new tokens without the
 * end token. tokens must hold max_new_tokens: that is checked before decoding, and *count is then what is needed.
 * options may be null. */
gleaner_status gleaner_decode(gleaner_engine *engine, const uint32_t *prompt, size_t prompt_count,
                              const gleaner_decode_options *options, uint32_t *tokens, size_t capacity,
                              size_t *count);

/* Tokens of length bytes of text. Special tokens such as an end-of-turn mark are taken as such if parse_special is not 0,
 * and stay plain text if it is, as they must in a document. Buffers as in gleaner_final_prompt. */
gleaner_status gleaner_tokenize(gleaner_engine *engine, const char *text, size_t length, int parse_special,
                                uint32_t *tokens, size_t capacity, size_t *count);

/* The text of tokens, special ones left out, NUL behind it: capacity must be above its length. If it is not, fails with
 * *length bytes needed, the NUL not counted. */
gleaner_status gleaner_detokenize(gleaner_engine *engine, const uint32_t *tokens, size_t count, char *text,
                                  size_t capacity, size_t *length);

#ifdef __cplusplus
}
#endif

#endif /* GLEANER_H */
