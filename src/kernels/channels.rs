//! Mean and variance of channels over tokens, which norm tweaking compares (methods-quant §2).

pub mod gpu;

/// Mean of every channel of tokens × width values, and its variance with n − 1 in the denominator.
pub fn channels(width: usize, values: &[f32]) -> [Vec<f64>; 2] {
    let tokens = (values.len() / width.max(1)) as f64;
    let (mut mean, mut variance) = (vec![0.0f64; width], vec![0.0f64; width]);
    for row in values.chunks_exact(width.max(1)) {
        mean.iter_mut().zip(row).for_each(|(mean, &value)| *mean += f64::from(value) / tokens);
    }
    for row in values.chunks_exact(width.max(1)) {
        variance.iter_mut().zip(row).zip(&mean).for_each(|((variance, &value), mean)| *variance += (f64::from(value) - mean).powi(2));
    }
    variance.iter_mut().for_each(|variance| *variance /= (tokens - 1.0).max(1.0));
    [mean, variance]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn mean_and_variance_by_hand() {
        let [mean, variance] = channels(2, &[1.0, -4.0, 2.0, -4.0, 6.0, -4.0]);
        assert_eq!((mean[1], variance[1]), (-4.0, 0.0));
        assert!((mean[0] - 3.0).abs() < 1e-12 && (variance[0] - 7.0).abs() < 1e-12, "{mean:?} {variance:?}");
    }
}
