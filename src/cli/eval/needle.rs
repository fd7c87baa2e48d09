//! Facts to hide, and how well an answer gives them back.

use std::collections::BTreeSet;

use super::super::noise::Noise;

/// A fact, the question for it, and the answer to expect.
#[derive(Debug, Clone, PartialEq)]
pub struct Needle {
    pub text: String,
    pub question: String,
    pub answer: String,
    form: Option<Form>,
}

const SYLLABLES: [&str; 24] = [
    "ba", "dor", "fel", "gri", "hol", "jan", "ka", "lun", "mer", "nos", "pra", "quil", "ros", "sten", "tov", "ul",
    "vi", "wex", "yar", "zeb", "mo", "tri", "den", "ska",
];
const TRADES: [&str; 12] = [
    "mayor", "baker", "doctor", "tailor", "wizard", "miller", "teacher", "judge", "painter", "banker", "sailor",
    "gardener",
];
const FIRST_NAMES: [&str; 12] =
    ["Clara", "Walter", "Hannah", "Joseph", "Martha", "Simon", "Rosa", "Peter", "Agnes", "Thomas", "Lucy", "Edmund"];
const ADJECTIVES: [&str; 16] = [
    "golden", "silver", "green", "crooked", "silent", "broken", "purple", "frozen", "tiny", "ancient", "wooden",
    "painted", "yellow", "hungry", "hollow", "striped",
];
const NOUNS: [&str; 16] = [
    "owl", "lantern", "kettle", "violin", "herring", "ladder", "pumpkin", "anchor", "feather", "thimble", "button",
    "castle", "pony", "walnut", "mirror", "turnip",
];
const MONTHS: [&str; 12] = [
    "January",
    "February",
    "March",
    "April",
    "May",
    "June",
    "July",
    "August",
    "September",
    "October",
    "November",
    "December",
];

/// What is told in a drawn fact, and of whom.
#[derive(Debug, Clone, Copy, PartialEq)]
struct Form {
    kind: usize,
    trade: &'static str,
}

impl Needle {
    /// A fact about a place that is not in `text`: place and answer are drawn, so that no model can know them.
    pub fn draw(noise: &mut Noise, text: &str) -> Needle {
        let place = new_place(noise, text);
        let form = Form { kind: noise.below(6), trade: pick(noise, &TRADES) };
        Needle::of_form(form, &place, noise)
    }

    /// A drawn fact in the same words about another place; `None` for a needle that was not drawn.
    pub fn draw_like(&self, noise: &mut Noise, text: &str) -> Option<Needle> {
        let form = self.form?;
        let place = new_place(noise, text);
        Some(Needle::of_form(form, &place, noise))
    }

    fn of_form(form: Form, place: &str, noise: &mut Noise) -> Needle {
        let trade = form.trade;
        let (subject, question, answer) = match form.kind {
            0 => {
                let subject = format!("The name of the {trade} of {place} is");
                let question = format!("What is the name of the {trade} of {place}?");
                (subject, question, format!("{} {}", pick(noise, &FIRST_NAMES), invented(noise)))
            }
            1 => {
                let subject = format!("The telephone number of the {trade} of {place} is");
                let question = format!("What is the telephone number of the {trade} of {place}?");
                (subject, question, (1000 + noise.below(9000)).to_string())
            }
            2 => {
                let subject = format!("The password of the {trade} of {place} is");
                let question = format!("What is the password of the {trade} of {place}?");
                (subject, question, format!("{}-{}", pick(noise, &ADJECTIVES), pick(noise, &NOUNS)))
            }
            3 => {
                let subject = format!("The emblem of {place} is the");
                let question = format!("What is the emblem of {place}?");
                (subject, question, format!("{} {}", pick(noise, &ADJECTIVES), pick(noise, &NOUNS)))
            }
            4 => {
                let subject = format!("The railway of {place} was opened in");
                let question = format!("When was the railway of {place} opened?");
                (subject, question, (1500 + noise.below(400)).to_string())
            }
            _ => {
                let subject = format!("The feast of {place} takes place on");
                let question = format!("When does the feast of {place} take place?");
                (subject, question, format!("{} {}", pick(noise, &MONTHS), 1 + noise.below(28)))
            }
        };
        Needle { text: format!("{subject} {answer}."), question, answer, form: Some(form) }
    }

    /// A fact of one's own.
    pub fn given(text: &str, question: &str, answer: &str) -> Needle {
        Needle { text: text.into(), question: question.into(), answer: answer.into(), form: None }
    }
}

fn new_place(noise: &mut Noise, text: &str) -> String {
    let mut place = invented(noise);
    while text.contains(&place) {
        place = invented(noise);
    }
    place
}

fn pick<'a>(noise: &mut Noise, words: &[&'a str]) -> &'a str {
    words[noise.below(words.len())]
}

