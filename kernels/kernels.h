// The contract between the kernels and the rest: every launcher, and a profiler's ranges. build.rs makes the Rust
// declarations from this file, so it includes no CUDA header.
//
// A launcher takes outputs, inputs, dimensions and the stream, in this order. It returns a cudaError_t (0 is success),
// allocates nothing, waits for nothing and keeps no state. Pointers are device memory, aligned to 16 bytes.
#pragma once

#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

// The text of a cudaError_t.
const char *gleaner_error_string(int32_t status);

// The residual stream of some rows, of `width` columns, as kernels hand it on:
// - scaled, bf16 [rows, width]: x times the weights of the norm that comes next, which products are made of. Weights nearer to
//   zero than 2^-60 count as that;
// - rest, uint16 [rows, width]: what scaled lacks of that in fp32, whose bits are (scaled << 16 | rest) - 0x8000;
// - squares, fp32 [rows, GLEANER_SQUARES(width)], whose sum over a row is that of the squares of x. A product that is made of
//   scaled is multiplied, row by row, with 1 / sqrt(sum / width + eps): that is the norm.
// Of squares, a kernel writes those of its columns. Of some 32 columns gleaner_gemm_sm90_residual writes two, the second behind
// those of all columns, and gleaner_gemm_residual leaves that as it is: gleaner_embed must come between the two. Elements that no
// kernel has written must be zero.
#define GLEANER_SQUARES_COLUMNS 512
#define GLEANER_SQUARES_SLOTS 16
#define GLEANER_SQUARES(width) \
    (((width) + GLEANER_SQUARES_COLUMNS - 1) / GLEANER_SQUARES_COLUMNS * GLEANER_SQUARES_SLOTS)

// Of each token of a prompt from first_row on, its row of embedding [*, width]; norm, bf16 [width]: weights of the norm that
// comes next. rows: a device integer of at most max_rows. first_row: device integer, or null for 0.
int32_t gleaner_embed(void *scaled, void *rest, float *squares, const uint32_t *prompt, const void *embedding,
                      const void *norm, const int32_t *rows, const int32_t *first_row, int32_t max_rows, int32_t width,
                      void *stream);

// x, fp32 [width], of one row; norm [width]: the weights that the stream is scaled with. width is even.
int32_t gleaner_stream_row(float *x, const void *scaled, const void *rest, const void *norm, int32_t row, int32_t width,
                           void *stream);

// Linear layers: weight [n, k], bias [n] or null, a [rows, k], all bf16; n a multiple of 16, k of 8. rows is a device
// integer of at most max_rows; rows beyond it are neither read nor written.

// x += a weight^T + bias for the residual stream [rows, n], which was scaled with the weights scaled_by [n] and is from then
// on with norm [n].
int32_t gleaner_gemm_residual(void *scaled, void *rest, float *squares, const void *a, const void *weight,
                              const void *bias, const void *scaled_by, const void *norm, const int32_t *rows,
                              int32_t max_rows, int32_t n, int32_t k, void *stream);

// out [rows, n / 2] = silu(gate) * up of norm(a) weight^T + bias, where a is `scaled` and comes with its squares; the rows
// of weight and bias come as 8 of the gate, 8 of up, and so on.
int32_t gleaner_gemm_swiglu(void *out, const void *a, const float *squares, const void *weight, const void *bias,
                            const int32_t *rows, int32_t max_rows, int32_t n, int32_t k, float eps, void *stream);

// Where the rows of a product lie: the first of them in a, in the table of positions, in out. Device integers, or null for 0.
typedef struct {
    const int32_t *a, *position, *out;
} GleanerStarts;

// out [starts.out..] = norm(a)[starts.a..] weight^T + bias, a and squares as above, the heads in the columns below
// rope_columns rotated by their position, starts.position + row. Dimensions of such heads come as 8 of the lower half, 8 of
// the upper, and so on, in weight, bias and out; head_dim is 32, 64 or 128. table: float2 (cosine, sine)
// [positions, head_dim / 2].
int32_t gleaner_gemm_rope(void *out, const void *a, const float *squares, const void *weight, const void *bias,
                          const void *table, const int32_t *rows, GleanerStarts starts, int32_t max_rows, int32_t n,
                          int32_t k, int32_t head_dim, int32_t rope_columns, float eps, void *stream);

