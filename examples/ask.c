/* Asks a document a question.
 *   cc -Iinclude examples/ask.c -Ltarget/release -lgleaner -o ask
 *   LD_LIBRARY_PATH=target/release ./ask models/gleaner-demo-16m examples/almanac.txt "What is ...?" */
#include <gleaner.h>
#include <stdio.h>

static int progress(void *user_data, const gleaner_step *step) {
    (void)user_data;
    fprintf(stderr, "chunk %zu of %zu\n", step->step + 1, step->steps);
    return 0; /* anything else cancels */
}

int main(int argc, char **argv) {
    if (argc != 4) {
        fprintf(stderr, "usage: %s MODEL DOCUMENT QUESTION\n", argv[0]);
        return 2;
    }
    int failed = 1;
    gleaner_engine *engine = NULL;
    gleaner_document *document = NULL;
    gleaner_answer *answer = NULL;
    gleaner_ask_options options;
    gleaner_ask_options_init(&options, sizeof options);
    options.step = progress;

    if (gleaner_engine_open(argv[1], NULL, &engine) || gleaner_document_open(argv[2], &document)) {
        fprintf(stderr, "%s\n", gleaner_last_error(NULL));
    } else if (gleaner_ask(engine, document, argv[3], &options, &answer)) {
        fprintf(stderr, "%s\n", gleaner_last_error(engine));
    } else {
        const gleaner_evidence *evidence;
        printf("%s\n", gleaner_answer_text(answer, NULL));
        for (size_t i = 0; i < 3 && (evidence = gleaner_answer_evidence(answer, i)); i++)
            printf("line %zu, score %.4g: %s\n", evidence->line, evidence->score, evidence->text);
        failed = 0;
    }
    gleaner_answer_free(&answer);
    gleaner_document_free(&document);
    gleaner_engine_free(&engine);
    return failed;
}