/// A name that stands in no dictionary.
fn invented(noise: &mut Noise) -> String {
    let name: String = (0..3).map(|_| pick(noise, &SYLLABLES)).collect();
    name[..1].to_uppercase() + &name[1..]
}

/// Words in lower case, without what stands between them.
fn words(text: &str) -> impl Iterator<Item = String> {
    text.split(|c: char| !c.is_alphanumeric()).filter(|word| !word.is_empty()).map(str::to_lowercase)
}

/// True if there is anything in `expected` to look for.
pub fn has_words(expected: &str) -> bool {
    words(expected).next().is_some()
}

/// Share of the different words of `expected` that `answer` has, 0 to 1, whatever their order and case.
pub fn word_share(expected: &str, answer: &str) -> f64 {
    let (expected, answer): (BTreeSet<String>, BTreeSet<String>) = (words(expected).collect(), words(answer).collect());
    expected.intersection(&answer).count() as f64 / expected.len() as f64
}

/// True if `expected` stands in `answer` as it is, but for case and the width of white space.
pub fn contains_phrase(expected: &str, answer: &str) -> bool {
    let plain = |text: &str| text.split_whitespace().collect::<Vec<_>>().join(" ").to_lowercase();
    plain(answer).contains(&plain(expected))
}

/// Parts of answers that claim to know nothing, in lower case and with "not" written out.
const DECLINES: [&str; 21] = [
    "not mention",
    "not say",
    "not state",
    "not specif",
    "not provid",
    "not contain",
    "not give",
    "not includ",
    "not tell",
    "not find",
    "not found",
    "not know",
    "not answer",
    "not be determined",
    "not in the text",
    "not in the book",
    "not in the document",
    "no mention",
    "no information",
    "no answer",
    "unknown",
];

/// Whether an answer says that the text does not tell, or nothing at all. Where the text does not, any other answer is
/// false.
pub fn declines(answer: &str) -> bool {
    let plain = answer.to_lowercase().replace('’', "'").replace("cannot", "can not").replace("n't", " not");
    let plain = plain.split_whitespace().collect::<Vec<_>>().join(" ");
    plain.is_empty() || DECLINES.iter().any(|phrase| plain.contains(phrase))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn scores_count_words_and_phrases() {
        assert_eq!(word_share("Clara Whitlock", "It is Whitlock, clara."), 1.0);
        assert_eq!(word_share("Clara Whitlock", "Clara Whit"), 0.5);
        assert_eq!(word_share("48", "4827"), 0.0);
        assert!(contains_phrase("eat a  Sandwich", "You should eat a\nsandwich."));
        assert!(!contains_phrase("Clara Whitlock", "Whitlock Clara"));
        assert!(has_words("3,182") && !has_words("?!"));
    }

    #[test]
    fn a_drawn_needle_holds_its_answer_and_asks_for_its_subject() {
        let drawn: Vec<Needle> = (0..100).map(|seed| Needle::draw(&mut Noise(seed), "")).collect();
        for needle in &drawn {
            assert!(needle.text.ends_with(&format!(" {}.", needle.answer)), "{needle:?}");
            assert!(!needle.question.contains(&needle.answer), "{needle:?}");
        }
        assert_eq!(drawn[7], Needle::draw(&mut Noise(7), ""));
        let different: BTreeSet<&str> = drawn.iter().map(|needle| needle.question.as_str()).collect();
        assert!(different.len() > 90, "a name may come twice, but most differ: {}", different.len());
    }

    #[test]
    fn a_near_duplicate_tells_the_same_of_another_place() {
        for seed in 0..50 {
            let needle = Needle::draw(&mut Noise(seed), "");
            let near = needle.draw_like(&mut Noise(seed + 1000), "").unwrap();
            assert_ne!(near.question, needle.question);
            let begin = |needle: &Needle| needle.text.split(' ').take(2).map(str::to_owned).collect::<Vec<_>>();
            assert_eq!(begin(&near), begin(&needle));
            assert_eq!(near.form, needle.form);
        }
        assert_eq!(Needle::given("a", "b", "c").draw_like(&mut Noise(0), ""), None);
    }

    #[test]
    fn answers_that_decline_are_told_from_false_ones() {
        let declined = [
            "",
            " \n",
            "The text does not mention it.",
            "It isn’t stated in the book.",
            "The emblem cannot be determined.",
            "I don't know.",
            "No information is given.",
            "Unknown",
        ];
        assert!(declined.iter().all(|answer| declines(answer)), "{declined:?}");
        let claimed = ["4827", "Clara Whitlock", "The knot is golden.", "not golden but silver"];
        assert!(!claimed.iter().any(|answer| declines(answer)), "{claimed:?}");
    }

    #[test]
    fn a_place_of_the_haystack_is_not_drawn() {
        let place = invented(&mut Noise(7));
        assert!(!Needle::draw(&mut Noise(7), &place).question.contains(&place));
    }
}
