/* Everything that a caller can get wrong and the library can see: an error each, and both go on. */
#include "check.h"

static const char *model, *path;

static void options(void) {
    gleaner_ask_options ask;
    gleaner_read_options read;
    gleaner_decode_options decode;
    gleaner_engine_options engine;
    CHECK(!gleaner_ask_options_init(&ask, sizeof ask));
    CHECK(!gleaner_read_options_init(&read, sizeof read));
    CHECK(!gleaner_decode_options_init(&decode, sizeof decode));
    CHECK(!gleaner_engine_options_init(&engine, sizeof engine));
    /* Every field lies where both sides think it does. */
    CHECK(ask.struct_size == sizeof ask && ask.window_length == 1024 && ask.topk == 300 && ask.phrase_width == 8);
    CHECK(ask.max_retained == 0 && ask.max_sentence_tokens == 256 && ask.short_tail == 8);
    CHECK(ask.chunk_short_tail == 10 && !ask.prompt_template && ask.max_new_tokens == 128);
    CHECK(ask.temperature == 0 && ask.top_p == 1 && ask.seed == 0 && !ask.step && !ask.text && !ask.user_data);
    CHECK(read.struct_size == sizeof read && !read.scores && !read.step && !read.user_data);
    CHECK(decode.struct_size == sizeof decode && decode.max_new_tokens == 128 && decode.temperature == 0);
    CHECK(decode.top_p == 1 && decode.seed == 0 && !decode.token && !decode.user_data);
    CHECK(engine.struct_size == sizeof engine && !engine.device && !engine.cuda_stream && !engine.log);

    FAILS(NULL, gleaner_ask_options_init(&ask, sizeof ask - 1), GLEANER_ERROR_ARGUMENT, "struct_size");
    FAILS(NULL, gleaner_ask_options_init(&ask, sizeof ask + 8), GLEANER_ERROR_ARGUMENT, "struct_size");
    FAILS(NULL, gleaner_ask_options_init(NULL, sizeof ask), GLEANER_ERROR_ARGUMENT, "is null");
    FAILS(NULL, gleaner_check_abi(GLEANER_ABI_VERSION + 1), GLEANER_ERROR_ARGUMENT, "compile it with");
    CHECK(!gleaner_check_abi(GLEANER_ABI_VERSION) && !*gleaner_last_error(NULL));
    CHECK(!strcmp(gleaner_version(), GLEANER_VERSION));
}

static void opening(void) {
    gleaner_engine *engine = (gleaner_engine *)&model;
    gleaner_engine_options options;
    gleaner_engine_options_init(&options, sizeof options);
    FAILS(NULL, gleaner_engine_open("tests/golden", NULL, &engine), GLEANER_ERROR_FILE, "tests/golden/config.json");
    CHECK(!engine);
    FAILS(NULL, gleaner_engine_open("no/such/place", NULL, &engine), GLEANER_ERROR_MODEL, "no/such/place");
    FAILS(NULL, gleaner_engine_open(NULL, NULL, &engine), GLEANER_ERROR_ARGUMENT, "model_dir is null");
    FAILS(NULL, gleaner_engine_open(model, NULL, NULL), GLEANER_ERROR_ARGUMENT, "gleaner_engine is null");
    FAILS(NULL, gleaner_engine_open("\xff", NULL, &engine), GLEANER_ERROR_ARGUMENT, "not valid UTF-8");
    options.device = "tpu";
    FAILS(NULL, gleaner_engine_open(model, &options, &engine), GLEANER_ERROR_PARAMETER, "tpu");
    options.device = "cuda:99";
    FAILS(NULL, gleaner_engine_open(model, &options, &engine), GLEANER_ERROR_DEVICE, "cuda:99");
    options.device = "cpu";
    options.cuda_stream = &options;
    FAILS(NULL, gleaner_engine_open(model, &options, &engine), GLEANER_ERROR_PARAMETER, "cuda_stream");
    options.struct_size = 0;
    FAILS(NULL, gleaner_engine_open(model, &options, &engine), GLEANER_ERROR_ARGUMENT, "struct_size");
    CHECK(!engine);

    gleaner_document *document;
    FAILS(NULL, gleaner_document_open("no/such.txt", &document), GLEANER_ERROR_FILE, "no/such.txt");
    FAILS(NULL, gleaner_document_from_text("mine", "ab\xff", 3, &document), GLEANER_ERROR_DOCUMENT, "offset 2");
    FAILS(NULL, gleaner_document_from_text("mine", " ", 1, &document), GLEANER_ERROR_DOCUMENT, "mine is empty");
    FAILS(NULL, gleaner_document_from_text("mine", NULL, 0, &document), GLEANER_ERROR_DOCUMENT, "mine is empty");
    FAILS(NULL, gleaner_document_from_text("mine", NULL, 1, &document), GLEANER_ERROR_ARGUMENT, "text is null");
    FAILS(NULL, gleaner_document_from_text("mine", "a", (size_t)-1, &document), GLEANER_ERROR_ARGUMENT, "elements");
    CHECK(!document);
}

