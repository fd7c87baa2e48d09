/* Callbacks: on which thread they come, what they may do, how they cancel. Threads: two engines, and one for both. */
#include "check.h"
#include <pthread.h>

typedef struct {
    gleaner_engine *engine;
    const gleaner_document *document;
    pthread_t thread;
    int calls;
    int stop_at;
    size_t length;
} state;

static int on_step(void *user_data, const gleaner_step *step) {
    state *s = user_data;
    CHECK(pthread_equal(pthread_self(), s->thread));
    CHECK(step->struct_size == sizeof *step && step->step == (size_t)s->calls && step->step < step->steps);
    CHECK(step->kept_count <= step->sentence_count && step->context_tokens < step->tokens);
    return ++s->calls == s->stop_at;
}

/* Raw scores: one a token, and a sentence's best is what it is kept with. */
static int on_scores(void *user_data, const gleaner_step *step) {
    const gleaner_plan_tables *tables = user_data;
    const float *scores = step->scores;
    size_t kept = 0;
    CHECK(scores);
    for (size_t i = 0; i < step->sentence_count; i++) {
        uint32_t sentence = step->sentences[i];
        const float *end = scores + tables->sentence_offsets[sentence + 1] - tables->sentence_offsets[sentence];
        float best = 0;
        for (; scores < end; scores++) best = *scores > best ? *scores : best;
        if (kept < step->kept_count && step->kept[kept].sentence == sentence) CHECK(step->kept[kept++].score == best);
    }
    CHECK(kept == step->kept_count && scores == step->scores + step->context_tokens);
    return 0;
}

static int on_token(void *user_data, uint32_t token, const char *text, size_t length) {
    uint32_t *last = user_data;
    CHECK(strlen(text) == length);
    *last = token;
    return length > 0; /* the rule: one piece of text is enough */
}

static void low_level(gleaner_engine *engine, const gleaner_document *document) {
    gleaner_plan *plan;
    gleaner_plan_tables tables = {.struct_size = sizeof tables};
    gleaner_ask_options options;
    gleaner_ask_options_init(&options, sizeof options);
    options.window_length = 256, options.topk = 50;
    CHECK(!gleaner_plan_from_document(engine, document, QUESTION, &options, &plan));
    CHECK(!gleaner_plan_view(plan, &tables) && tables.topk == 50 && tables.chunk_offset_count > 3);
    gleaner_read_options reading;
    gleaner_read_options_init(&reading, sizeof reading);
    reading.scores = 1, reading.step = on_scores, reading.user_data = &tables;
    gleaner_kept kept[50];
    size_t count, length;
    CHECK(!gleaner_read(engine, plan, &reading, kept, 50, &count) && count > 0);
    uint32_t best = kept[0].sentence, prompt[4096], answer[128], last = 0;
    for (size_t i = 1; i < count; i++) CHECK(kept[i].sentence > kept[i - 1].sentence);
    CHECK(!gleaner_final_prompt(engine, plan, &best, 1, prompt, 4096, &length));
    gleaner_decode_options decoding;
    gleaner_decode_options_init(&decoding, sizeof decoding);
    decoding.token = on_token, decoding.user_data = &last;
    CHECK(!gleaner_decode(engine, prompt, length, &decoding, answer, 128, &count) && count >= 1 && count < 8);
    CHECK(answer[count - 1] == last);
    gleaner_plan_free(&plan);
}

static int on_text(void *user_data, const char *text, size_t length) {
    state *s = user_data;
    CHECK(strlen(text) == length && pthread_equal(pthread_self(), s->thread));
    s->length += length;
    return 1;
}

/* The library may be called, but not to read with the same engine. */
static int calls_back(void *user_data, const gleaner_step *step) {
    state *s = user_data;
    gleaner_answer *answer;
    uint32_t tokens[16];
    size_t count;
    (void)step;
    CHECK(!gleaner_tokenize(s->engine, "A word.", 7, 0, tokens, 16, &count) && count > 0);
    FAILS(s->engine, gleaner_ask(s->engine, s->document, QUESTION, NULL, &answer), GLEANER_ERROR_ARGUMENT, "callback");
    return 1;
}

static int frees(void *user_data, const gleaner_step *step) {
    state *s = user_data;
    (void)step;
    if (s->engine) CHECK(!gleaner_engine_free(&s->engine));
    return 0;
}

static void log_to(void *user_data, int level, const char *message) {
    CHECK(level == GLEANER_LOG_INFO || level == GLEANER_LOG_WARNING);
    CHECK(*message);
    *(int *)user_data += 1;
}

static gleaner_engine *open_cpu(const char *model, int *logged) {
    gleaner_engine_options options;
    gleaner_engine *engine = NULL;
    gleaner_engine_options_init(&options, sizeof options);
    options.device = "cpu";
    options.log = log_to;
    options.user_data = logged;
    CHECK(!gleaner_engine_open(model, &options, &engine));
    return engine;
}