// The same three for Hopper (compute capability 9.0 alone), which may read dead rows: a and the stream hold max_rows rows. For
// rope it is a_rows that a holds, and the table `positions`; it is read whether or not heads are rotated. They start before the
// kernel before them has ended: weights, *rows and starts were there when that one started.
int32_t gleaner_gemm_sm90_residual(void *scaled, void *rest, float *squares, const void *a, const void *weight,
                                   const void *bias, const void *scaled_by, const void *norm, const int32_t *rows,
                                   int32_t max_rows, int32_t n, int32_t k, void *stream);
int32_t gleaner_gemm_sm90_swiglu(void *out, const void *a, const float *squares, const void *weight, const void *bias,
                                 const int32_t *rows, int32_t max_rows, int32_t n, int32_t k, float eps, void *stream);
int32_t gleaner_gemm_sm90_rope(void *out, const void *a, const float *squares, const void *weight, const void *bias,
                               const void *table, const int32_t *rows, GleanerStarts starts, int32_t max_rows,
                               int32_t a_rows, int32_t positions, int32_t n, int32_t k, int32_t head_dim,
                               int32_t rope_columns, float eps, void *stream);

// The same for one row. Where there is a norm [k], it is applied to x, fp32 [k], and what comes of it is not rounded.

// out fp32 [n]. *best, zero before, becomes the likeliest of the first vocab_size tokens, as gleaner_sample reads it.
int32_t gleaner_gemv_logits(float *out, uint64_t *best, const float *x, const void *norm, const void *weight, float eps,
                            int32_t vocab_size, int32_t n, int32_t k, void *stream);

// x fp32 [n] += a weight^T + bias
int32_t gleaner_gemv_residual(float *x, const void *a, const void *weight, const void *bias, int32_t n, int32_t k,
                              void *stream);

// out [n / 2], as gleaner_gemm_swiglu
int32_t gleaner_gemv_swiglu(void *out, const float *x, const void *norm, const void *weight, const void *bias,
                            float eps, int32_t n, int32_t k, void *stream);

// Row *out_row of out [*, n], as gleaner_gemm_rope; *out_row is its position.
int32_t gleaner_gemv_rope(void *out, const float *x, const void *norm, const void *weight, const void *bias,
                          const void *table, const int32_t *out_row, float eps, int32_t n, int32_t k, int32_t head_dim,
                          int32_t rope_columns, void *stream);

// Qwen3, in place: the first `heads` heads of rows first_row.. of x [*, stride] are normalised, the first q_heads of
// them with q_norm [head_dim], the others with k_norm, and rotated by their position, row_start + row of x. Dimensions
// and table as in gleaner_gemm_rope. first_row, row_start: device integers, or null for 0.
int32_t gleaner_head_norm(void *x, const void *q_norm, const void *k_norm, const void *table, const int32_t *rows,
                          const int32_t *row_start, const int32_t *first_row, int32_t max_rows, int32_t stride,
                          int32_t q_heads, int32_t heads, int32_t head_dim, float eps, void *stream);

// out [num_heads * head_dim]: the row at *position of qkv [max_rows, *] over the rows up to it, as gleaner_attention. The
// keys are shared by `splits` CTAs, at most 32; parts: fp32 [num_heads, splits, head_dim + 2]; done: int [num_heads], zero
// before and after.
int32_t gleaner_decode_attention(void *out, float *parts, int32_t *done, const void *qkv, const int32_t *position,
                                 int32_t max_rows, int32_t splits, int32_t num_heads, int32_t num_kv_heads,
                                 int32_t head_dim, int32_t window, void *stream);

// A row's way through a layer in three kernels, for Hopper and for layers that gleaner_row_sm90_fits says they serve. In between
// the residual stream is a row of int64 [3 * width + 2], in units of 2^-32, so that many CTAs may add to it in any order with
// the same sum: x, what was added since in two sums, and whether something was out of range (2^21 of an addition, 2^30 of the sum)
// or not finite, in which case the row comes back as not a number. Until then the kernels go on with what is left of it.

// Whether these kernels serve rows so wide, an intermediate size of so many and heads so wide, on this device; 0 or 1.
int32_t gleaner_row_sm90_fits(int32_t width, int32_t intermediate, int32_t head_dim);

