"""Records what the Python packages behind LongBench v1's metrics give for made-up cases: the file that tests/metrics.rs
compares with. Each metric has a list of cases, the arguments first and the value last.

usage: metrics_golden.py OUT.json      (needs rouge==1.0.1, jieba==0.42.1, fuzzywuzzy==0.18.0 and python-Levenshtein)
"""
import json
import random
import re
import string
import sys
from collections import Counter

import jieba
from fuzzywuzzy import fuzz
from rouge import Rouge

# LongBench's list, which has no opening angle brackets.
ZH_PUNCTUATION = ("！？｡。＂＃＄％＆＇（）＊＋，－／：；＜＝＞＠［＼］＾＿｀｛｜｝～｟｠｢｣､、〃》「」『』【】〔〕〖〗〘〙〚〛〜〝〞〟〰〾〿"
                  "–—‘’‛“”„‟…‧﹏.")
DROPPED, DROPPED_ZH = (str.maketrans("", "", s) for s in (string.punctuation, string.punctuation + ZH_PUNCTUATION))


def words_en(text):
    return re.sub(r"\b(?:the|an|a)\b", " ", text.lower().translate(DROPPED)).split()


def words_zh(text):
    cut = ("".join(word.lower().translate(DROPPED_ZH).split()) for word in jieba.cut(text))
    return [word for word in cut if word]


def f1(prediction, truth):
    shared = (Counter(prediction) & Counter(truth)).total()
    if not shared:
        return 0.0
    p, r = shared / len(prediction), shared / len(truth)
    return 2 * p * r / (p + r)


def rouge_l(prediction, truth):
    try:
        return Rouge().get_scores([prediction], [truth], avg=True)["rouge-l"]["f"]
    except ValueError:  # nothing left of one of the texts
        return 0.0


def classification(prediction, truth, classes):
    named = [name for name in classes if name in prediction]
    for name in named:  # changed while it is walked, as in LongBench
        if name != truth and name in truth:
            named.remove(name)
    return 1 / len(named) if truth in named else 0.0


def count(prediction, truth):
    numbers = re.findall(r"\d+", prediction)
    return numbers.count(truth) / len(numbers) if numbers else 0.0


def retrieval(prefix):
    def score(prediction, truth):
        found = re.search(prefix + r"(\d+)", truth)
        return count(prediction, found[1]) if found else None
    return score


def code_similarity(prediction, truth):
    lines = prediction.lstrip("\n").split("\n")
    code = next((line for line in lines if not any(mark in line for mark in ("`", "#", "//"))), "")
    return fuzz.ratio(code, truth) / 100


METRICS = {
    "exact_match": lambda p, t: float(words_en(p) == words_en(t)),
    "qa_f1": lambda p, t: f1(words_en(p), words_en(t)),
    "qa_f1_zh": lambda p, t: f1(words_zh(p), words_zh(t)),
    "rouge_l": rouge_l,
    "rouge_l_zh": lambda p, t: rouge_l(" ".join(jieba.cut(p)), " ".join(jieba.cut(t))),
    "classification": classification,
    "count": count,
    "retrieval": retrieval("Paragraph "),
    "retrieval_zh": retrieval("段落"),
    "code_similarity": code_similarity,
    "words": lambda text: list(jieba.cut(text)),
}

EDGES = ["", " ", ".", "...", " . ", "\n", "!?,;", "a", "The", "an a the", "word", "word.", "a.n", "the-end", "A cat. The dog.",
         "the cat sat on the mat", "The Cat, sat on (the) mat!", "on the mat the cat sat", "cat cat cat", "cat cat",
         "one. two. three.", "three. two. one", "one two three. ", "x  y\tz\x1fw", "“the” a’s l’an", "athe thea", "Éa É ÉCOLE école",
         "in 1984", "1984", "the year was 1984.5", "3.14 and 2,71", "ΣΑΣ ΟΔΟΣ", "it's the U.S.A.", "a_b the_c", "１２ and ²"]
EDGES_ZH = ["", "。", "，。！", "《红楼梦》的作者是曹雪芹。", "红楼梦的作者是曹雪芹", "曹雪芹", "北京大学的学生来到了北京。", "我来到北京清华大学", "小明硕士毕业于中国科学院计算所",
            "他来到了网易杭研大厦", "GPT-4和v1.2.3版本，共3.14%", "T恤、B超和卡拉OK", "做B超检查", "一共２０２３年 1,000元", "第一行\r\n第二行", "〈书〉《名》「号」·．",
            "结婚的和尚未结婚的", "iPhone 15 Pro-Max C++", "a.b_c-d..e", "𠮷野家㐀鿖字"]
