// Asks a document a question from C++17: handles that free themselves, errors as exceptions, progress as a lambda.
//   c++ -std=c++17 -Iinclude examples/ask.cpp -Ltarget/release -lgleaner -o ask
#include <gleaner.h>

#include <functional>
#include <iostream>
#include <memory>
#include <stdexcept>
#include <string>
#include <string_view>

template <auto Free>
struct Deleter {
    template <typename T>
    void operator()(T *handle) const {
        Free(&handle);
    }
};

using Engine = std::unique_ptr<gleaner_engine, Deleter<gleaner_engine_free>>;
using Document = std::unique_ptr<gleaner_document, Deleter<gleaner_document_free>>;
using Answer = std::unique_ptr<gleaner_answer, Deleter<gleaner_answer_free>>;

static void check(gleaner_status status, const gleaner_engine *engine = nullptr) {
    if (status != GLEANER_OK) throw std::runtime_error(gleaner_last_error(engine));
}

static Engine open_engine(const std::string &model_dir) {
    gleaner_engine *engine = nullptr;
    check(gleaner_engine_open(model_dir.c_str(), nullptr, &engine));
    return Engine(engine);
}

static Document open_document(const std::string &path) {
    gleaner_document *document = nullptr;
    check(gleaner_document_open(path.c_str(), &document));
    return Document(document);
}

using Words = std::function<bool(std::string_view)>;

static Answer ask(const Engine &engine, const Document &document, const std::string &question, Words words) {
    gleaner_ask_options options;
    check(gleaner_ask_options_init(&options, sizeof options));
    options.user_data = &words;
    // An exception may not leave a callback.
    options.text = [](void *user_data, const char *text, size_t length) noexcept {
        return (*static_cast<Words *>(user_data))({text, length}) ? 0 : 1;
    };
    gleaner_answer *answer = nullptr;
    check(gleaner_ask(engine.get(), document.get(), question.c_str(), &options, &answer), engine.get());
    return Answer(answer);
}

int main(int argc, char **argv) try {
    if (argc != 4) throw std::invalid_argument("usage: ask MODEL DOCUMENT QUESTION");
    const Engine engine = open_engine(argv[1]);
    const Document document = open_document(argv[2]);
    const Answer answer = ask(engine, document, argv[3], [](std::string_view words) {
        std::cout << words << std::flush;
        return true;
    });
    std::cout << '\n';
    if (const gleaner_evidence *best = gleaner_answer_evidence(answer.get(), 0))
        std::cout << "line " << best->line << ": " << best->text << '\n';
} catch (const std::exception &error) {
    std::cerr << error.what() << '\n';
    return 1;
}