static void callbacks(gleaner_engine *engine, const gleaner_document *document) {
    state s = {engine, document, pthread_self(), 0, 0, 0};
    gleaner_ask_options options;
    gleaner_answer *answer;
    gleaner_ask_options_init(&options, sizeof options);
    options.window_length = 256;
    options.user_data = &s;
    options.step = on_step;
    s.stop_at = 2;
    FAILS(engine, gleaner_ask(engine, document, QUESTION, &options, &answer), GLEANER_CANCELLED, "cancelled");
    CHECK(s.calls == 2 && !answer);

    s.calls = s.stop_at = 0;
    options.text = on_text;
    CHECK(!gleaner_ask(engine, document, QUESTION, &options, &answer) && !*gleaner_last_error(engine));
    size_t length;
    const char *text = gleaner_answer_text(answer, &length);
    CHECK(s.calls > 2 && strlen(text) == length && length == s.length && length > 0);
    const gleaner_evidence *best = gleaner_answer_evidence(answer, 0);
    const char *whole = gleaner_document_text(document, &length);
    CHECK(best && best->text_length == best->end - best->start && strlen(best->text) == best->text_length);
    CHECK(best->end <= length && !memcmp(whole + best->start, best->text, best->text_length) && best->line > 0);
    CHECK(strstr(gleaner_answer_json(answer), "\"evidence\":[{") && !gleaner_answer_evidence(answer, 100000));
    CHECK(!gleaner_answer_free(&answer) && !answer);

    options.text = NULL;
    options.step = calls_back;
    CHECK(gleaner_ask(engine, document, QUESTION, &options, &answer) == GLEANER_CANCELLED);
}

static void own_engine_freed(const char *model, const gleaner_document *document) {
    int logged = 0;
    state s = {open_cpu(model, &logged), document, pthread_self(), 0, 0, 0};
    gleaner_ask_options options;
    gleaner_answer *answer;
    gleaner_ask_options_init(&options, sizeof options);
    options.step = frees;
    options.user_data = &s;
    CHECK(!gleaner_ask(s.engine, document, QUESTION, &options, &answer) && !s.engine);
    CHECK(strstr(gleaner_answer_text(answer, NULL), "Clara Whitlock"));
    gleaner_answer_free(&answer);
}

static const char *const questions[] = {QUESTION, "How many arches has the bridge?"};

typedef struct {
    gleaner_engine *engine;
    const gleaner_document *document;
    int which;
    char answer[256];
} job;

static void *work(void *argument) {
    job *j = argument;
    char wrong[32];
    gleaner_answer *answer;
    gleaner_document *none = NULL;
    CHECK(!gleaner_ask(j->engine, j->document, questions[j->which], NULL, &answer));
    snprintf(j->answer, sizeof j->answer, "%s", gleaner_answer_text(answer, NULL));
    gleaner_answer_free(&answer);
    /* Each thread has its own last error, with an engine and without. */
    gleaner_decode_options options;
    gleaner_decode_options_init(&options, sizeof options);
    uint32_t token = 4000000000u + (uint32_t)j->which, tokens[128];
    size_t count;
    snprintf(wrong, sizeof wrong, "%u", (unsigned)token);
    FAILS(j->engine, gleaner_decode(j->engine, &token, 1, &options, tokens, 128, &count), GLEANER_ERROR_PLAN, wrong);
    FAILS(NULL, gleaner_document_open(wrong, &none), GLEANER_ERROR_FILE, wrong);
    for (int k = 0; k < 100; k++)
        CHECK(strstr(gleaner_last_error(j->engine), wrong) && strstr(gleaner_last_error(NULL), wrong));
    return NULL;
}

static void threads(gleaner_engine *a, gleaner_engine *b, const gleaner_document *document) {
    job jobs[2] = {{a, document, 0, ""}, {b, document, 1, ""}};
    char expected[2][256];
    for (int i = 0; i < 2; i++) {
        work(&jobs[i]);
        memcpy(expected[i], jobs[i].answer, sizeof expected[i]);
    }
    CHECK(strcmp(expected[0], expected[1]) && strstr(expected[0], "Clara Whitlock"));
    for (int shared = 0; shared < 2; shared++) {
        pthread_t ids[2];
        jobs[1].engine = shared ? a : b;
        for (int i = 0; i < 2; i++) CHECK(!pthread_create(&ids[i], NULL, work, &jobs[i]));
        for (int i = 0; i < 2; i++) {
            pthread_join(ids[i], NULL);
            CHECK(!strcmp(jobs[i].answer, expected[i]));
        }
    }
}

int main(int argc, char **argv) {
    CHECK(argc == 3);
    int logged = 0;
    gleaner_engine *a = open_cpu(argv[1], &logged), *b = open_cpu(argv[1], &logged);
    gleaner_document *document = NULL;
    CHECK(logged == 2 && !gleaner_document_open(argv[2], &document));
    callbacks(a, document);
    low_level(a, document);
    own_engine_freed(argv[1], document);
    threads(a, b, document);
    gleaner_document_free(&document);
    gleaner_engine_free(&a);
    gleaner_engine_free(&b);
    return 0;
}
