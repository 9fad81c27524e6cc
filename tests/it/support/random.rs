//! Random input. A test prints its seed as `MKV_SEED=…` and reads it back from the environment.

pub fn seeded_rng() -> fastrand::Rng {
    let seed = std::env::var("MKV_SEED")
        .map_or_else(|_| fastrand::u64(..), |seed| seed.parse().expect("MKV_SEED is a number"));
    println!("MKV_SEED={seed}");
    fastrand::Rng::with_seed(seed)
}

pub fn random_bytes(rng: &mut fastrand::Rng, length: usize) -> Vec<u8> {
    let mut value = vec![0; length];
    rng.fill(&mut value);
    value
}
