//! Facts to hide, and how well an answer gives them back.

use std::collections::BTreeSet;

use super::super::noise::Noise;

/// A fact, the question for it, and the answer to expect.
#[derive(Debug, Clone, PartialEq)]
pub struct Needle {
    pub text: String,
    pub question: String,
    pub answer: String,
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

impl Needle {
    /// A fact about a place that is not in `haystack`: place and answer are drawn, so that no model can know them.
    pub fn draw(noise: &mut Noise, haystack: &str) -> Needle {
        let mut place = invented(noise);
        while haystack.contains(&place) {
            place = invented(noise);
        }
        let kind = noise.below(6);
        let trade = pick(noise, &TRADES);
        let (subject, question, answer) = match kind {
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
        Needle { text: format!("{subject} {answer}."), question, answer }
    }
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
    fn a_place_of_the_haystack_is_not_drawn() {
        let place = invented(&mut Noise(7));
        assert!(!Needle::draw(&mut Noise(7), &place).question.contains(&place));
    }
}