// row = x, fp32 [width]. What comes before has ended when the next kernel but one starts.
int32_t gleaner_row_sm90_start(int64_t *row, const float *x, int32_t width, void *stream);

// x = row
int32_t gleaner_row_sm90_end(float *x, const int64_t *row, int32_t width, void *stream);

// As gleaner_gemv_rope.
int32_t gleaner_row_sm90_qkv(void *out, const int64_t *row, const void *norm, const void *weight, const void *bias,
                             const void *table, const int32_t *out_row, float eps, int32_t n, int32_t k, int32_t head_dim,
                             int32_t rope_columns, void *stream);

// row += a weight^T + bias, a [num_heads * 64] as gleaner_decode_attention makes it, weight [width, num_heads * 64].
// *position, and the rows of qkv before it, were there when the kernel before the last one started.
int32_t gleaner_row_sm90_attention(int64_t *row, const void *qkv, const void *weight, const void *bias,
                                   const int32_t *position, int32_t num_heads, int32_t num_kv_heads, int32_t window,
                                   int32_t width, void *stream);

// row += (silu(gate) * up) down^T + down_bias, gate and up as gleaner_gemv_swiglu makes them of norm(row) and gate_up
// [2 * intermediate, width]; down [width, intermediate].
int32_t gleaner_row_sm90_mlp(int64_t *row, const void *norm, const void *gate_up, const void *gate_up_bias,
                             const void *down, const void *down_bias, float eps, int32_t width, int32_t intermediate,
                             void *stream);

// out [rows - first_row, num_heads * head_dim] = softmax(q k^T / sqrt(head_dim)) v of the rows from first_row on, causal; qkv
// [rows, (num_heads + 2 * num_kv_heads) * head_dim], bf16. head_dim 64 or 128. window: keys a row may attend to, itself
// included; 0 for all. first_row: a device integer, or null for 0; a row's result is the same whichever it is.
int32_t gleaner_attention(void *out, const void *qkv, const int32_t *rows, const int32_t *first_row, int32_t max_rows,
                          int32_t num_heads, int32_t num_kv_heads, int32_t head_dim, int32_t window, void *stream);

// The same on compute capability 9.0. It starts before the kernel before it has ended.
int32_t gleaner_attention_sm90(void *out, const void *qkv, const int32_t *rows, const int32_t *first_row,
                               int32_t max_rows, int32_t num_heads, int32_t num_kv_heads, int32_t head_dim,
                               int32_t window, void *stream);

// Where the reading of a document stands.
typedef struct {
    int32_t chunk;              // of the prompt that lies ready
    int32_t tokens;             // of that prompt; 0: nothing is left to do
    int32_t first_row;          // tokens before it are those of the step before, and so are their keys and values
    int32_t rows;               // tokens from there on: what the step computes
    int32_t context_tokens;
    int32_t context_sentences;
    int32_t question_offset;    // tokens between the context and the first question row
    int32_t question_start;     // the first question row, as a token of the prompt
    int32_t question_row;       // the same, of the rows that are computed
    int32_t question_rows;
    int32_t kept;               // sentences
    int32_t kept_tokens;
    int32_t dropped_for_capacity;  // sentences, over all steps
    int32_t error;              // GLEANER_ERROR_*
} GleanerState;

#define GLEANER_ERROR_NOT_FINITE 1  // a score was infinite or not a number
#define GLEANER_ERROR_CAPACITY 2    // a prompt was longer than max_tokens

// A reading plan, as device tables.
typedef struct {
    const uint32_t *tokens;            // of all sentences
    const uint32_t *sentence_offsets;  // [sentences + 1]
    const uint32_t *chunk_offsets;     // [chunks + 1]
    const uint32_t *prefix, *tail;
    int32_t prefix_len, tail_len;
    int32_t question_start;            // in the tail
    int32_t chunks, topk, phrase_width, max_retained;
} GleanerPlan;

// A sentence that owned one of a step's best tokens.
typedef struct {
    uint32_t sentence;
    uint32_t kept;   // 1, or 0 if it was dropped for max_retained
    float score;
} GleanerSelected;

// What a step did.
typedef struct {
    int32_t tokens, context_tokens;
    int32_t selected;   // entries in its log
    int32_t kept_tokens;
    int32_t first_row;  // as in the state
} GleanerStep;

