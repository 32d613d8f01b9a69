//! The one source of randomness: ids that are drawn, jitter, where a producer goes next, the key of producer ids. The generator of a thread
//! is cryptographically secure (`rand::rng`); that of a simulated process is not, and keeps no secret.

use rand::{
    Rng, RngExt as _,
    distr::uniform::{SampleRange, SampleUniform},
};
use uuid::Uuid;

/// A number of the range, each as likely as the others.
///
/// # Panics
/// When the range is empty.
pub fn in_range<T: SampleUniform>(range: impl SampleRange<T>) -> T {
    draw(|generator| generator.random_range(range))
}

/// 64 random bits.
pub fn bits() -> u64 {
    draw(|generator| generator.next_u64())
}

/// Fills `bytes`.
pub fn fill(bytes: &mut [u8]) {
    draw(|generator| generator.fill_bytes(bytes));
}

/// An id that nobody else has drawn: a UUID of version 4.
pub fn uuid() -> Uuid {
    let mut bytes = [0; 16];
    fill(&mut bytes);
    uuid::Builder::from_random_bytes(bytes).into_uuid()
}

/// Draws from the thread's generator, which the system seeded; in a simulated process from its own.
fn draw<T>(draw: impl FnOnce(&mut dyn Rng) -> T) -> T {
    #[cfg(feature = "sim")]
    if let Some(process) = super::process::Process::current() {
        return process.draw(draw);
    }
    #[expect(clippy::disallowed_methods, reason = "the one place that draws")]
    let mut generator = rand::rng();
    draw(&mut generator)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_drawn_differs_and_is_a_uuid_of_version_4() {
        let (one, other) = (uuid(), uuid());
        assert_ne!(one, other);
        assert_eq!(one.get_version_num(), 4);
        assert_eq!(one.get_variant(), uuid::Variant::RFC4122);
        assert!((0..1000).map(|_| in_range(3..5)).all(|drawn| drawn == 3 || drawn == 4));
        assert_ne!(bits(), bits());
    }
}