static void handles(gleaner_engine *engine, gleaner_document *document) {
    gleaner_answer *answer = (gleaner_answer *)engine;
    gleaner_plan *plan;
    size_t size;
    FAILS(NULL, gleaner_ask(NULL, document, QUESTION, NULL, &answer), GLEANER_ERROR_ARGUMENT, "gleaner_engine is null");
    CHECK(!answer);
    FAILS(engine, gleaner_ask(engine, NULL, QUESTION, NULL, &answer), GLEANER_ERROR_ARGUMENT, "document is null");
    FAILS(engine, gleaner_ask(engine, document, NULL, NULL, &answer), GLEANER_ERROR_ARGUMENT, "question is null");
    FAILS(engine, gleaner_ask(engine, document, QUESTION, NULL, NULL), GLEANER_ERROR_ARGUMENT, "answer is null");
    FAILS(engine, gleaner_ask(engine, document, "Who\xc3?", NULL, &answer), GLEANER_ERROR_ARGUMENT, "offset 3");
    FAILS(engine, gleaner_ask(engine, document, " \n", NULL, &answer), GLEANER_ERROR_PARAMETER, "question is empty");
    /* Each for another. */
    FAILS(NULL, gleaner_ask((gleaner_engine *)document, document, QUESTION, NULL, &answer), GLEANER_ERROR_ARGUMENT,
          "not a handle of gleaner_engine");
    FAILS(engine, gleaner_ask(engine, (gleaner_document *)engine, QUESTION, NULL, &answer), GLEANER_ERROR_ARGUMENT,
          "not a handle of gleaner_document");
    FAILS(engine, gleaner_read(engine, (gleaner_plan *)document, NULL, NULL, 0, &size), GLEANER_ERROR_ARGUMENT,
          "not a handle of gleaner_plan");
    FAILS(engine, gleaner_ask(engine, (gleaner_document *)((char *)document + 1), QUESTION, NULL, &answer),
          GLEANER_ERROR_ARGUMENT, "not aligned");
    gleaner_document *wrong = (gleaner_document *)engine;
    FAILS(NULL, gleaner_document_free(&wrong), GLEANER_ERROR_ARGUMENT, "not a handle of gleaner_document");
    FAILS(NULL, gleaner_plan_view(NULL, NULL), GLEANER_ERROR_ARGUMENT, "gleaner_plan is null");
    CHECK(!gleaner_engine_device(NULL) && !gleaner_document_text(NULL, &size) && !gleaner_document_text(document, NULL));
    CHECK(!gleaner_answer_text(NULL, NULL) && !gleaner_answer_json(NULL) && !gleaner_answer_evidence(NULL, 0));
    CHECK(!strcmp(gleaner_last_error((gleaner_engine *)document), gleaner_last_error(NULL)));

    /* Freed handles are null; nothing is freed twice. */
    gleaner_document *second = NULL;
    CHECK(!gleaner_document_from_text(NULL, "One. Two.", 9, &second) && second);
    CHECK(!gleaner_document_free(&second) && !second && !gleaner_document_free(&second));
    CHECK(!gleaner_document_free(NULL) && !gleaner_engine_free(NULL) && !gleaner_plan_free(NULL));
    FAILS(engine, gleaner_plan_from_document(engine, second, QUESTION, NULL, &plan), GLEANER_ERROR_ARGUMENT, "is null");
    CHECK(!plan);
}

