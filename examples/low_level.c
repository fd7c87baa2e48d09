/* The tier below gleaner_ask: a plan, every token's score in each step, a prompt of the sentences that are left, and an
 * answer that ends at the caller's own rule.
 *   cc -Iinclude examples/low_level.c -Ltarget/release -lgleaner -o low_level */
#include <gleaner.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

/* Prints the token that the question looks at most, and where it stands. */
static int on_step(void *user_data, const gleaner_step *step) {
    const gleaner_plan_tables *tables = user_data;
    size_t best = 0, first = 0;
    for (size_t i = 1; i < step->context_tokens; i++)
        if (step->scores[i] > step->scores[best]) best = i;
    for (size_t i = 0; i < step->sentence_count; i++) {
        uint32_t sentence = step->sentences[i];
        size_t length = tables->sentence_offsets[sentence + 1] - tables->sentence_offsets[sentence];
        if (best < first + length) {
            printf("step %zu: most looked at is token %zu of sentence %u, with %.4g\n", step->step, best - first,
                   (unsigned)sentence, step->scores[best]);
            break;
        }
        first += length;
    }
    return 0;
}

/* Ends the answer behind the first line. */
static int on_token(void *user_data, uint32_t token, const char *text, size_t length) {
    (void)user_data, (void)token;
    return memchr(text, '\n', length) != NULL;
}

/* What is to be done with a status: the words of an error, and 1. */
static int failed(gleaner_status status, const gleaner_engine *engine) {
    if (status) fprintf(stderr, "%s\n", gleaner_last_error(engine));
    return status != GLEANER_OK;
}

static int ask(gleaner_engine *engine, const gleaner_plan *plan) {
    gleaner_plan_tables tables = {.struct_size = sizeof tables};
    if (failed(gleaner_plan_view(plan, &tables), NULL)) return 1;

    /* No more sentences stay than there are best tokens. */
    gleaner_read_options reading;
    gleaner_read_options_init(&reading, sizeof reading);
    reading.scores = 1;
    reading.step = on_step;
    reading.user_data = &tables;
    size_t count, capacity = tables.topk;
    gleaner_kept *kept = malloc(capacity * sizeof *kept);
    uint32_t *sentences = malloc(capacity * sizeof *sentences), *prompt = NULL, answer[128];
    char text[4096];
    int result = !kept || !sentences || failed(gleaner_read(engine, plan, &reading, kept, capacity, &count), engine);

    /* Any choice of sentences can be answered from; this is the reader's. */
    if (!result) {
        for (size_t i = 0; i < count; i++) sentences[i] = kept[i].sentence;
        size_t length = 0;
        gleaner_final_prompt(engine, plan, sentences, count, NULL, 0, &length);
        prompt = malloc(length * sizeof *prompt);
        result = !prompt || failed(gleaner_final_prompt(engine, plan, sentences, count, prompt, length, &length), engine);
        gleaner_decode_options decoding;
        gleaner_decode_options_init(&decoding, sizeof decoding);
        decoding.max_new_tokens = sizeof answer / sizeof *answer;
        decoding.token = on_token;
        result = result ||
                 failed(gleaner_decode(engine, prompt, length, &decoding, answer, decoding.max_new_tokens, &count), engine) ||
                 failed(gleaner_detokenize(engine, answer, count, text, sizeof text, &length), engine);
        if (!result) printf("answer:%s\n", text);
    }
    free(kept), free(sentences), free(prompt);
    return result;
}

int main(int argc, char **argv) {
    if (argc != 4) {
        fprintf(stderr, "usage: %s MODEL DOCUMENT QUESTION\n", argv[0]);
        return 2;
    }
    gleaner_engine *engine = NULL;
    gleaner_document *document = NULL;
    gleaner_plan *plan = NULL;
    int result = failed(gleaner_engine_open(argv[1], NULL, &engine), NULL) ||
                 failed(gleaner_document_open(argv[2], &document), NULL) ||
                 failed(gleaner_plan_from_document(engine, document, argv[3], NULL, &plan), engine) || ask(engine, plan);
    gleaner_plan_free(&plan);
    gleaner_document_free(&document);
    gleaner_engine_free(&engine);
    return result;
}