CODE = ["", "\n", "\n\nreturn x + 1", "return x + 1", "    return x+1", "# comment\nx = 1", "```python\nx = 1\n```", "// no\n/ yes", "`a`\n#b\n//c",
        "x = 1", "for (int i = 0; i < n; i++) {", "for (size_t j = 0; j < n; ++j) {", "print('é')", "self.assertEqual(a, b)", "aab", "ab", "\r\nx = 1"]
CLASSES = ["News", "Sports", "Sports News", "World Sports News", "Science", "Sci", "Other"]


def pairs(texts, rng, n):
    return [(rng.choice(texts), rng.choice(texts)) for _ in range(n)]


def cases(rng):
    jieba.initialize()
    entries = [line.split() for line in jieba.get_dict_file().read().decode().splitlines()]
    usual = [entry[0] for entry in sorted(entries, key=lambda entry: -int(entry[1]))[:400]]
    characters = sorted({c for word in usual for c in word})
    latin = ["WES-5.4.5", "3.14", "50%", "GPT-4", "C++", "B-52", "a.b", "x_y", "AT&T", "10-20", "T恤", "v1.2.3", ".NET", "--", "é", " ", "Ａ"]
    small = "the a an of cat dog sat mat Dog. cat, and. red blue The".split()
    sentence = lambda: " ".join(rng.choices(small, k=rng.randint(1, 14)))

    def chinese():
        kinds = rng.choice([[usual], [usual, characters], [usual, usual, latin, "，。、！"], [characters, entries]])
        picked = (rng.choice(rng.choice(kinds)) for _ in range(rng.randint(1, 16)))
        return "".join(word if isinstance(word, str) else word[0] for word in picked)

    def rewritten(text):
        return "".join(c for c in text if rng.random() < 0.8) + text[: rng.randint(0, 5)]

    english = [(a, b) for a in EDGES for b in EDGES[::3]] + [(sentence(), sentence()) for _ in range(100)]
    chinese_pairs = [(a, b) for a in EDGES_ZH for b in EDGES_ZH[::4]]
    chinese_pairs += [(text, rewritten(text)) for text in (chinese() for _ in range(120))]
    long = [tuple(" ".join(rng.choices(small, k=700)).replace(".", "") for _ in range(2)) for _ in range(2)]
    code = [(a, b) for a in CODE for b in CODE]
    code += [(rewritten(text), text) for text in ("".join(rng.choices("abcx()=+ .", k=rng.randint(1, 60))) for _ in range(150))]
    named = [("".join(rng.choices(CLASSES + [" ", "?"], k=rng.randint(0, 4))), rng.choice(CLASSES)) for _ in range(120)]
    numbers = ["", "none", "7", "07", "Paragraph 7", "Paragraph 12 or Paragraph 7", "paragraphs 7, 7 and 8", "7.5", "７ 7", "-7", "x7y", "²7", "٧7"]
    prefixed = lambda prefix: [prefix + "7", "see " + prefix + "12 and " + prefix + "7", prefix + "x " + prefix + "8", prefix + "٧", "7", ""]
    with_truths = lambda truths: [(number, truth) for number in numbers for truth in truths]
    return {
        "exact_match": pairs(EDGES, rng, 150) + [(a, a) for a in EDGES] + [("The cat!", "cat"), ("a.n", ""), ("cats", "cat")],
        "qa_f1": english,
        "qa_f1_zh": chinese_pairs,
        "rouge_l": english + long,
        "rouge_l_zh": chinese_pairs,
        "classification": [(p, t, CLASSES) for p, t in named + [("", "Other"), ("World Sports News", "World Sports News")]],
        "count": with_truths(["7", "8", "07", ""]),
        "retrieval": with_truths(prefixed("Paragraph ")),
        "retrieval_zh": with_truths(prefixed("段落")),
        "code_similarity": code,
        "words": [(text,) for text in EDGES + EDGES_ZH + CODE + [chinese() for _ in range(300)]],
    }


def main(out):
    sys.setrecursionlimit(10_000)  # rouge's subsequence is recursive; LongBench gives 0 where it fails
    made = cases(random.Random(7))
    golden = {name: [[*case, METRICS[name](*case)] for case in made[name]] for name in METRICS}
    rows = (f'"{name}": [\n' + ",\n".join(json.dumps(row, ensure_ascii=False) for row in rows) + "\n]" for name, rows in golden.items())
    with open(out, "w", encoding="utf-8", newline="\n") as file:
        file.write("{\n" + ",\n".join(rows) + "\n}\n")


if __name__ == "__main__":
    main(sys.argv[1])