static void parameters(gleaner_engine *engine, gleaner_document *document) {
    gleaner_answer *answer;
    gleaner_ask_options options, good;
    gleaner_ask_options_init(&good, sizeof good);
    options = good, options.topk = 0;
    FAILS(engine, gleaner_ask(engine, document, QUESTION, &options, &answer), GLEANER_ERROR_PARAMETER, "topk is 0");
    options = good, options.top_p = -1;
    FAILS(engine, gleaner_ask(engine, document, QUESTION, &options, &answer), GLEANER_ERROR_PARAMETER, "top_p");
    options = good, options.window_length = 16;
    FAILS(engine, gleaner_ask(engine, document, QUESTION, &options, &answer), GLEANER_ERROR_PARAMETER, "shorten");
    options = good, options.prompt_template = "no fields";
    FAILS(engine, gleaner_ask(engine, document, QUESTION, &options, &answer), GLEANER_ERROR_TEMPLATE, "{context}");
    options = good, options.struct_size -= 8;
    FAILS(engine, gleaner_ask(engine, document, QUESTION, &options, &answer), GLEANER_ERROR_ARGUMENT, "struct_size");
    CHECK(!answer);
}

static void plans(gleaner_engine *engine, gleaner_document *document) {
    uint32_t prefix[] = {5}, tail[] = {6, 7}, tokens[] = {8, 9, 10}, sentences[] = {0, 1, 3}, chunks[] = {0, 1, 2};
    gleaner_plan_tables tables = {sizeof tables, prefix, 1, tail, 2, 1, tokens, 3, sentences, 3, chunks, 3, 2, 1, 0xffffffff};
    gleaner_plan *plan;
    gleaner_kept kept[2];
    size_t count = 0, end;
    CHECK(!gleaner_plan_from_tokens(engine, &tables, &plan));
    FAILS(engine, gleaner_read(engine, plan, NULL, kept, 1, &count), GLEANER_ERROR_BUFFER, "kept must hold 2");
    CHECK(count == 2);
    FAILS(engine, gleaner_read(engine, plan, NULL, NULL, 2, &count), GLEANER_ERROR_ARGUMENT, "kept is null");
    FAILS(engine, gleaner_read(engine, plan, NULL, kept, 2, NULL), GLEANER_ERROR_ARGUMENT, "count is null");
    CHECK(!gleaner_read(engine, plan, NULL, kept, 2, &count) && count >= 1 && count <= 2);
    FAILS(NULL, gleaner_plan_span(plan, 0, &count, &end), GLEANER_ERROR_PLAN, "no text");
    FAILS(engine, gleaner_final_prompt(engine, plan, NULL, 0, NULL, 0, &count), GLEANER_ERROR_PLAN, "no text");
    gleaner_plan_tables view = {0};
    FAILS(NULL, gleaner_plan_view(plan, &view), GLEANER_ERROR_ARGUMENT, "struct_size");
    view.struct_size = sizeof view;
    CHECK(!gleaner_plan_view(plan, &view) && view.token_count == 3 && view.tokens[2] == 10 && view.question_start == 1);
    CHECK(view.sentence_offsets[2] == 3 && view.chunk_offset_count == 3 && view.max_retained == 0xffffffff);
    gleaner_plan_free(&plan);

    tokens[1] = 0xffffffff;
    FAILS(engine, gleaner_plan_from_tokens(engine, &tables, &plan), GLEANER_ERROR_PLAN, "beyond the vocabulary");
    tokens[1] = 9, sentences[1] = 7;
    FAILS(engine, gleaner_plan_from_tokens(engine, &tables, &plan), GLEANER_ERROR_PLAN, "sentence_offsets");
    sentences[1] = 1, tables.question_start = (size_t)-1;
    FAILS(engine, gleaner_plan_from_tokens(engine, &tables, &plan), GLEANER_ERROR_PLAN, "question_start");
    tables.question_start = 1, tables.tokens = NULL;
    FAILS(engine, gleaner_plan_from_tokens(engine, &tables, &plan), GLEANER_ERROR_ARGUMENT, "tokens is null");
    CHECK(!plan);

    /* A plan from a document keeps what it needs of it. */
    size_t length, start, last = 0;
    const char *text = gleaner_document_text(document, &length);
    gleaner_document *copy = NULL;
    CHECK(!gleaner_document_from_text("copy", text, length, &copy));
    CHECK(!gleaner_plan_from_document(engine, copy, QUESTION, NULL, &plan));
    gleaner_document_free(&copy);
    CHECK(!gleaner_plan_view(plan, &view));
    for (uint32_t sentence = 0; sentence + 1 < view.sentence_offset_count; sentence++, last = end)
        CHECK(!gleaner_plan_span(plan, sentence, &start, &end) && start == last && end > start);
    CHECK(last == length);
    uint32_t beyond = (uint32_t)view.sentence_offset_count - 1, prompt[8];
    FAILS(NULL, gleaner_plan_span(plan, beyond, &start, &end), GLEANER_ERROR_PLAN, "there is no sentence");
    FAILS(engine, gleaner_final_prompt(engine, plan, &beyond, 1, NULL, 0, &count), GLEANER_ERROR_PLAN, "no sentence");
    beyond = 0, count = 0;
    FAILS(engine, gleaner_final_prompt(engine, plan, &beyond, 1, prompt, 8, &count), GLEANER_ERROR_BUFFER, "tokens must hold");
    CHECK(count > 8);
    gleaner_plan_free(&plan);
}