// What the steps of a document share, on the device; arrays have max_tokens elements where nothing else is said.
typedef struct {
    GleanerState *state;
    uint32_t *prompt;       // the step's tokens
    int32_t *owner;         // position in `sentences` of the one that owns a context token
    uint32_t *sentences;    // of the context, ascending
    double *scores;         // of context tokens, before the filter
    float *phrase_scores;   // behind it
    uint32_t *best;         // bits of each sentence's best score, and whether it owns one of the best tokens
    GleanerSelected *log;   // [chunks, max_log], each step's in order of sentence
    GleanerStep *step_log;  // [chunks]
    int32_t max_tokens;
    int32_t max_log;        // at least topk, or max_tokens
    int32_t reuses;         // whether keys and values of the step before are there: else each step computes all rows
} GleanerLoop;

// Clears the state and writes the first step's prompt.
int32_t gleaner_start(const GleanerLoop *loop, const GleanerPlan *plan, void *stream);

// Logits of the question rows to all keys, and of each row the maximum and what makes the exponentials' sum one.
// logits: fp32 [num_heads, max_rows, max_tokens rounded up to a multiple of 4]; row_stats: float2 (maximum, 1 / sum of
// exponentials) [num_heads, max_rows]; block_stats, in between: float2 (maximum, sum) of 128 keys [num_heads, max_rows,
// ceil(max_tokens / 128)]; done: int [num_heads, ceil(max_rows / 16)], zero before and after; q: bf16 [question_rows,
// num_heads * head_dim]; k: bf16 [tokens, num_kv_heads * head_dim]; head_dim 64 or 128.
int32_t gleaner_question_logits(float *logits, void *row_stats, void *block_stats, int32_t *done, const void *q,
                                const void *k, const GleanerState *state, int32_t max_rows, int32_t max_tokens,
                                int32_t num_heads, int32_t num_kv_heads, int32_t head_dim, int32_t window,
                                void *stream);

// head_sums: fp32 [max_rows, max_tokens], probabilities summed over heads; row_weights: fp32 [max_rows], written in the
// first step and read in later ones; scores: fp64 [context_tokens], sum over rows of weight^2 * head_sums.
int32_t gleaner_question_scores(double *scores, float *head_sums, float *row_weights, const float *logits,
                                const void *row_stats, const GleanerState *state, int32_t max_rows,
                                int32_t max_tokens, int32_t num_heads, void *stream);

// From `scores` to `kept`, the log and the next step's prompt. Comes behind gleaner_question_scores: it reads what the step
// before wrote while that one still runs.
int32_t gleaner_select(const GleanerLoop *loop, const GleanerPlan *plan, void *stream);

// How the next token is chosen.
typedef struct {
    float temperature, top_p;
    uint64_t seed;
} GleanerSampling;

// Where an answer stands.
typedef struct {
    int32_t position;  // of its last token, or of the prompt's last before the first
    int32_t tokens;    // of the answer
} GleanerAnswer;

#define GLEANER_NO_TOKEN 0xffffffffu  // a logit was not a number or infinite, or all were minus infinity

// The next token from logits fp32 [vocab_size], of which *best is the likeliest: written to slot `tokens % slots` of
// `sent`, which may be host memory. Its row of the embedding goes to x, fp32 [hidden_size], *best to zero, and the answer's
// position and number of tokens grow by one.
int32_t gleaner_sample(float *x, GleanerAnswer *answer, uint32_t *sent, uint64_t *best, const float *logits,
                       const GleanerSampling *sampling, const void *embedding, int32_t slots, int32_t vocab_size,
                       int32_t hidden_size, void *stream);

// Keeps the stream until the host has written `turn` to `released`, which is host memory, or `limit` nanoseconds have
// passed. Where released is null, a kernel that does nothing.
int32_t gleaner_hold(const uint32_t *released, uint32_t turn, uint64_t limit, void *stream);

// In nvtx.c, which is built where the toolkit has NVTX's header. A range belongs to the thread that pushes it.

// Null if no profiler listens. Others take what it returned, not null.
void *gleaner_range_domain(void);
void gleaner_range_push(void *domain, const char *name);
void gleaner_range_pop(void *domain);

#ifdef __cplusplus
}
#endif
