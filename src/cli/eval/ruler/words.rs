//! What needles are made of: words, numbers and identifiers that are drawn, each at most once in a document.

use std::collections::HashSet;

use super::super::super::noise::Noise;

const ADJECTIVES: [&str; 96] = [
    "able", "amber", "ancient", "bitter", "blank", "bold", "brave", "brief", "bright", "broad", "broken", "calm",
    "careful", "cheap", "clean", "clever", "cloudy", "cold", "common", "crisp", "curious", "curly", "damp", "dark",
    "dear", "deep", "dim", "distant", "double", "dry", "dull", "dusty", "eager", "early", "empty", "equal", "faint",
    "fair", "famous", "fancy", "fierce", "flat", "fond", "foreign", "fragile", "free", "fresh", "gentle", "glad",
    "grand", "grim", "happy", "harsh", "hasty", "heavy", "hidden", "hollow", "honest", "humble", "icy", "idle",
    "jolly", "keen", "kind", "late", "lazy", "light", "lively", "lonely", "loud", "lucky", "merry", "mild", "narrow",
    "neat", "noble", "odd", "pale", "plain", "polite", "proud", "quick", "quiet", "rapid", "rare", "rough", "rusty",
    "salty", "sharp", "shy", "silent", "slow", "smooth", "steep", "tidy", "wild",
];
const NOUNS: [&str; 144] = [
    "acorn", "anchor", "anvil", "apple", "apron", "arrow", "attic", "axle", "badger", "bakery", "balcony", "banjo",
    "barrel", "basin", "basket", "beacon", "beaver", "bell", "bench", "berry", "blanket", "bonnet", "bottle",
    "bramble", "bridge", "broom", "brush", "bucket", "buckle", "button", "cabbage", "cabin", "camel", "candle",
    "canoe", "carpet", "carriage", "castle", "cellar", "chapel", "cherry", "chimney", "cider", "clock", "clover",
    "cobbler", "comet", "compass", "copper", "cottage", "cradle", "crane", "cricket", "crown", "curtain", "cushion",
    "daisy", "dolphin", "donkey", "drum", "eagle", "easel", "engine", "falcon", "feather", "fence", "ferry", "fiddle",
    "flute", "forest", "fountain", "fox", "garden", "garlic", "gate", "glove", "goblet", "granite", "guitar", "hammer",
    "harbour", "harp", "hatchet", "hedge", "helmet", "heron", "honey", "hornet", "island", "ivory", "jacket", "jar",
    "jigsaw", "kettle", "kitten", "ladder", "lantern", "lemon", "letter", "lever", "lizard", "locket", "magnet",
    "mantle", "marble", "meadow", "mill", "mirror", "mitten", "needle", "nettle", "oak", "oar", "orchard", "otter",
    "oven", "paddle", "parcel", "parrot", "pebble", "pepper", "pigeon", "pillow", "piston", "pocket", "puddle",
    "quarry", "quilt", "radish", "raven", "ribbon", "rudder", "saddle", "scarf", "spade", "sparrow", "spindle",
    "teapot", "thimble", "tulip", "turnip", "violin", "walnut", "wagon",
];

/// What a key or a value looks like.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Form {
    /// An adjective and a noun.
    Word,
    /// Seven digits.
    Number,
    /// A version 4 UUID.
    Uuid,
}

impl Form {
    /// The name in the singular; the plural has an s.
    pub fn name(self) -> &'static str {
        match self {
            Form::Word => "word",
            Form::Number => "number",
            Form::Uuid => "uuid",
        }
    }
}

/// Draws for one document.
pub struct Draws {
    pub noise: Noise,
    taken: HashSet<String>,
}

impl Draws {
    /// The same `parts` give the same draws.
    pub fn new(seed: u64, parts: &[usize]) -> Draws {
        let mix = |mut noise: Noise, &part: &usize| Noise((noise.below(usize::MAX) as u64).wrapping_add(part as u64));
        Draws { noise: parts.iter().fold(Noise(seed), mix), taken: HashSet::new() }
    }

    /// A key or value that was not drawn before.
    pub fn draw(&mut self, form: Form) -> String {
        let mut drawn = self.any(form);
        while !self.taken.insert(drawn.clone()) {
            // There are 13,824 pairs of words; beyond them, and where one comes twice, more adjectives tell them apart.
            drawn = match form {
                Form::Word => format!("{}-{drawn}", self.pick(&ADJECTIVES)),
                Form::Number | Form::Uuid => self.any(form),
            };
        }
        drawn
    }

    fn any(&mut self, form: Form) -> String {
        match form {
            Form::Word => format!("{}-{}", self.pick(&ADJECTIVES), self.pick(&NOUNS)),
            Form::Number => (1_000_000 + self.noise.below(9_000_000)).to_string(),
            Form::Uuid => {
                let mut bits = |count: u32| self.noise.below(1 << count);
                let (a, b, c, d, e) = (bits(32), bits(16), bits(12), bits(14), bits(48));
                format!("{a:08x}-{b:04x}-4{c:03x}-{:04x}-{e:012x}", 0x8000 | d)
            }
        }
    }

    /// Capital letters that were not drawn before.
    pub fn letters(&mut self, count: usize) -> String {
        loop {
            let name: String = (0..count).map(|_| char::from(b'A' + self.noise.below(26) as u8)).collect();
            if self.taken.insert(name.clone()) {
                return name;
            }
        }
    }

    fn pick(&mut self, words: &[&'static str]) -> &'static str {
        words[self.noise.below(words.len())]
    }

    pub fn shuffle<T>(&mut self, items: &mut [T]) {
        for last in (1..items.len()).rev() {
            items.swap(last, self.noise.below(last + 1));
        }
    }

    /// `count` different numbers below `limit`, or all there are, ascending.
    pub fn sample(&mut self, count: usize, limit: usize) -> Vec<usize> {
        let mut all: Vec<usize> = (0..limit).collect();
        self.shuffle(&mut all);
        all.truncate(count);
        all.sort_unstable();
        all
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nothing_is_drawn_twice_even_when_the_pairs_run_out() {
        let mut draws = Draws::new(1, &[]);
        let words: HashSet<String> = (0..30_000).map(|_| draws.draw(Form::Word)).collect();
        assert_eq!(words.len(), 30_000);
        assert_eq!(
            ADJECTIVES.iter().collect::<HashSet<_>>().len() * NOUNS.iter().collect::<HashSet<_>>().len(),
            13_824
        );
    }

    #[test]
    fn forms_are_as_named() {
        let mut draws = Draws::new(2, &[7, 8]);
        for _ in 0..100 {
            let number = draws.draw(Form::Number);
            assert!(number.len() == 7 && !number.starts_with('0') && number.parse::<u32>().is_ok(), "{number}");
            let uuid = draws.draw(Form::Uuid);
            assert_eq!(uuid.split('-').map(str::len).collect::<Vec<_>>(), [8, 4, 4, 4, 12]);
            assert!(uuid.chars().all(|c| c == '-' || c.is_ascii_hexdigit()), "{uuid}");
            assert!(uuid.as_bytes()[14] == b'4' && b"89ab".contains(&uuid.as_bytes()[19]), "{uuid}");
        }
    }

    #[test]
    fn samples_are_different_and_ascend() {
        let mut draws = Draws::new(3, &[]);
        let sample = draws.sample(10, 40);
        assert!(sample.len() == 10 && sample.is_sorted_by(|a, b| a < b) && sample[9] < 40, "{sample:?}");
        assert_eq!(draws.sample(5, 3), [0, 1, 2]);
    }
}