static void tokens(gleaner_engine *engine) {
    const char *text = "Pellinbridge <|im_end|>";
    uint32_t plain[64], special[64], none = 0xffffffff;
    size_t plain_count, special_count, length;
    char back[64];
    CHECK(!gleaner_tokenize(engine, text, strlen(text), 0, plain, 64, &plain_count));
    CHECK(!gleaner_tokenize(engine, text, strlen(text), 1, special, 64, &special_count));
    CHECK(special_count < plain_count);
    CHECK(!gleaner_detokenize(engine, plain, plain_count, back, sizeof back, &length));
    CHECK(length == strlen(text) && !strcmp(back, text));
    FAILS(engine, gleaner_detokenize(engine, plain, plain_count, back, length, &length), GLEANER_ERROR_BUFFER, "text must hold");
    FAILS(engine, gleaner_tokenize(engine, "\xff", 1, 0, plain, 64, &plain_count), GLEANER_ERROR_ARGUMENT, "UTF-8");
    FAILS(engine, gleaner_decode(engine, NULL, 0, NULL, plain, 64, &plain_count), GLEANER_ERROR_BUFFER, "128");
    gleaner_decode_options options;
    gleaner_decode_options_init(&options, sizeof options);
    options.max_new_tokens = 4;
    FAILS(engine, gleaner_decode(engine, NULL, 0, &options, plain, 64, &plain_count), GLEANER_ERROR_PLAN, "prompt");
    FAILS(engine, gleaner_decode(engine, &none, 1, &options, plain, 64, &plain_count), GLEANER_ERROR_PLAN, "4294967295");
}

int main(int argc, char **argv) {
    CHECK(argc == 3);
    model = argv[1], path = argv[2];
    gleaner_engine *engine = NULL;
    gleaner_document *document = NULL;
    gleaner_engine_options on_cpu;
    options();
    opening();
    gleaner_engine_options_init(&on_cpu, sizeof on_cpu);
    on_cpu.device = "cpu";
    CHECK(!gleaner_engine_open(model, &on_cpu, &engine) && !gleaner_document_open(path, &document));
    CHECK(!strncmp(gleaner_engine_device(engine), "cpu", 3));
    handles(engine, document);
    parameters(engine, document);
    plans(engine, document);
    tokens(engine);
    CHECK(!gleaner_document_free(&document) && !gleaner_engine_free(&engine) && !engine);
    return 0;
}
