//! Random numbers, for UUIDs, jitter, partition choice and the key of producer ids. The generator is cryptographically
//! secure (`rand::rng`), except in a simulated process.

use rand::{
    Rng, RngExt as _,
    distr::uniform::{SampleRange, SampleUniform},
};
use uuid::Uuid;

/// Draws a number from the range, with uniform distribution.
///
/// # Panics
/// If the range is empty.
pub fn in_range<T: SampleUniform>(range: impl SampleRange<T>) -> T {
    with_generator(|generator| generator.random_range(range))
}

/// Draws 64 random bits.
pub fn bits() -> u64 {
    with_generator(|generator| generator.next_u64())
}

/// Fills `bytes` with random bytes.
pub fn fill(bytes: &mut [u8]) {
    with_generator(|generator| generator.fill_bytes(bytes));
}

/// Draws a UUID of version 4.
pub fn uuid() -> Uuid {
    let mut bytes = [0; 16];
    fill(&mut bytes);
    uuid::Builder::from_random_bytes(bytes).into_uuid()
}

/// Draws from the thread's generator, or from that of the simulated process.
fn with_generator<T>(draw: impl FnOnce(&mut dyn Rng) -> T) -> T {
    #[cfg(feature = "sim")]
    if let Some(process) = super::process::SimProcess::current() {
        return process.with_generator(draw);
    }
    #[expect(clippy::disallowed_methods, reason = "the one place that draws")]
    let mut generator = rand::rng();
    draw(&mut generator)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn drawn_values_differ_and_uuid_has_version_4() {
        let (first, second) = (uuid(), uuid());
        assert_ne!(first, second);
        assert_eq!(first.get_version_num(), 4);
        assert_eq!(first.get_variant(), uuid::Variant::RFC4122);
        assert!((0..1000).map(|_| in_range(3..5)).all(|drawn| drawn == 3 || drawn == 4));
        assert_ne!(bits(), bits());
    }
}
